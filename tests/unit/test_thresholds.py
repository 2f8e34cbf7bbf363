"""Thresholds against counting in sorted lists, running means against their closed form, votes against tallies."""

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from kto_ray.verdicts.rule import SUM, RuleFit, ScoreTable, VerdictRule, Voter
from kto_ray.verdicts.thresholds import (
    EVERY,
    Absolute,
    Agreement,
    Combination,
    Majority,
    PromptQuantile,
    RoundQuantile,
    RunningMean,
    Threshold,
    TopBottom,
    WeightedSum,
    as_combination,
    as_threshold,
)

modestly = settings(deadline=None, max_examples=60)

NAN = float("nan")
YES, NO, ABSTAIN, FAILED = "desirable", "undesirable", "abstain", "failed"
AnyThreshold = Absolute | RoundQuantile | PromptQuantile | TopBottom | RunningMean

percent = st.integers(1, 99).map(lambda n: Fraction(n, 100))


def all_the_same(scores: Sequence[float]) -> bool:
    """But for rounding."""
    return not scores or math.isclose(min(scores), max(scores), rel_tol=1e-6)


tied = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20)
any_scores = tied | st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)
thresholds: list[AnyThreshold] = [
    Absolute(value=0.5, dead_band=1),
    RoundQuantile(quantile=0.7),
    RoundQuantile(quantile=0.4, dead_band=0.2),
    PromptQuantile(quantile=0.5),
    TopBottom(top=0.25, bottom=0.5),
    RunningMean(z=0.5, dead_band=0.25),
]


def table(*rows: Sequence[float], prompts: Sequence[str] | None = None) -> ScoreTable:
    return ScoreTable(np.array(rows, np.float64), prompts or ["p"] * len(rows[0]))


def alone(threshold: AnyThreshold) -> VerdictRule:
    return VerdictRule([Voter("taste")], WeightedSum(), threshold)


def labels(threshold: AnyThreshold, scores: Sequence[float], prompts: Sequence[str] | None = None) -> list[str]:
    rule, scored = alone(threshold), table(scores, prompts=prompts)
    return list(rule.judge(scored, rule.fit(scored)).labels)


def again(fit: RuleFit) -> RuleFit:
    """After a restart."""
    return RuleFit.from_json(json.loads(json.dumps(fit.to_json(), allow_nan=False)))


def gaps(scores: Sequence[float]) -> list[int]:
    """How many of the scores can be told from the others as the lower ones: equal ones stay together."""
    ordered = sorted(scores)
    return [k for k in range(1, len(ordered)) if ordered[k - 1] < ordered[k]]


def by_rank(scores: Sequence[float], low: Fraction, high: Fraction) -> list[str]:
    """The lower ones are undesirable up to the gap nearest to a share `low`, desirable from that nearest to `high`."""
    if all_the_same(scores):
        return [ABSTAIN] * len(scores)
    bounds = [min(gaps(scores), key=lambda k: (abs(k - share * len(scores)), k)) for share in (low, high)]
    ranks = [sum(other < score for other in scores) for score in scores]
    return [NO if rank < bounds[0] else YES if rank >= bounds[1] else ABSTAIN for rank in ranks]


# -- one threshold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "dead_band", "label"),
    [
        (0.5, 0, YES),
        (math.nextafter(0.5, 0), 0, NO),
        (1.0, 0, YES),
        (-3.0, 0, NO),
        (0.5, 0.25, ABSTAIN),
        (math.nextafter(0.75, 0), 0.25, ABSTAIN),
        (math.nextafter(0.25, 1), 0.25, ABSTAIN),
        (0.75, 0.25, YES),
        (0.25, 0.25, NO),
    ],
)
def test_an_absolute_dead_band_is_in_units_of_the_score(score: float, dead_band: float, label: str) -> None:
    assert labels(Absolute(value=0.5, dead_band=dead_band), [score]) == [label]


@modestly
@given(any_scores, percent)
def test_a_round_quantile_counts(scores: list[float], quantile: Fraction) -> None:
    assert labels(RoundQuantile(quantile=float(quantile)), scores) == by_rank(scores, quantile, quantile)


