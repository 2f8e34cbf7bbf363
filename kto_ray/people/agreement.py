"""How far people agree: per cent, and Krippendorff's alpha, which takes out what chance would give."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

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
    from nltk.metrics.agreement import AnnotationTask  # a second of imports

    if len({verdict for _, _, verdict in shared}) < 2:
        return None
    return float(AnnotationTask(data=list(shared)).alpha())


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
