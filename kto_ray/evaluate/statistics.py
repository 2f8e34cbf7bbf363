"""Held-out figures with their uncertainty: mean score, pass rate, differences, win rate. Pure numpy and scipy.

Images of one prompt resemble each other, so they are not independent draws: an interval that took them for such would
be too narrow. What is independent are the prompts, and the uncertainty is taken over them.

Why closed forms and no bootstrap: they need no seed, no resampling, and with few prompts Student's t still covers what
a percentile bootstrap does not.

A failed score is NaN (or None): it is left out and counted, never made up.

Shape suffixes: N images in any order; P prompts; K images of one prompt.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]
Scores = Sequence[float | None] | npt.NDArray[np.floating]
Groups = Sequence[Hashable] | npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % confidence interval, and how many images (prompts, for a win rate) it rests on.

    `low` and `high` are NaN when all images have one prompt: nothing is known then of how prompts differ.
    """

    value: float
    low: float
    high: float
    used: int = 0
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """One policy on the held-out prompts; `win_rate` is against the base, and None for the base itself.

    `mean_score`, `pass_rate` and `win_rate` are by the rule that verdicts come from, `scores` by every scorer.
    `differences` are policy minus base, image by image: of "pass_rate", "mean_score" and "score/NAME" of every scorer;
    what cannot be compared is not there.
    """

    policy_version: int
    mean_score: Interval
    pass_rate: Interval
    win_rate: Interval | None
    images: int
    failed: int
    scores: Mapping[str, Interval] = field(default_factory=dict)
    differences: Mapping[str, Interval] = field(default_factory=dict)


def mean_interval(scores: Scores, groups: Groups) -> Interval:
    """Mean of the scores with a cluster-robust t interval over prompts.

        r_p  = sum over images i of prompt p of (score_i - mean)
        se^2 = P / (P - 1) * sum over p of r_p^2 / N^2
        mean -+ t(0.975, P - 1) * se

    The sandwich variance of Liang and Zeger (1986) with the usual small-sample factor. With equally many images a
    prompt it is the plain t interval of the P prompt means.

    Args:
        scores: one score an image; NaN or None for a failed one.
        groups: the prompt id of each image.

    Raises:
        ValueError: nothing to average, lengths that differ, an image without prompt (padding), an infinite score.
    """
    scores_N, prompt_N, failed = _scored_images(scores, groups)
    mean, error = _clustered_mean(scores_N, prompt_N)
    half = _student(prompt_N) * error
    return Interval(mean, mean - half, mean + half, len(scores_N), failed)


def pass_rate(scores: Scores, groups: Groups, threshold: float) -> Interval:
    """Share of images that score at least `threshold`, with a Wilson interval for clustered data.

        n_effective = share (1 - share) / se^2, at most N          se as in `mean_interval`
        Wilson's interval of (share, n_effective) with t(0.975, P - 1) for the normal quantile

    The effective sample size of Korn and Graubard (1998) in Wilson's formula, as the comparison of Franco, Little,
    Louis and Slud (2019) recommends. It stays within [0, 1] and keeps its width at 0 % and 100 %, where n_effective is
    P, as if the images of a prompt always agreed.

    Raises:
        ValueError: as `mean_interval`; or a threshold that is not finite.
    """
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, not {threshold}")
    scores_N, prompt_N, failed = _scored_images(scores, groups)
    share, error = _clustered_mean((scores_N >= threshold).astype(np.float64), prompt_N)
    images, prompts = len(scores_N), int(prompt_N.max()) + 1
    variance = share * (1 - share)
    effective = prompts if variance == 0 else images if error == 0 else min(images, variance / error**2)
    return Interval(share, *_wilson(share, effective, _student(prompt_N)), images, failed)


def mean_difference(policy_scores: Scores, base_scores: Scores, groups: Groups) -> Interval:
    """Mean of policy minus base over images of the same prompt and seed: `mean_interval` of their differences.

    What the two share, an easy prompt or a lucky seed, cancels out; two intervals side by side would count it twice.

    Args:
        policy_scores, base_scores: in the same order; an image that failed on either side is left out.

    Raises:
        ValueError: as `mean_interval`, or lengths that differ.
    """
    policy_N, base_N = _paired(policy_scores, base_scores)
    return mean_interval(policy_N - base_N, groups)


def pass_rate_difference(policy_scores: Scores, base_scores: Scores, groups: Groups, threshold: float) -> Interval:
    """Pass rate of the policy minus that of the base, over images of the same prompt and seed.

        p, b       pass rates of policy and base, with their intervals as in `pass_rate`
        r          correlation over prompts of the residuals r_p of both, see `mean_interval`; 0 where one has none
        p - b  -  sqrt((p - p_low)^2 + (b_high - b)^2 - 2 r (p - p_low) (b_high - b))
        p - b  +  sqrt((p_high - p)^2 + (b - b_low)^2 - 2 r (p_high - p) (b - b_low))

    Newcombe's (1998) interval for paired shares, in the general form of Zou and Donner (2008): it stays within [-1, 1]
    and keeps its width where all images of a side pass.

    Raises:
        ValueError: as `pass_rate`, or lengths that differ.
    """
    policy_N, base_N = _paired(policy_scores, base_scores)
    p, b = pass_rate(policy_N, groups, threshold), pass_rate(base_N, groups, threshold)
    (policy_N, prompt_N, _), (base_N, _, _) = _scored_images(policy_N, groups), _scored_images(base_N, groups)
    residual_2P = [np.bincount(prompt_N, (side_N >= threshold) - i.value) for side_N, i in ((policy_N, p), (base_N, b))]
    norm = math.prod(float(np.linalg.norm(residual_P)) for residual_P in residual_2P)
    r = float(np.dot(*residual_2P)) / norm if norm else 0.0

    def reach(mine: float, other: float) -> float:
        # Rounding could carry it below 0; NaN (a single prompt) stays NaN.
        return float(np.sqrt(np.maximum(0.0, mine**2 + other**2 - 2 * r * mine * other)))

    low, high = reach(p.value - p.low, b.high - b.value), reach(p.high - p.value, b.value - b.low)
    difference = p.value - b.value
    return Interval(difference, difference - low, difference + high, p.used, p.left_out)