@modestly
@given(any_scores, percent, st.integers(0, 49).map(lambda n: Fraction(n, 100)))
def test_its_dead_band_is_a_share_of_the_round(scores: list[float], quantile: Fraction, band: Fraction) -> None:
    threshold = RoundQuantile(quantile=float(quantile), dead_band=float(band))
    assert labels(threshold, scores) == by_rank(scores, quantile - band, quantile + band)


@modestly
@given(st.lists(st.integers(-(10**6), 10**6).map(float), min_size=2, max_size=40, unique=True))
def test_half_of_a_round_lies_above_its_median(scores: list[float]) -> None:
    assume(len(scores) % 2 == 0)
    above = np.array(scores) > np.median(scores)
    assert [label == YES for label in labels(RoundQuantile(), scores)] == above.tolist()


@modestly
@given(any_scores, percent, percent)
@example([1.0, 2.0, 3.0, 4.0, 5.0], Fraction(7, 10), Fraction(3, 10))  # 1 - 0.7 is not quite 0.3
def test_top_and_bottom_count(scores: list[float], top: Fraction, bottom: Fraction) -> None:
    assume(top + bottom <= 1)
    threshold = TopBottom(top=float(top), bottom=float(bottom))
    assert labels(threshold, scores) == by_rank(scores, bottom, 1 - top)


@modestly
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2).map(float)), min_size=1, max_size=20),
    percent,
    st.sampled_from([Fraction(0), Fraction(1, 5)]),
)
def test_a_prompt_quantile_is_a_round_quantile_of_each_prompt(
    rows: list[tuple[str, float]], quantile: Fraction, band: Fraction
) -> None:
    prompts, scores = [prompt for prompt, _ in rows], [score for _, score in rows]
    threshold = PromptQuantile(quantile=float(quantile), dead_band=float(band))
    found = labels(threshold, scores, prompts)
    for prompt in set(prompts):
        mine = [score for other, score in rows if other == prompt]
        expected = by_rank(mine, quantile - band, quantile + band)
        assert [label for label, other in zip(found, prompts, strict=True) if other == prompt] == expected


@pytest.mark.parametrize(("scores", "found"), [([1, 1, 1, 1], [ABSTAIN] * 4), ([0, 0, 0, 1], [NO, NO, NO, YES])])
@pytest.mark.parametrize("threshold", [RoundQuantile(), PromptQuantile(), TopBottom(), TopBottom(top=0.3, bottom=0.3)])
def test_ties_stay_together_and_what_is_all_the_same_is_not_judged(
    threshold: AnyThreshold, scores: list[float], found: list[str]
) -> None:
    assert labels(threshold, scores) == found


def test_the_middle_of_an_odd_round_is_desirable() -> None:
    assert labels(RoundQuantile(), [3, 1, 2]) == [YES, NO, YES]


ROUNDING = np.random.default_rng(0).uniform(-1e-9, 1e-9, 64)
COMPARING = [threshold for threshold in thresholds if threshold.compares != "nothing"]


@pytest.mark.parametrize("threshold", COMPARING, ids=str)
def test_scores_that_differ_by_rounding_only_are_judged_as_the_same(threshold: AnyThreshold) -> None:
    """A collapsed policy, or a saturated scorer, whose batches add up in another order."""
    assert labels(threshold, (0.7 + ROUNDING).tolist()) == labels(threshold, [0.7] * 64)


def test_a_prompt_whose_images_differ_by_rounding_only_is_not_judged() -> None:
    scores, prompts = [0.3, 0.3 + 1e-9, 0.9, 0.9 + 1e-9, 0.1, 0.2], [*"aabbcc"]
    assert labels(PromptQuantile(), scores, prompts) == [ABSTAIN] * 4 + [NO, YES]
    # Alike within their prompts only, they are as far apart as ever within the round.
    assert labels(RoundQuantile(), scores, prompts) == [NO, YES, YES, YES, NO, NO]


