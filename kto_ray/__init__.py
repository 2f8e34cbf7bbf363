"""Online Diffusion-KTO on Ray: a text-to-image diffusion model learns from yes/no feedback.

Importing this package is cheap (neither torch nor ray is loaded). Start reading at `kto_ray/loop.py`.

What programs may rely on is imported from here, and loaded when it is asked for (docs/python.md):

    from kto_ray import RunFolder                    # figures as rows, rounds as Arrow tables, policies as state dicts
    from kto_ray import RunConfig, load_config       # the configuration of a run, checked
    from kto_ray import Scorer, Labeler, ObjectiveSection  # what one's own parts have to be like
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC = {
    "RunFolder": "kto_ray.run_folder:RunFolder",
    "RunConfig": "kto_ray.config:RunConfig",
    "load_config": "kto_ray.config:load",
    "Scorer": "kto_ray.score.protocol:Scorer",
    "Labeler": "kto_ray.label.protocol:Labeler",
    "ObjectiveSection": "kto_ray.objectives.protocol:ObjectiveSection",
    "Sample": "kto_ray.records:Sample",
    "Score": "kto_ray.records:Score",
    "Verdict": "kto_ray.records:Verdict",
    "Prompt": "kto_ray.records:Prompt",
    "UserError": "kto_ray.errors:UserError",
}
"""Where each of them is at home."""

__all__ = [*PUBLIC, "__version__"]

if TYPE_CHECKING:
    from kto_ray.config import RunConfig as RunConfig
    from kto_ray.config import load as load_config  # noqa: F401  the public name says of what
    from kto_ray.errors import UserError as UserError
    from kto_ray.label.protocol import Labeler as Labeler
    from kto_ray.objectives.protocol import ObjectiveSection as ObjectiveSection
    from kto_ray.records import Prompt as Prompt
    from kto_ray.records import Sample as Sample
    from kto_ray.records import Score as Score
    from kto_ray.records import Verdict as Verdict
    from kto_ray.run_folder import RunFolder as RunFolder
    from kto_ray.score.protocol import Scorer as Scorer


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
