"""Intervals against scipy, closed forms and a simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from kto_ray.evaluate.statistics import (
    mean_difference,
    mean_interval,
    median_win_rate,
    pass_rate,
    pass_rate_difference,
)


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


# -- differences ------------------------------------------------------------------------------------------------------


def test_a_mean_difference_is_the_paired_t_interval_of_the_prompt_means() -> None:
    rng = np.random.default_rng(5)
    policy_PK, base_PK = rng.normal(0.3, 1, (11, 4)), rng.normal(size=(11, 4))
    found = mean_difference(policy_PK.ravel(), base_PK.ravel(), grouped(11, 4))
    expected = stats.ttest_rel(policy_PK.mean(1), base_PK.mean(1)).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(policy_PK.mean() - base_PK.mean())


def alike_pairs(rng: np.random.Generator, prompts: int, images: int) -> tuple[list[float], list[float]]:
    """Scores of policy and base that share prompt and seed; the policy's are higher by 0.4."""
    shared = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, images))
    sides = (shared + shift + rng.normal(scale=0.5, size=(prompts, images)) for shift in (0.4, 0.0))
    policy, base = (side.ravel().tolist() for side in sides)
    return policy, base


def test_differences_agree_with_a_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(6)
    policy, base = alike_pairs(rng, 200, 5)
    groups = grouped(200, 5)
    for found, threshold in (
        (mean_difference(policy, base, groups), None),
        (pass_rate_difference(policy, base, groups, 0.5), 0.5),
    ):
        sides = [np.array(side) if threshold is None else np.array(side) >= threshold for side in (policy, base)]
        prompt_P = (sides[0].astype(float) - sides[1]).reshape(200, 5).mean(1)
        expected = stats.bootstrap((prompt_P,), np.mean, random_state=rng, n_resamples=4000).confidence_interval
        assert found.value == pytest.approx(prompt_P.mean())
        width = expected.high - expected.low
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.08 * width)


def test_differences_cover_the_truth_and_are_narrower_than_the_two_sides_apart() -> None:
    rng = np.random.default_rng(7)
    prompts, images, runs = 24, 5, 400
    groups, spread = grouped(prompts, images), math.sqrt(2.25)
    truth = stats.norm.sf((0.5 - 0.4) / spread) - stats.norm.sf(0.5 / spread)
    covered_mean = covered_share = narrower = 0
    for _ in range(runs):
        policy, base = alike_pairs(rng, prompts, images)
        mean, share = mean_difference(policy, base, groups), pass_rate_difference(policy, base, groups, 0.5)
        covered_mean += mean.low <= 0.4 <= mean.high
        covered_share += share.low <= truth <= share.high
        apart = [pass_rate(side, groups, 0.5) for side in (policy, base)]
        narrower += share.high - share.low < sum(interval.high - interval.low for interval in apart) / math.sqrt(2)
    assert 0.92 <= covered_mean / runs <= 0.98
    assert 0.92 <= covered_share / runs <= 0.99
    assert narrower / runs > 0.99


def test_a_difference_of_all_and_none_keeps_its_width_and_stays_within_one() -> None:
    found = pass_rate_difference([1.0] * 40, [0.0] * 40, grouped(20, 2), 0.5)
    assert found.value == found.high == 1
    reach = pass_rate([1.0] * 40, grouped(20, 2), 0.5).low  # both sides reach as far, and are independent
    assert found.low == pytest.approx(1 - math.sqrt(2) * (1 - reach))


def test_a_difference_turned_round_is_its_mirror_image() -> None:
    policy, base = alike_pairs(np.random.default_rng(8), 12, 3)
    there = pass_rate_difference(policy, base, grouped(12, 3), 0.5)
    back = pass_rate_difference(base, policy, grouped(12, 3), 0.5)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_images_that_failed_on_either_side_are_left_out_of_a_difference() -> None:
    policy, base = [1.0, None, 0.0, 0.8, 0.2], [0.0, 0.9, math.nan, 0.1, 0.6]
    for found in (
        mean_difference(policy, base, ["a", "a", "b", "b", "c"]),
        pass_rate_difference(policy, base, ["a", "a", "b", "b", "c"], 0.5),
    ):
        assert (found.used, found.left_out) == (3, 2)
    assert mean_difference(policy, base, ["a", "a", "b", "b", "c"]).value == pytest.approx((1 + 0.7 - 0.4) / 3)
    assert pass_rate_difference(policy, base, ["a", "a", "b", "b", "c"], 0.5).value == pytest.approx((1 + 1 - 1) / 3)


def test_a_difference_of_one_prompt_has_no_interval() -> None:
    for found in (mean_difference([1, 0], [0, 0], ["a", "a"]), pass_rate_difference([1, 0], [0, 0], ["a", "a"], 0.5)):
        assert found.value == 0.5
        assert math.isnan(found.low)
        assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("policy", "base", "complaint"),
    [([1.0], [1.0, 2.0], "the same images"), ([math.inf], [math.inf], "infinite"), ([None], [1.0], "all 1 scores")],
)
def test_what_cannot_be_paired_is_refused(policy: list[float], base: list[float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mean_difference(policy, base, ["a"] * len(policy))
    with pytest.raises(ValueError, match=complaint):
        pass_rate_difference(policy, base, ["a"] * len(policy), 0.5)


# -- win rate ---------------------------------------------------------------------------------------------------------


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