@pytest.mark.parametrize("threshold", [RoundQuantile(), PromptQuantile(), TopBottom()], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_a_small_spread_is_still_one(threshold: AnyThreshold, size: float) -> None:
    assert labels(threshold, [size, size * (1 + 1e-5)]) == [NO, YES]


@pytest.mark.parametrize("calibration", ["round", "running"])
def test_a_scorer_that_says_nothing_but_rounding_decides_nothing(calibration: Any) -> None:
    rule = VerdictRule([Voter("real"), Voter("saturated")], WeightedSum(calibration=calibration), RoundQuantile())
    real = np.random.default_rng(1).integers(0, 5, 64).astype(float).tolist()  # with ties, which it must not break
    noisy, constant = table(real, (0.7 + ROUNDING).tolist()), table(real, [0.7] * 64)
    fit = rule.fit(noisy)
    assert rule.judge(noisy, fit).labels == rule.judge(constant, rule.fit(constant)).labels
    assert rule.judge(noisy, rule.fit(noisy, fit)).labels == rule.judge(noisy, fit).labels


@pytest.mark.parametrize("combine", [WeightedSum(), WeightedSum(calibration="round"), Majority()])
def test_rounding_cannot_be_widened(combine: Any) -> None:
    rule, scored = VerdictRule([Voter("taste")], combine, Absolute(value=0.5)), table((0.7 + ROUNDING).tolist())
    assert rule.widened(scored, rule.fit(scored)) is None


@pytest.mark.parametrize("threshold", thresholds, ids=str)
class TestEveryThreshold:
    @modestly
    @given(scores=any_scores, data=st.data())
    def test_failed_scores_do_not_count(
        self, threshold: AnyThreshold, scores: list[float], data: st.DataObject
    ) -> None:
        holes = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
        mixed = [
            value for score, hole in zip(scores, holes, strict=True) for value in ([NAN, score] if hole else [score])
        ]
        found = labels(threshold, mixed)
        assert [label == FAILED for label in found] == [math.isnan(score) for score in mixed]
        assert [label for label in found if label != FAILED] == labels(threshold, scores)

    def test_all_may_have_failed(self, threshold: AnyThreshold) -> None:
        assert labels(threshold, [NAN, NAN]) == [FAILED, FAILED]

    def test_nothing_is_judged_too(self, threshold: AnyThreshold) -> None:
        assert labels(threshold, []) == []

    @modestly
    @given(scores=any_scores)
    def test_more_is_never_worse(self, threshold: AnyThreshold, scores: list[float]) -> None:
        goodness = [[NO, ABSTAIN, YES].index(label) for label in labels(threshold, sorted(scores))]
        assert goodness == sorted(goodness)

    @modestly
    @given(scores=any_scores, seed=st.integers(0, 99))
    def test_the_order_of_samples_does_not_matter(
        self, threshold: AnyThreshold, scores: list[float], seed: int
    ) -> None:
        assume(not isinstance(threshold, RunningMean) or all(score == round(score) for score in scores))  # rounding
        order = np.random.default_rng(seed).permutation(len(scores)).tolist()
        found = labels(threshold, scores)
        assert labels(threshold, [scores[place] for place in order]) == [found[place] for place in order]

    @modestly
    @given(scores=any_scores)
    def test_its_fit_survives_a_restart(self, threshold: AnyThreshold, scores: list[float]) -> None:
        fit = alone(threshold).fit(table(scores))
        assert again(fit) == fit

    def test_it_survives_json(self, threshold: AnyThreshold) -> None:
        assert TypeAdapter(Threshold).validate_python(threshold.model_dump(mode="json")) == threshold


# -- the running mean -------------------------------------------------------------------------------------------------


def closed_form(rounds: Sequence[Sequence[float]], decay: float) -> tuple[float, float]:
    """Mean and std over the rounds with scores: weight decay^R for round 0, (1 - decay) decay^(R - i) for round i."""
    scored = [scores for scores in rounds if scores]
    last = len(scored) - 1
    weights = [decay**last] + [(1 - decay) * decay ** (last - i) for i in range(1, last + 1)]
    means, variances = map(statistics.fmean, scored), map(statistics.pvariance, scored)
    mean = sum(weight * value for weight, value in zip(weights, means, strict=True))
    variance = sum(weight * value for weight, value in zip(weights, variances, strict=True))
    return mean, math.sqrt(variance)


rounds_of_scores = st.lists(
    st.lists(st.floats(-100, 100), max_size=6).filter(lambda scores: len(set(scores)) < 2 or not all_the_same(scores)),
    min_size=1,
    max_size=6,
)


@modestly
@given(rounds_of_scores, st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.5]))
@example([[], [1.0, 2.0], [], [5.0]], 0.9, 0.0)
def test_the_running_mean_is_its_closed_form_over_rounds_and_restarts(
    rounds: list[list[float]], decay: float, dead_band: float
) -> None:
    assume(any(rounds))
    rule = alone(RunningMean(z=1.5, decay=decay, dead_band=dead_band))
    last = None
    for scores in rounds:
        fit = rule.fit(table([*scores, NAN]), last)
        last = again(fit)
    mean, std = closed_form(rounds, decay)
    cut = (mean + (1.5 - dead_band) * std, mean + (1.5 + dead_band) * std)
    assert fit.fits[SUM].cuts[EVERY] == pytest.approx(cut, abs=1e-6)


