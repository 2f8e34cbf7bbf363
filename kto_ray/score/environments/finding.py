"""Where environments are, whether they can be used, and the interpreter of one that can."""

import difflib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kto_ray
from kto_ray.errors import UserError
from kto_ray.score.environments import contents
from kto_ray.score.environments.contents import Environment, root, specification

MARKER = "kto-ray-environment.json"  # written last: an environment without it is not finished


def interpreter(name: str) -> Path:
    """The Python of a built environment; an absolute path is taken as the Python of one's own environment.

    Raises:
        UserError: there is no such environment, or it is not built, or not for this Ray, this Python and these pins.
    """
    if Path(name).is_absolute():
        if not Path(name).is_file() or not os.access(name, os.X_OK):
            raise UserError(
                f"environment {name} is no program; give the path of a Python that is the same on all nodes"
            )
        return Path(name)
    environment = named(name)
    if flaw := find_flaw(environment):
        raise UserError(
            f"environment {name!r} {flaw}; build it with: kto-ray env build {name} "
            f"(environments are kept in {root()}; KTO_RAY_ENVS names another folder)"
        )
    return environment.python


def named(name: str) -> Environment:
    """Raises UserError for a name that is not in `ENVIRONMENTS`; suggests the nearest."""
    if name not in contents.ENVIRONMENTS:
        close = difflib.get_close_matches(name, contents.ENVIRONMENTS, n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"unknown environment {name!r}{suggestion}; there are: {', '.join(sorted(contents.ENVIRONMENTS))}; "
            "or give the absolute path of a Python of your own"
        )
    return contents.ENVIRONMENTS[name]


def find_flaw(environment: Environment) -> str | None:
    """Why an environment cannot be used, to be read after its name; None: it can."""
    built = _read_marker(environment)
    if built is None:
        return "is built only in part" if environment.folder.exists() else "is not built"
    for field, wanted in specification(environment).items():
        had = built.get(field, "unknown")
        if had != wanted:
            if isinstance(wanted, str):
                return f"was built for {field} {had}, this is {field} {wanted}"
            changed = [item for item in wanted if item not in had]
            return f"was built with other {field} than {', '.join(changed)}" if changed else f"has too many {field}"
    if not environment.python.is_file():
        return f"has no {environment.python} any more"
    if environment is contents.BASE:
        return None
    if flaw := find_flaw(contents.BASE):
        return f"rests on a base that {flaw}"
    linked, here = environment.site_packages / "kto_ray" / "__init__.py", Path(kto_ray.__file__)
    if not linked.is_file() or linked.read_bytes() != here.read_bytes():
        return f"is linked to another version of kto_ray than {kto_ray.__version__}"
    return None


def _read_marker(environment: Environment) -> dict[str, Any] | None:
    marker = environment.folder / MARKER
    if not marker.is_file():
        return None
    try:
        content = json.loads(marker.read_text())
    except ValueError:
        return {}  # damaged: it says nothing of what the environment was built for
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class State:
    """An environment as `kto-ray env list` shows it; `flaw` is None when it can be used."""

    environment: Environment
    flaw: str | None
    size: int
    """Bytes on disk; 0 when it is not built."""


def states() -> list[State]:
    """The base and all environments, as they are now."""
    return [
        State(environment, find_flaw(environment), (_read_marker(environment) or {}).get("size", 0))
        for environment in (contents.BASE, *contents.ENVIRONMENTS.values())
    ]


def require(module: str, environment: str) -> Any:
    """Import a module that only an environment has. Raises UserError elsewhere, which says where to run the scorer."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and broken
        raise UserError(
            f"there is no {error.name} in {sys.executable}: this scorer runs in an environment of its own; "
            f"set env: {environment} in its settings, and build it with: kto-ray env build {environment}"
        ) from error
