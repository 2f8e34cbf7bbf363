"""How far people agree: per cent, and Krippendorff's alpha, which takes out what chance would give."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

Annotation = tuple[str, str, str]
"""Labeler, item, and what the labeler said of it."""


@dataclass(frozen=True)
class Reliability:
    """Of people with each other; None where no image was judged by two.

    `alpha` is 1 for perfect agreement, 0 for what chance gives, below for less; None, too, if all said the same of
    everything: then chance alone would agree.
    """

    percent: float | None
    alpha: float | None


def agreement(said: Iterable[Annotation]) -> Reliability:
    """Of all answers on images that at least two people judged (Krippendorff 2011, nominal data, any gaps)."""
    shared = [answers for answers in _by_item(said).values() if len(answers) > 1]
    pairs = [one[2] == other[2] for answers in shared for one, other in combinations(answers, 2)]
    if not pairs:
        return Reliability(None, None)
    return Reliability(sum(pairs) / len(pairs), _alpha([answer for answers in shared for answer in answers]))


def _alpha(shared: Sequence[Annotation]) -> float | None:
    """One minus the disagreement within images over that of all answers, whoever gave them to whichever image."""
    items, item_N = np.unique([item for _, item, _ in shared], return_inverse=True)
    answers, answer_N = np.unique([answer for _, _, answer in shared], return_inverse=True)
    if len(answers) < 2:
        return None
    counts_IA = np.zeros((len(items), len(answers)))  # how often an image was given an answer
    np.add.at(counts_IA, (item_N, answer_N), 1)
    return float(1 - _disagreement(counts_IA).sum() / _disagreement(counts_IA.sum(0)))


def _disagreement(counts_A: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ordered pairs of answers that differ, over those that one answer is in."""
    total = counts_A.sum(-1)
    pairs: npt.NDArray[np.float64] = (total**2 - (counts_A**2).sum(-1)) / (total - 1)
    return pairs


def agreement_of(said: Iterable[Annotation]) -> dict[str, float]:
    """Share of the other people's answers on the same images that each labeler's agree with; without those who have
    no image in common with anybody."""
    together: dict[str, list[bool]] = {}
    for answers in _by_item(said).values():
        for one, other in combinations(answers, 2):
            for labeler in (one[0], other[0]):
                together.setdefault(labeler, []).append(one[2] == other[2])
    return {labeler: sum(agreed) / len(agreed) for labeler, agreed in together.items()}


def _by_item(said: Iterable[Annotation]) -> dict[str, list[Annotation]]:
    table: dict[str, list[Annotation]] = {}
    for answer in said:
        table.setdefault(answer[1], []).append(answer)
    return table
