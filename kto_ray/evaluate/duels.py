"""Policies of several runs against each other, prompt by prompt: the shape of the paper's Table 1.

A duel is the share of held-out prompts on which one policy's median image scores higher than the other's, by one
scorer; ties count half (`statistics.median_win_rate`). Runs are comparable with the same held-out prompts, images a
prompt, and seed; `duel` refuses others. Read from the evaluations that runs keep; nothing is drawn or scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kto_ray.errors import UserError
from kto_ray.evaluate.charts import percent, percents
from kto_ray.evaluate.statistics import Interval, median_win_rate
from kto_ray.rounds import Round, by_sample

BASE = "the base model"


@dataclass(frozen=True)
class Contestant:
    """A policy and its sealed evaluation."""

    title: str
    evaluation: Round


def scores_PK(evaluation: Round, scorer: str) -> dict[str, npt.NDArray[np.float64]]:
    """By prompt id, the scores of its K images in the order of their numbers; NaN where one failed."""
    scores = by_sample(evaluation.scores())
    records = sorted(evaluation.records(), key=lambda record: (record.prompt.id, record.index))
    found: dict[str, list[float]] = {}
    for record in records:
        score = scores.get(record.id, {}).get(scorer)
        found.setdefault(record.prompt.id, []).append(np.nan if score is None or score.value is None else score.value)
    return {prompt: np.array(values, np.float64) for prompt, values in found.items()}


def duel(one: Contestant, other: Contestant, scorer: str) -> Interval:
    """How often the first wins against the second.

    Raises:
        UserError: they were not evaluated on the same prompts and seeds, or nothing was scored.
    """
    sides = one.evaluation.sample_ids, other.evaluation.sample_ids
    if sides[0] != sides[1]:
        raise UserError(
            f"{one.title} and {other.title} were evaluated on other held-out prompts or seeds: {len(sides[0])} and "
            f"{len(sides[1])} images, {len(sides[0] & sides[1])} of them in common"
        )
    mine, theirs = (scores_PK(side.evaluation, scorer) for side in (one, other))
    try:
        return median_win_rate(np.stack(list(mine.values())), np.stack([theirs[prompt] for prompt in mine]))
    except ValueError as error:
        raise UserError(f"{one.title} against {other.title} by {scorer}: {error}") from error


def duels(
    one: Contestant, others: Sequence[Contestant], scorers: Sequence[str]
) -> Mapping[str, Mapping[str, Interval]]:
    """By the title of the other one, and by scorer."""
    return {other.title: {scorer: duel(one, other, scorer) for scorer in scorers} for other in others}


def markdown(one: Contestant, found: Mapping[str, Mapping[str, Interval]]) -> str:
    """A table: a row an opponent, a column a scorer; 95 % intervals over prompts in parentheses."""
    scorers = list(next(iter(found.values())))
    rows = [[f"{one.title} against", *scorers], ["---"] * (1 + len(scorers))]
    rows += [
        [title, *(f"{percent(by[name].value)} ({percents(by[name])})" for name in scorers)]
        for title, by in found.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
