"""Which samples a round trains on: the promised share, even draws, and the same plan for everybody."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_ray.config import Train
from kto_ray.train.sampler import imbalance, plan_pairs, plan_round


def verdicts(desirable: int, undesirable: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(0).permutation(np.arange(desirable + undesirable) < desirable)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("pass_rate", [0.1, 0.5, 0.9])
def test_the_share_of_desirable_is_gamma_whatever_the_pass_rate(gamma: float, pass_rate: float) -> None:
    desirable_N = verdicts(int(200 * pass_rate), 200 - int(200 * pass_rate))
    plan_SB = plan_round(desirable_N, gamma, steps=100, global_batch=64, seed=0, round_index=0)
    four_sigma = 4 * np.sqrt(gamma * (1 - gamma) / plan_SB.size)
    assert desirable_N[plan_SB].mean() == pytest.approx(gamma, abs=four_sigma)


def test_the_plan_has_a_row_a_step() -> None:
    plan_SB = plan_round(verdicts(3, 5), 0.5, steps=4, global_batch=6, seed=0, round_index=0)
    assert plan_SB.shape == (4, 6)
    assert plan_SB.dtype == np.int64


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=20),
    st.floats(0.05, 0.95),
    st.integers(0, 10),
    st.integers(1, 16),
    st.integers(0, 3),
)
def test_none_is_drawn_again_before_all_of_its_class_were(
    verdicts_N: list[bool], gamma: float, steps: int, batch: int, seed: int
) -> None:
    desirable_N = np.array(verdicts_N)
    plan = plan_round(desirable_N, gamma, steps, batch, seed, round_index=0).ravel()
    assert len(plan) == steps * batch
    for label in (True, False):
        members = np.flatnonzero(desirable_N == label)
        drawn = [index for index in plan if desirable_N[index] == label]
        for start in range(0, len(drawn), max(1, len(members))):
            window = drawn[start : start + len(members)]
            assert len(set(window)) == len(window)


@pytest.mark.parametrize("label", [True, False])
def test_a_round_of_one_class_fills_all_places(label: bool) -> None:
    plan_SB = plan_round(np.full(5, label), 0.8, steps=2, global_batch=5, seed=0, round_index=0)
    assert np.bincount(plan_SB.ravel()).tolist() == [2] * 5


def test_one_sample_is_enough() -> None:
    assert plan_round(np.array([True]), 0.8, 2, 3, seed=0, round_index=0).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("samples", [0, 4])
def test_no_steps_draw_nothing(samples: int) -> None:
    plan_SB = plan_round(np.ones(samples, np.bool_), 0.8, steps=0, global_batch=8, seed=0, round_index=0)
    assert plan_SB.shape == (0, 8)


def test_everybody_finds_the_same_plan() -> None:
    arguments = {"desirable_N": verdicts(10, 20), "gamma": 0.8, "steps": 5, "global_batch": 8}
    plan_SB = plan_round(**arguments, seed=1, round_index=2)  # type: ignore[arg-type]
    assert np.array_equal(plan_SB, plan_round(**arguments, seed=1, round_index=2))  # type: ignore[arg-type]
    assert not np.array_equal(plan_SB, plan_round(**arguments, seed=2, round_index=2))  # type: ignore[arg-type]
    assert not np.array_equal(plan_SB, plan_round(**arguments, seed=1, round_index=3))  # type: ignore[arg-type]


def test_a_rare_class_is_not_drawn_more_often_than_the_limit() -> None:
    rare = verdicts(1, 63)
    draws = [
        np.bincount(plan_round(rare, 0.8, 2, 64, 0, 0, max_draws).ravel(), minlength=64) for max_draws in (None, 16)
    ]
    assert draws[0][rare].item() > 90
    assert draws[1][rare].item() == 16
    assert draws[1].sum() == 128
    assert draws[1][~rare].max() <= 16


def test_the_limit_changes_nothing_where_it_is_kept_or_cannot_be() -> None:
    for desirable_N, limit in ((verdicts(20, 20), 32), (verdicts(1, 1), 8), (verdicts(0, 2), 8)):
        plans = [plan_round(desirable_N, 0.8, 2, 32, 0, 0, max_draws) for max_draws in (None, limit)]
        assert np.array_equal(*plans)


@pytest.mark.parametrize(
    ("desirable", "undesirable", "rare"),
    [(1, 63, "only 1 of 64 verdicts are desirable"), (63, 1, None), (32, 32, None), (0, 64, None)],
)
def test_imbalance_is_told_with_the_draws_that_it_means(desirable: int, undesirable: int, rare: str | None) -> None:
    said = imbalance(desirable, undesirable, Train(global_batch=64, epochs=2))
    assert (said is None) == (rare is None)
    if rare is not None:
        assert rare in str(said)
        assert "about 102 times" in str(said)
        assert "train.max_draws holds it at 32" in str(said)


def test_without_gamma_every_sample_is_drawn_equally_often() -> None:
    plan_SB = plan_round(verdicts(3, 9), None, steps=6, global_batch=6, seed=0, round_index=0)
    assert np.bincount(plan_SB.ravel()).tolist() == [3] * 12
    assert imbalance(1, 999, Train(gamma=None)) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1, max_size=20),
    st.integers(0, 8),
    st.integers(1, 8),
    st.integers(0, 3),
)
def test_pairs_are_of_one_prompt_and_of_both_classes(
    samples: list[tuple[bool, str]], steps: int, pairs_a_step: int, seed: int
) -> None:
    desirable_N, prompts = np.array([yes for yes, _ in samples]), [prompt for _, prompt in samples]
    both = {prompt for prompt in prompts if {yes for yes, other in samples if other == prompt} == {True, False}}
    plan_SB = plan_pairs(desirable_N.astype(np.float64), prompts, steps, 2 * pairs_a_step, seed, round_index=0)
    assert plan_SB.shape == ((steps if both else 0), 2 * pairs_a_step)
    pairs = plan_SB.reshape(-1, 2).tolist()
    assert all(desirable_N[yes] and not desirable_N[no] and prompts[yes] == prompts[no] for yes, no in pairs)
    # Prompts come equally often, and within one no pair again before all came.
    drawn = [prompts[yes] for yes, _ in pairs]
    counts = [drawn.count(prompt) for prompt in both]
    assert not counts or max(counts) - min(counts) <= 1
    for prompt in both:
        mine = [tuple(pair) for pair in pairs if prompts[pair[0]] == prompt]
        possible = sum(a and b == prompt for a, b in samples) * sum(not a and b == prompt for a, b in samples)
        for start in range(0, len(mine), possible):
            assert len(set(mine[start : start + possible])) == len(mine[start : start + possible])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.5, np.nan]), st.sampled_from("abc")), min_size=1, max_size=12))
def test_pairs_of_scores_are_all_that_differ(samples: list[tuple[float, str]]) -> None:
    value_N, prompts = np.array([value for value, _ in samples]), [prompt for _, prompt in samples]
    expected = {
        (i, j)
        for i, (a, one) in enumerate(samples)
        for j, (b, other) in enumerate(samples)
        if one == other and a > b  # never where either is NaN
    }
    found = plan_pairs(value_N, prompts, steps=3 * len(expected), global_batch=2, seed=0, round_index=0)
    assert {(better, worse) for better, worse in found.tolist()} == expected
