"""The labeler that a run's configuration names; the loop asks here."""

from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.label.protocol import LABELERS, Labeler
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.plugins import load_plugin
from kto_ray.storage import Storage


def make_labeler(config: RunConfig, run: Storage, console: Console) -> Labeler:
    """By thresholds, people, or a class of the user's built with `label.labeler_args`.

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
    labeler: Labeler = load_plugin("label.labeler", config.label.labeler, LABELERS)(**config.label.labeler_args)
    return labeler
