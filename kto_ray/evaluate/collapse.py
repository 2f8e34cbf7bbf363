"""The watch for collapse: signs, in the figures of the rounds so far, that training takes the policy apart.

`doubts.py` asks after each round (`train.watch`). Each sign says what it means and which setting to change. Where the
limits come from: docs/labeling.md, "Collapse".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kto_ray.config import RunConfig
from kto_ray.evaluate.hacking import slope
from kto_ray.objectives import DiffusionKTO

CHANCE = 3.0
"""Standard errors that a fall must be larger than."""

Row = Mapping[str, Any]


def signs_of_collapse(config: RunConfig, rows: Sequence[Row]) -> dict[str, str]:
    """What the last of these rounds, in order, and the trend up to it give reason to fear, by sign; {} for nothing.

    A figure that a round does not have (None, NaN) shows no sign.
    """
    if config.train.watch.action == "off" or not rows:
        return {}
    found = {name: sign(config, rows) for name, sign in SIGNS.items()}
    return {name: f"possible collapse: {text}" for name, text in found.items() if text}


def _worse(config: RunConfig, rows: Sequence[Row]) -> str | None:
    # Where beta sets itself, the round says what it was.
    beta = figure(rows[-1], "objective/beta")
    beta = getattr(config.train.objective, "beta", math.nan) if math.isnan(beta) else beta
    yes, no = (beta * figure(rows[-1], f"objective/g_{label}") for label in ("desirable", "undesirable"))
    if not (yes < -config.train.watch.worse and no < -config.train.watch.worse):
        return None
    return (
        "the policy explains desirable and undesirable images worse than the reference does (mean beta g is "
        f"{yes:.3g} and {no:.3g}): it loses what the base model knew. In a new run, {_slower(config)}"
    )


def _saturated(config: RunConfig, rows: Sequence[Row]) -> str | None:
    share = figure(rows[-1], "objective/saturated")
    if not share > config.train.watch.saturated:
        return None
    return (
        f"{share:.0%} of the drawn samples lie where the utility is flat (|beta (g - z)| > 4) and teach next to "
        f"nothing. In a new run, {_gentler(config)}, or {_slower(config)}"
    )


def _alike(config: RunConfig, rows: Sequence[Row]) -> str | None:
    first, last = (figure(row, "pictures/diversity") for row in (rows[0], rows[-1]))
    if not last < config.train.watch.diversity * first:
        return None
    return (
        f"the images of a round differ from each other by {last:.3g}, those of the first by {first:.3g}: the policy "
        f"draws more and more of the same. In a new run, {_slower(config)}, raise train.objective.beta, or let images "
        "be judged within their prompt (label.threshold: prompt_quantile)"
    )


def _falling(config: RunConfig, rows: Sequence[Row]) -> str | None:
    rates = [figure(row, "pass_rate") for row in rows[-config.train.watch.rounds :]]
    trend = slope(rates)
    if trend is None or -trend <= max(config.train.watch.falls, CHANCE * _error_of_slope(rates, config)):
        return None
    return (
        f"the pass rate of trained prompts falls by {-trend:.1%} a round, over {len(rates)} rounds: training undoes "
        f"what it taught. In a new run, {_slower(config)}, or let the rate decay (train.decay: cosine)"
    )


SIGNS: dict[str, Callable[[RunConfig, Sequence[Row]], str | None]] = {
    "worse": _worse,
    "saturated": _saturated,
    "diversity": _alike,
    "falls": _falling,
}


def _gentler(config: RunConfig) -> str:
    objective = config.train.objective
    if isinstance(objective, DiffusionKTO):
        if objective.target_margin is not None:
            return f"lower train.objective.target_margin ({objective.target_margin:g})"
        return "lower train.objective.beta, or let it set itself (train.objective.target_margin: 1)"
    return "lower train.objective.beta"


def _slower(config: RunConfig) -> str:
    clean = "" if config.train.noise_range[0] == 0 else ", let train.noise_range begin at 0"
    return f"lower train.learning_rate or train.epochs{clean}"


def figure(row: Row, name: str) -> float:
    """NaN for one that is not there: no comparison with it holds."""
    value = row.get(name)
    return math.nan if value is None else float(value)


def _error_of_slope(rates: Sequence[float], config: RunConfig) -> float:
    """Standard error of the slope of pass rates that only chance moves.

    Images of one prompt count as one draw, as if they always agreed: rather an error too large than a false alarm.
    """
    rates_R = np.array(rates)
    place_R = np.flatnonzero(np.isfinite(rates_R))
    mean = float(rates_R[place_R].mean())
    draws = config.generate.images_per_round / config.generate.images_per_prompt
    return math.sqrt(mean * (1 - mean) / draws / float(np.square(place_R - place_R.mean()).sum()))