def median_win_rate(policy_scores_PK: npt.NDArray[np.floating], base_scores_PK: npt.NDArray[np.floating]) -> Interval:
    """Share of prompts on which the policy's median-scoring image beats the base's: the paper's protocol (K = 5).

    A tie counts half. Wilson's 95 % interval over the prompts compared (`used`); a prompt without any scored image on
    one side is left out (`left_out`). An even number of scored images has the mean of its two middle scores as median.

    Args:
        policy_scores_PK: row p holds the scores of prompt p's images; NaN for a failed one.
        base_scores_PK: the same prompts, in the same order.

    Raises:
        ValueError: shapes that differ or are not (P, K), no scores, an infinite score, no prompt to compare.
    """
    policy_PK, base_PK = np.asarray(policy_scores_PK, np.float64), np.asarray(base_scores_PK, np.float64)
    if policy_PK.ndim != 2 or policy_PK.shape != base_PK.shape:
        raise ValueError(
            "a win rate needs two arrays of the same shape (prompts, images of a prompt), "
            f"not {policy_PK.shape} for the policy and {base_PK.shape} for the base"
        )
    if policy_PK.size == 0:
        raise ValueError(f"a win rate needs scores; there are none in arrays of shape {policy_PK.shape}")
    if np.isinf(policy_PK).any() or np.isinf(base_PK).any():
        raise ValueError("a score is infinite; a failed score is NaN")
    compared_P = np.isfinite(policy_PK).any(1) & np.isfinite(base_PK).any(1)
    prompts = int(compared_P.sum())
    if prompts == 0:
        raise ValueError(f"no prompt to compare: each of the {len(policy_PK)} lacks scored images on one side")
    difference_P = np.nanmedian(policy_PK[compared_P], axis=1) - np.nanmedian(base_PK[compared_P], axis=1)
    share = float(((np.sign(difference_P) + 1) / 2).mean())
    normal = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    return Interval(share, *_wilson(share, prompts, normal), prompts, len(policy_PK) - prompts)


def _paired(policy_scores: Scores, base_scores: Scores) -> tuple[Floats, Floats]:
    """Both sides; NaN where either failed."""
    policy_N, base_N = np.asarray(policy_scores, np.float64), np.asarray(base_scores, np.float64)
    if policy_N.shape != base_N.shape:
        raise ValueError(f"need the same images on both sides, not {len(policy_N)} and {len(base_N)}")
    if np.isinf(policy_N).any() or np.isinf(base_N).any():
        raise ValueError("a score is infinite; a failed score is NaN")
    failed_N = np.isnan(policy_N) | np.isnan(base_N)
    return np.where(failed_N, np.nan, policy_N), np.where(failed_N, np.nan, base_N)


def _scored_images(scores: Scores, groups: Groups) -> tuple[Floats, npt.NDArray[np.int64], int]:
    """Scores that did not fail, the number of each one's prompt (0 to P - 1), and how many failed."""
    given_N = np.asarray(scores, dtype=np.float64)
    if given_N.ndim != 1 or len(given_N) != len(groups):
        raise ValueError(f"need one prompt id a score; got scores of shape {given_N.shape} and {len(groups)} ids")
    if len(given_N) == 0:
        raise ValueError("no scores to summarise")
    for position, group in enumerate(groups):
        if group is None or group == "":
            raise ValueError(f"score {position} belongs to no prompt ({group!r}): is it padding of the last batch?")
    if np.isinf(given_N).any():
        raise ValueError(f"score {int(np.isinf(given_N).argmax())} is infinite; a failed score is NaN")
    kept_N = ~np.isnan(given_N)
    if not kept_N.any():
        raise ValueError(f"all {len(given_N)} scores failed: there is nothing to summarise")
    numbers: dict[Hashable, int] = {}
    prompt_N = [numbers.setdefault(group, len(numbers)) for group, kept in zip(groups, kept_N, strict=True) if kept]
    return given_N[kept_N], np.array(prompt_N, np.int64), int((~kept_N).sum())


def _clustered_mean(values_N: Floats, prompt_N: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Mean and its cluster-robust standard error; the error is NaN for a single prompt."""
    mean = float(values_N.mean())
    residual_P = np.bincount(prompt_N, weights=values_N - mean)
    prompts = len(residual_P)
    if prompts == 1:
        return mean, math.nan
    return mean, math.sqrt(prompts / (prompts - 1) * float(np.square(residual_P).sum())) / len(values_N)


def _student(prompt_N: npt.NDArray[np.int64]) -> float:
    prompts = int(prompt_N.max()) + 1
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, prompts - 1)) if prompts > 1 else math.nan


def _wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share of n draws."""
    shrink = 1 + quantile**2 / n
    centre = (share + quantile**2 / (2 * n)) / shrink
    half = quantile / shrink * math.sqrt(share * (1 - share) / n + quantile**2 / (4 * n**2))
    # Rounding alone could carry a bound past 0 or 1; NaN bounds (a single prompt) stay NaN.
    return (max(0.0, centre - half), min(1.0, centre + half)) if math.isfinite(half) else (math.nan, math.nan)
