"""The labeler that a run's configuration names; the loop asks here, and `preflight.py` before it."""

import inspect

from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.label.protocol import Labeler
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.plugins import load_plugin
from kto_ray.storage import Storage

LABELERS: dict[str, str] = {
    "threshold": "kto_ray.label.threshold_labeler:ThresholdLabeler",
    "human": "kto_ray.people.labeler:HumanLabeler",
    "feedback": "kto_ray.feedback.labeler:FeedbackLabeler",
}
"""The built-in labelers by name."""


def make_labeler(config: RunConfig, run: Storage, console: Console) -> Labeler:
    """By thresholds, people, an application's users, or a class of the user's built with `label.labeler_args`.

    Args:
        run: the run's folder, where people's answers are kept.
        console: where people's links are printed.

    Raises:
        UserError: there is no such class.
    """
    match config.label.labeler:
        case ThresholdLabeler.name:
            return ThresholdLabeler(config.label)
        case "human":
            from kto_ray.people.labeler import HumanLabeler

            return HumanLabeler(config, run, console)
        case "feedback":
            from kto_ray.feedback.labeler import FeedbackLabeler

            return FeedbackLabeler(config, run, console)
    return labeler_class(config.label.labeler)(**config.label.labeler_args)


def labeler_class(path: str) -> type[Labeler]:
    """The class that `label.labeler` names.

    Raises:
        UserError: there is no such class, or it is of the protocol as it was when samples came with their scores.
    """
    found: type[Labeler] = load_plugin("label.labeler", path, LABELERS)
    submit = getattr(found, "submit", None)
    if callable(submit) and len(inspect.signature(submit).parameters) > 2:
        raise UserError(
            f"label.labeler: {path}: submit{inspect.signature(submit)} takes scores, too, but samples are submitted as "
            "soon as they are drawn; write submit(self, samples), and take scores in scored(self, stage, scores)"
        )
    return found
