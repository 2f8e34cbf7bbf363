"""Intervals against scipy, closed forms and a simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from kto_ray.evaluate.statistics import mean_interval, median_win_rate, pass_rate


def grouped(prompts: int, images: int) -> list[str]:
    return [f"prompt-{p}" for p in range(prompts) for _ in range(images)]


def test_mean_of_one_image_a_prompt_is_the_plain_t_interval() -> None:
    scores = np.random.default_rng(0).normal(0.4, 0.2, size=17)
    interval = mean_interval(scores, grouped(17, 1))
    low, high = stats.t.interval(0.95, 16, loc=scores.mean(), scale=stats.sem(scores))
    assert (interval.value, interval.low, interval.high) == pytest.approx((scores.mean(), low, high))
    assert (interval.used, interval.left_out) == (17, 0)


def test_mean_of_equal_groups_is_the_t_interval_of_the_prompt_means() -> None:
    scores_PK = np.random.default_rng(1).normal(size=(9, 4))
    interval = mean_interval(scores_PK.ravel(), grouped(9, 4))
    low, high = stats.t.interval(0.95, 8, loc=scores_PK.mean(), scale=stats.sem(scores_PK.mean(1)))
    assert (interval.low, interval.high) == pytest.approx((low, high))


@pytest.mark.parametrize("copies", [2, 7])
def test_copies_of_an_image_add_no_certainty(copies: int) -> None:
    scores = np.random.default_rng(2).uniform(size=12)
    groups = grouped(12, 1)
    repeated = np.repeat(scores, copies), [group for group in groups for _ in range(copies)]
    once, many = mean_interval(scores, groups), mean_interval(*repeated)
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
    once, many = pass_rate(scores, groups, 0.5), pass_rate(*repeated, 0.5)
    assert (many.low, many.high) == pytest.approx((once.low, once.high), rel=0.1)  # n - 1 against n in one variance


def test_the_order_of_images_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    scores, groups = rng.uniform(size=20), grouped(5, 4)
    order = rng.permutation(20)
    sorted_, shuffled = mean_interval(scores, groups), mean_interval(scores[order], [groups[i] for i in order])
    assert (shuffled.low, shuffled.high) == pytest.approx((sorted_.low, sorted_.high))


def test_intervals_cover_the_truth_although_images_of_a_prompt_agree() -> None:
    rng = np.random.default_rng(4)
    prompts, images, runs = 24, 5, 400
    groups = grouped(prompts, images)
    truth_share = 1 - stats.norm.cdf(0.5 / math.sqrt(2))
    covered_mean = covered_share = covered_naive = 0
    for _ in range(runs):
        # Half of the variance is the prompt's.
        scores = (rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, images))).ravel()
        mean, share = mean_interval(scores, groups), pass_rate(scores, groups, 0.5)
        covered_mean += mean.low <= 0 <= mean.high
        covered_share += share.low <= truth_share <= share.high
        covered_naive += abs(scores.mean()) <= 1.96 * stats.sem(scores)
    assert 0.92 <= covered_mean / runs <= 0.98
    assert 0.92 <= covered_share / runs <= 0.99
    assert covered_naive / runs < 0.85  # what taking images for independent draws would have given


def test_pass_rate_counts_the_threshold_itself() -> None:
    assert pass_rate([0.5, 0.49, 0.51, 0.0], ["a", "b", "c", "d"], 0.5).value == 0.5


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_pass_rate_at_the_edge_keeps_its_width(score: float) -> None:
    interval = pass_rate([score] * 60, grouped(20, 3), 0.5)
    quantile = stats.t.ppf(0.975, 19)
    width = quantile**2 / (20 + quantile**2)  # Wilson at 0 or n of n: q^2 / (n + q^2), n = the 20 prompts
    assert interval.high - interval.low == pytest.approx(width)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_pass_rate_of_prompts_that_all_agree_is_capped_at_the_images() -> None:
    interval = pass_rate([0.0, 1.0] * 30, grouped(30, 2), 0.5)
    quantile = stats.t.ppf(0.975, 29)
    half = quantile / (1 + quantile**2 / 60) * math.sqrt(0.25 / 60 + quantile**2 / (4 * 60**2))
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_failed_scores_are_dropped_and_counted() -> None:
    whole = mean_interval([0.1, 0.9, 0.4, 0.6], ["a", "a", "b", "c"])
    holed = mean_interval([0.1, math.nan, 0.9, 0.4, None, 0.6], ["a", "a", "a", "b", "d", "c"])
    assert (holed.value, holed.low, holed.high) == (whole.value, whole.low, whole.high)
    assert (holed.used, holed.left_out) == (4, 2)
    assert pass_rate([1.0, math.nan, 0.0], ["a", "b", "c"], 0.5).value == 0.5


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    for interval in (mean_interval([0.2, 0.6], ["a", "a"]), pass_rate([0.2, 0.6], ["a", "a"], 0.5)):
        assert interval.value in (0.4, 0.5)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


@pytest.mark.parametrize(
    ("scores", "groups", "complaint"),
    [
        ([], [], "no scores"),
        ([0.5, 0.5], ["a"], "one prompt id a score"),
        ([[0.5, 0.5]], ["a"], "shape"),
        ([math.nan, None], ["a", "b"], "all 2 scores failed"),
        ([0.5, math.inf], ["a", "b"], "score 1 is infinite"),
        ([0.5, 0.5], ["a", ""], "score 1 belongs to no prompt"),
        ([0.5, 0.5], [None, "a"], "padding"),
    ],
)
def test_input_that_cannot_be_summarised_is_refused(scores: list[float], groups: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mean_interval(scores, groups)
    with pytest.raises(ValueError, match=complaint):
        pass_rate(scores, groups, 0.5)


def test_pass_rate_refuses_a_threshold_that_is_none() -> None:
    with pytest.raises(ValueError, match="threshold"):
        pass_rate([0.5], ["a"], math.nan)


@pytest.mark.parametrize(("wins", "prompts"), [(0, 8), (5, 8), (43, 50), (8, 8)])
def test_win_rate_agrees_with_scipy(wins: int, prompts: int) -> None:
    base_PK = np.tile(np.linspace(0, 1, 5), (prompts, 1))
    policy_PK = base_PK + np.where(np.arange(prompts) < wins, 0.1, -0.1)[:, None]
    interval = median_win_rate(policy_PK, base_PK)
    expected = stats.binomtest(wins, prompts).proportion_ci(method="wilson")
    assert (interval.value, interval.low, interval.high) == pytest.approx((wins / prompts, expected.low, expected.high))
    assert (interval.used, interval.left_out) == (prompts, 0)


def test_win_rate_compares_medians_not_means() -> None:
    assert median_win_rate(np.array([[0.6, 0.6, 0.0]]), np.array([[0.5, 0.5, 9.0]])).value == 1


def test_win_rate_counts_a_tie_half() -> None:
    assert median_win_rate(np.array([[0.5], [0.9], [0.1], [0.9]]), np.full((4, 1), 0.5)).value == pytest.approx(2.5 / 4)


def test_win_rate_leaves_out_prompts_without_scores_and_images_that_failed() -> None:
    nan = math.nan
    policy_PK = np.array([[nan, nan, nan], [nan, 0.9, 0.8], [0.1, 0.2, 0.3], [1, 1, 1]])
    base_PK = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [nan, nan, 0.5], [nan, nan, nan]])
    interval = median_win_rate(policy_PK, base_PK)
    assert (interval.value, interval.used, interval.left_out) == (0.5, 2, 2)


@pytest.mark.parametrize(
    ("policy", "base", "complaint"),
    [
        (np.ones((2, 3)), np.ones((2, 5)), "same shape"),
        (np.ones(3), np.ones(3), r"\(prompts, images of a prompt\)"),
        (np.ones((0, 5)), np.ones((0, 5)), "there are none"),
        (np.ones((2, 0)), np.ones((2, 0)), "there are none"),
        (np.full((2, 5), np.inf), np.ones((2, 5)), "infinite"),
        (np.full((2, 5), np.nan), np.ones((2, 5)), "no prompt to compare"),
    ],
)
def test_win_rate_refuses_what_it_cannot_compare(policy: np.ndarray, base: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        median_win_rate(policy, base)
