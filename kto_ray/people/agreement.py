"""How far people agree: per cent, and Krippendorff's alpha, which takes out what chance would give."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Annotation = tuple[str, str, str]
"""Labeler, item, and what the labeler said of it."""
Mix = tuple[str, ...]
"""All that was said of an image, sorted: for images of the same mix, people agree alike."""


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
    by_item: dict[str, list[str]] = {}
    for _, item, answer in said:
        by_item.setdefault(item, []).append(answer)
    return reliability(Counter(mix_of(answers) for answers in by_item.values()))


def mix_of(answers: Iterable[str]) -> Mix:
    return tuple(sorted(answers))


def reliability(images: Mapping[Mix, int]) -> Reliability:
    """The same of numbers of images by their mix."""
    shared = {mix: number for mix, number in sorted(images.items()) if len(mix) > 1 and number}
    if not shared:
        return Reliability(None, None)
    answers = sorted({answer for mix in shared for answer in mix})
    counts_MA = np.array([[mix.count(answer) for answer in answers] for mix in shared])
    images_M, differ_M, pairs_M = np.array([*shared.values()]), _differ(counts_MA), _pairs(counts_MA)
    percent = float(images_M @ (pairs_M - differ_M) / (images_M @ pairs_M))
    if len(answers) < 2:
        return Reliability(percent, None)
    # One minus the disagreement within images over that of all answers, whoever gave them to whichever image.
    total_A = images_M @ counts_MA
    within = images_M @ (differ_M / (counts_MA.sum(-1) - 1))
    return Reliability(percent, float(1 - within / (_differ(total_A) / (total_A.sum() - 1))))


def _pairs(counts_A: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ordered pairs of answers."""
    total = counts_A.sum(-1)
    pairs: npt.NDArray[np.int64] = total * (total - 1)
    return pairs


def _differ(counts_A: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ordered pairs of answers that differ."""
    pairs: npt.NDArray[np.int64] = counts_A.sum(-1) ** 2 - (counts_A**2).sum(-1)
    return pairs
