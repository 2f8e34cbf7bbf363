"""What the cells of a bake-off come to: means over seeds with their intervals. Pure numpy and scipy.

Shape suffixes: S seeds; R evaluations of a run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from kto_ray.bake_off.methods import METHODS
from kto_ray.bake_off.tasks import TASKS
from kto_ray.evaluate.statistics import CONFIDENCE, Interval

GOALS = (0.75, 0.8)
"""Held-out pass rates of which is asked after how many images they are reached."""


@dataclass(frozen=True)
class Curve:
    """A method on a task: held-out pass rate over images drawn, and what it came to.

    `to_goal` is the number of images after which the mean over seeds reaches a goal (between two evaluations by a
    straight line), None where it does not. `lost` is the watched scorer's mean, last minus base.
    """

    task: str
    method: str
    seeds: list[int]
    images: list[int]
    pass_rate: list[Interval]
    to_goal: dict[str, float | None]
    final: Interval
    mean_score: Interval
    lost: Interval | None
    diversity: Interval
    seconds: float


def over_seeds(values_S: Sequence[float]) -> Interval:
    """Mean over seeds with Student's t interval; NaN bounds for a single seed."""
    values, count = np.asarray(values_S, np.float64), len(values_S)
    mean = float(values.mean())
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def images_to(goal: float, images_R: Sequence[int], rates_R: Sequence[float]) -> float | None:
    """Images drawn when a rate first reaches a goal; None: it does not."""
    for place, rate in enumerate(rates_R):
        if rate >= goal:
            if place == 0:
                return float(images_R[0])
            before, here = rates_R[place - 1], images_R[place - 1]
            return here + (images_R[place] - here) * (goal - before) / (rate - before)
    return None


def curve_of(task: str, method: str, runs: Mapping[int, Sequence[Mapping[str, Any]]]) -> Curve:
    """One method on one task.

    Args:
        runs: the rows of each seed, see `running.rows_of`.
    """
    by_images = [{row["images"]: row for row in rows if row["evaluation"]} for rows in runs.values()]
    images = sorted(set[int].intersection(*map(set, by_images)))  # where all seeds were evaluated
    evaluated = [[rows[place] for place in images] for rows in by_images]
    rates = [
        over_seeds([rows[place]["evaluation"]["pass_rate"]["value"] for rows in evaluated])
        for place in range(len(images))
    ]
    first, last = ([rows[place]["evaluation"] for rows in evaluated] for place in (0, -1))
    watched = TASKS[task].watched
    lost = (
        over_seeds(
            [after["scores"][watched] - before["scores"][watched] for before, after in zip(first, last, strict=True)]
        )
        if watched
        else None
    )
    return Curve(
        task=task,
        method=method,
        seeds=sorted(runs),
        images=images,
        pass_rate=rates,
        to_goal={f"{goal:g}": images_to(goal, images, [rate.value for rate in rates]) for goal in GOALS},
        final=rates[-1],
        mean_score=over_seeds([each["mean_score"]["value"] for each in last]),
        lost=lost,
        diversity=over_seeds([each["diversity"] for each in last]),
        seconds=float(np.mean([rows[-1]["seconds"] for rows in runs.values()])),
    )


def best_of(curves: Sequence[Curve]) -> Curve:
    """The highest final value of a task."""
    return max(curves, key=lambda curve: curve.final.value)


def within_the_best(curve: Curve, curves: Sequence[Curve]) -> bool:
    """Whether a method's final value reaches into the interval of the task's best."""
    best = best_of(curves)
    return curve is best or not curve.final.value < best.final.low


def to_json(curves: Sequence[Curve], tuning: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """All of it, with how every method was tuned: final held-out pass rate by setting and tuning seed."""
    return {
        "tasks": {name: task.title for name, task in TASKS.items()},
        "methods": {
            name: {"title": method.title, "ours": method.ours, "tuned": dict(method.tuned)}
            for name, method in METHODS.items()
        },
        "tuning": {name: dict(found) for name, found in tuning.items()},
        "curves": [asdict(curve) for curve in curves],
    }