def test_the_running_mean_moves_slowly() -> None:
    rule = alone(RunningMean(decay=0.5))
    first = rule.fit(table([0, 2]))
    second = rule.fit(table([4, 6]), first)
    assert rule.judge(table([0.9, 1]), first).labels == [NO, YES]
    assert rule.judge(table([2.9, 3]), second).labels == [NO, YES]


def test_a_round_without_scores_leaves_the_running_mean_where_it_was() -> None:
    rule = alone(RunningMean())
    first = rule.fit(table([0, 2]))
    assert rule.fit(table([NAN, NAN]), first) == first


# -- several scorers --------------------------------------------------------------------------------------------------


def z_scores(values: Sequence[float]) -> list[float]:
    mean, std = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / (std or 1) for value in values]


pairs = st.lists(st.tuples(st.floats(-100, 100), st.integers(-5, 5).map(float)), min_size=1, max_size=12)


@modestly
@given(pairs)
def test_a_fixed_sum_takes_each_scorer_in_its_own_measure(rows: list[tuple[float, float]]) -> None:
    voters = [Voter("a", weight=2, mean=10, std=4), Voter("b", weight=0.5, std=0.1)]
    rule, scored = VerdictRule(voters, WeightedSum(), Absolute(value=3)), table(*zip(*rows, strict=True))
    judged = rule.judge(scored, rule.fit(scored))
    expected = [2 * (a - 10) / 4 + 0.5 * b / 0.1 for a, b in rows]
    assert judged.values_N.tolist() == pytest.approx(expected)
    assert judged.labels == [YES if value >= 3 else NO for value in judged.values_N]


@modestly
@given(pairs)
@example([(3.2, 0.0), (3.2, 1.0), (3.2, 0.0)])  # three times 3.2 by three is not quite 3.2
def test_a_round_calibrated_sum_takes_standard_scores(rows: list[tuple[float, float]]) -> None:
    first, second = zip(*rows, strict=True)
    assume((np.std(first) > 1e-6 and not all_the_same(first)) or len(set(first)) == 1)
    rule = VerdictRule([Voter("a"), Voter("b", weight=3)], WeightedSum(calibration="round"), RoundQuantile())
    scored = table(first, second)
    # What came before does not matter.
    judged = rule.judge(scored, rule.fit(scored, rule.fit(table([50, 70], [-3, 0]))))
    expected = [a + 3 * b for a, b in zip(z_scores(first), z_scores(second), strict=True)]
    assert judged.values_N.tolist() == pytest.approx(expected, abs=1e-6)


@modestly
@given(rounds_of_scores, st.sampled_from([0.0, 0.3, 0.9]))
@example([[], [1.0, 2.0]], 0.9)
@example([[3.0, 3.0], [1.0, 2.0]], 0.9)
def test_a_running_calibration_is_its_closed_form_over_rounds_and_restarts(
    rounds: list[list[float]], decay: float
) -> None:
    assume(any(rounds))
    combine = WeightedSum(calibration="running", decay=decay)
    rule = VerdictRule([Voter("a"), Voter("b")], combine, Absolute(value=0))
    last = None
    for scores in rounds:
        last = again(rule.fit(table([*scores, NAN], [*(-2 * score for score in scores), NAN]), last))
    assert last is not None
    mean, std = closed_form(rounds, decay)
    assert last.calibration["a"] == pytest.approx({"mean": mean, "std": std}, abs=1e-6)
    assert last.calibration["b"] == pytest.approx({"mean": -2 * mean, "std": 2 * std}, abs=1e-6)


