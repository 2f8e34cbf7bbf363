"""How a plug-in is found by its dotted path; `score/scorers/` and `labelers.py` have the built-in ones."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from kto_ray.errors import UserError


def load_plugin(kind: str, path: str, built_in: Mapping[str, str], functions: bool = False) -> Any:
    """The class (with `functions`, or function) that a name of `built_in` or `package.module:Name` stands for.

    Raises:
        UserError: unknown name (suggests the nearest), module that cannot be imported, or attribute that is not there.
    """
    dotted = built_in.get(path, path)
    module_name, separator, attribute = dotted.partition(":")
    if not separator:
        close = difflib.get_close_matches(path, built_in, n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{kind}: unknown name {path!r}{suggestion}; built in: {', '.join(sorted(built_in))}; "
            "or give your own class as 'package.module:Name'"
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{kind}: cannot import {module_name!r} of {path!r}: {error}") from error
    plugin = getattr(module, attribute, None)
    if not inspect.isclass(plugin) and not (functions and callable(plugin)):
        raise UserError(
            f"{kind}: module {module_name!r} has no class {'or function ' if functions else ''}{attribute!r}"
        )
    return plugin
