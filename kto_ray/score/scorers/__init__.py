"""The built-in scorers by name: an explicit table from the configuration to a class, one small file each."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import cast

from kto_ray.identity import OnResume, marks_of
from kto_ray.plugins import load_plugin
from kto_ray.score.protocol import Scorer

SCORERS: dict[str, str] = {
    "shapes": "kto_ray.shapes.scorer:ShapesScorer",
    "redness": "kto_ray.score.scorers.redness:Redness",
    "jpeg_size": "kto_ray.score.scorers.jpeg_size:JpegSize",
    "clip_score": "kto_ray.score.scorers.clip_score:ClipScore",
    "pickscore": "kto_ray.score.scorers.pickscore:PickScore",
    "aesthetic": "kto_ray.score.scorers.aesthetic:Aesthetic",
    "image_reward": "kto_ray.score.scorers.image_reward:ImageReward",
    "hpsv2": "kto_ray.score.scorers.hpsv2:HPSv2",
    "http": "kto_ray.score.scorers.http:Http",
    "vlm_judge": "kto_ray.score.scorers.vlm_judge:VlmJudge",
    "function": "kto_ray.score.scorers.function:Function",
}


def load_scorer(path: str, field: str = "label.scorers") -> Callable[..., Scorer]:
    """What builds the scorer of a built-in name or dotted path, from keyword arguments; a function is wrapped.

    Raises:
        UserError: see `load_plugin`.
    """
    plugin = load_plugin(field, path, SCORERS, functions=True)
    if inspect.isclass(plugin):
        return cast(Callable[..., Scorer], plugin)
    from kto_ray.score.scorers.function import Function

    return partial(Function, path)


def scorer_marks(path: str) -> dict[str, OnResume]:
    """What arguments of the scorer of that name may change while a run goes on; raises as `load_scorer`."""
    return marks_of(load_plugin("label.scorers", path, SCORERS, functions=True))