@pytest.mark.parametrize("calibration", ["fixed", "round", "running"])
def test_a_scorer_that_says_the_same_of_all_or_nothing_at_all_does_not_break_the_sum(calibration: Any) -> None:
    rule = VerdictRule([Voter("a"), Voter("b")], WeightedSum(calibration=calibration), RoundQuantile())
    same = table([5, 5, 5], [1, 2, 3])
    assert rule.judge(same, rule.fit(same)).labels == [NO, YES, YES]
    silent = table([NAN, NAN], [1, 2])
    assert rule.judge(silent, rule.fit(silent)).labels == [FAILED, FAILED]


def test_scores_on_other_scales_weigh_the_same_once_calibrated() -> None:
    scored = table([0, 1, 0, 1], [0, 0, 1000, 1000])
    for calibration, found in (("fixed", [NO, NO, YES, YES]), ("round", [NO, NO, NO, YES])):
        rule = VerdictRule(
            [Voter("a", weight=1.5), Voter("b")],
            TypeAdapter(Combination).validate_python({"calibration": calibration}),
            TopBottom(top=0.25, bottom=0.75) if calibration == "round" else RoundQuantile(),
        )
        assert rule.judge(scored, rule.fit(scored)).labels == found


VOTES = list(itertools.product((-1, 0, 1), repeat=3))
VOTING = [Voter(name, threshold=Absolute(value=0, dead_band=0.5)) for name in "abc"]


def tally(combine: Agreement | Majority) -> list[str]:
    """The verdicts on every combination of three votes: scores of -1, 0, 1 are no, abstention, yes."""
    rule, scored = VerdictRule(VOTING, combine, Absolute(value=99)), table(*zip(*VOTES, strict=True))
    return list(rule.judge(scored, rule.fit(scored)).labels)


def test_agreement_is_unanimity() -> None:
    unanimous = {(1, 1, 1): YES, (-1, -1, -1): NO}
    assert tally(Agreement()) == [unanimous.get(votes, ABSTAIN) for votes in VOTES]


def test_a_majority_counts_votes_but_no_abstentions() -> None:
    counts = [(votes.count(1), votes.count(-1)) for votes in VOTES]
    assert tally(Majority()) == [YES if yes > no else NO if no > yes else ABSTAIN for yes, no in counts]


@pytest.mark.parametrize("combine", [Agreement(), Majority(), WeightedSum(), WeightedSum(calibration="round")])
@pytest.mark.parametrize("missing", [0, 1])
def test_without_the_score_of_every_voter_a_sample_has_failed(combine: Any, missing: int) -> None:
    rows = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    rows[missing][2] = NAN
    rule, scored = VerdictRule([Voter("a"), Voter("b")], combine, Absolute(value=2)), table(*rows)
    judged = rule.judge(scored, rule.fit(scored))
    assert [label == FAILED for label in judged.labels] == [False, False, True]
    assert np.isnan(judged.values_N).tolist() == [False, False, True]


def test_voters_have_their_own_threshold_or_the_common_one() -> None:
    voters = [Voter("a", threshold=Absolute(value=10)), Voter("b")]
    rule, scored = VerdictRule(voters, Agreement(), Absolute(value=1)), table([9, 11, 11], [0, 0, 2])
    assert rule.judge(scored, rule.fit(scored)).labels == [NO, ABSTAIN, YES]


def test_the_value_of_a_vote_is_the_share_of_yes() -> None:
    rule, scored = VerdictRule(VOTING, Majority(), Absolute(value=0)), table([1, 1, -1], [1, 0, -1], [1, -1, 0])
    assert rule.judge(scored, rule.fit(scored)).values_N.tolist() == pytest.approx([1, 1 / 3, 0])


def test_a_voter_who_cannot_judge_a_prompt_abstains() -> None:
    scored = table([1, 1, 0, 5], [1, 1, 0, 5], prompts=["same", "same", "other", "other"])
    for combine, found in ((Agreement(), ABSTAIN), (Majority(), NO)):
        rule = VerdictRule([Voter("a", threshold=PromptQuantile()), Voter("b")], combine, Absolute(value=2))
        assert rule.judge(scored, rule.fit(scored)).labels == [found, found, NO, YES]


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (0.7, Absolute(value=0.7)),
        (3, Absolute(value=3)),
        ({"value": 1, "dead_band": 2}, Absolute(value=1, dead_band=2)),
        ("round_quantile", RoundQuantile()),
        ({"kind": "top_bottom", "top": 0.1}, TopBottom(top=0.1)),
    ],
)
def test_short_forms_of_a_threshold(value: Any, known: AnyThreshold) -> None:
    assert TypeAdapter(Threshold).validate_python(value) == known
    assert TypeAdapter(Threshold).validate_python(as_threshold(as_threshold(value))) == known


@pytest.mark.parametrize(
    ("value", "known"),
    [("majority", Majority()), ({"decay": 0.5}, WeightedSum(decay=0.5)), ({"kind": "agreement"}, Agreement())],
)
def test_short_forms_of_a_combination(value: Any, known: Any) -> None:
    assert TypeAdapter(Combination).validate_python(value) == known
    assert TypeAdapter(Combination).validate_python(as_combination(as_combination(value))) == known


@pytest.mark.parametrize(
    ("kind", "settings_", "said"),
    [
        (RoundQuantile, {"quantile": 0}, "greater than 0"),
        (PromptQuantile, {"quantile": 1}, "less than 1"),
        (RoundQuantile, {"dead_band": 0.5}, "less than 0.5"),
        (Absolute, {"value": 1, "dead_band": -1}, "greater than or equal to 0"),
        (TopBottom, {"top": 0.7, "bottom": 0.4}, r"top \(0.7\) and bottom \(0.4\) together"),
        (RunningMean, {"decay": 1.1}, "less than or equal to 1"),
    ],
)
def test_shares_are_shares(kind: type[AnyThreshold], settings_: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        kind(**settings_)


# -- widened ----------------------------------------------------------------------------------------------------------

combinations: list[WeightedSum | Agreement | Majority] = [
    WeightedSum(),
    WeightedSum(calibration="round"),
    Agreement(),
    Majority(),
]


@pytest.mark.parametrize("combine", combinations, ids=str)
@modestly
@given(scores=tied, holes=st.lists(st.booleans(), min_size=20, max_size=20))
def test_widened_has_both_classes_as_even_as_ties_allow(combine: Any, scores: list[float], holes: list[bool]) -> None:
    rule = VerdictRule([Voter("a")], combine, Absolute(value=1e9))
    scored = table([NAN if hole else score for score, hole in zip(scores, holes, strict=False)])
    there = [score for score in scored.values_SN[0] if not math.isnan(score)]
    widened = rule.widened(scored, rule.fit(scored))
    if not gaps(there):
        assert widened is None
        return
    assert widened is not None
    found = Counter(rule.judge(scored, widened).labels)
    assert found[FAILED] + found[YES] + found[NO] == len(scored.values_SN[0])
    assert min(found[YES], found[NO]) == max(min(below, len(there) - below) for below in gaps(there)) > 0


def test_widened_votes_go_by_the_sum_of_standard_scores_and_a_sum_by_itself() -> None:
    scored = table([0, 1, 0, 1], [0, 0, 1000, 1000])
    voters = [Voter("a", weight=2), Voter("b")]
    for combine, found in ((Agreement(), [NO, YES, NO, YES]), (WeightedSum(), [NO, NO, YES, YES])):
        rule = VerdictRule(voters, combine, Absolute(value=1e9))
        widened = rule.widened(scored, rule.fit(scored))
        assert widened is not None
        assert rule.judge(scored, widened).labels == found


# -- flips ------------------------------------------------------------------------------------------------------------


@modestly
@given(
    st.lists(st.tuples(st.integers(-5, 5).map(float), st.booleans()), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=12, unique=True),
)
def test_flips_are_the_verdicts_that_the_last_cut_would_have_given_otherwise(
    rows: list[tuple[float, bool]], before: list[float]
) -> None:
    rule = alone(RoundQuantile())
    scored, last = table([score if there else NAN for score, there in rows]), rule.fit(table(before))
    now, then = (rule.judge(scored, fit).labels for fit in (rule.fit(scored, last), last))
    differ = [a != b for a, b, (_, there) in zip(now, then, rows, strict=True) if there]
    assert rule.flip_rate(scored, rule.fit(scored, last), last) == (statistics.fmean(differ) if differ else None)


def test_a_known_flip_rate() -> None:
    rule = alone(RoundQuantile())
    last = rule.fit(table([0, 1, 2, 3]))  # yes from 2
    scored = table([1, 2, 3, 4, 5, NAN])  # yes from 3
    assert rule.flip_rate(scored, rule.fit(scored), last) == pytest.approx(1 / 5)


def test_what_the_last_cuts_do_not_judge_cannot_flip() -> None:
    rule = alone(PromptQuantile())
    last = rule.fit(table([0, 1, 0, 1], prompts=["a", "a", "b", "b"]))
    scored = table([1, 2, 1, 2], prompts=["b", "b", "c", "c"])
    assert rule.flip_rate(scored, rule.fit(scored), last) == 0.5  # the 1 of prompt b
    assert rule.flip_rate(scored, rule.fit(scored), rule.fit(table([NAN]))) is None
    both = VerdictRule([Voter("a"), Voter("b")], Agreement(), PromptQuantile())
    scored = table([0, 1], [0, 1])
    assert both.flip_rate(scored, both.fit(scored), both.fit(table([0, 1], [1, 1]))) is None


# -- words ------------------------------------------------------------------------------------------------------------


def words(rule: VerdictRule, scored: ScoreTable) -> list[str]:
    return rule.judge(scored, rule.fit(scored)).rules


@pytest.mark.parametrize(
    ("threshold", "text"),
    [
        (Absolute(value=0.5), "absolute@1(value=0.5, dead_band=0): taste >= 0.5"),
        (Absolute(value=2, dead_band=1), "absolute@1(value=2, dead_band=1): taste >= 3, <= 1"),
        (RoundQuantile(quantile=0.75), "round_quantile@2(quantile=0.75, dead_band=0): taste >= 4"),
        (TopBottom(top=0.25, bottom=0.5), "top_bottom@2(top=0.25, bottom=0.5): taste >= 4, <= 2"),
        (RunningMean(), "running_mean@2(z=0, decay=0.9, dead_band=0): taste >= 2.5"),
    ],
)
def test_every_verdict_carries_its_rule_with_version_parameters_and_cut(threshold: AnyThreshold, text: str) -> None:
    assert words(alone(threshold), table([1, 2, 3, 4])) == [text] * 4


def test_each_prompt_has_its_own_cut_or_none() -> None:
    scored = table([1, 2, 3, 3], prompts=["a", "a", "b", "b"])
    head = "prompt_quantile@2(quantile=0.5, dead_band=0): taste"
    assert words(alone(PromptQuantile()), scored) == [f"{head} >= 2"] * 2 + [f"{head}: no cut"] * 2


def test_a_sum_is_written_out() -> None:
    voters = [Voter("a", weight=2, mean=5, std=0.5), Voter("b")]
    rule = VerdictRule(voters, WeightedSum(), Absolute(value=1))
    assert words(rule, table([5], [0])) == [
        "weighted_sum@2(calibration=fixed, decay=0.9)[absolute@1(value=1, dead_band=0): 2 (a - 5) / 0.5 + b >= 1]"
    ]


def test_votes_are_written_out() -> None:
    voters = [Voter("a", threshold=Absolute(value=2)), Voter("b")]
    rule = VerdictRule(voters, Agreement(), RoundQuantile())
    text = "agreement@1[absolute@1(value=2, dead_band=0): a >= 2; round_quantile@2(quantile=0.5, dead_band=0): b >= 7]"
    assert words(rule, table([1, 2], [6, 7])) == [text] * 2


def test_widening_says_so() -> None:
    rule, scored = alone(Absolute(value=9)), table([1, 2])
    widened = rule.widened(scored, rule.fit(scored))
    assert widened is not None
    assert rule.describe(widened) == "widened@1(to=median): taste >= 2"
