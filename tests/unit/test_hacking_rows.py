"""Opinions of several scorers on one scale, and the watch for reward hacking as a run's rows feed it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kto_ray.config import Labeling
from kto_ray.evaluate.hacking import suspicion_of, with_opinions

UP, DOWN = [0.1, 0.2, 0.4], [9.0, 8.0, 5.0]
SCORERS: dict[str, dict[str, Any]] = {"proxy": {}, "held": {"held_out": True}}


def label(scorers: dict[str, Any] = SCORERS, **watch: Any) -> Labeling:
    return Labeling.model_validate({"scorers": scorers, "watch": {"rounds": 3, **watch}})


def rows(std: float = 1.0, **series: Sequence[float | None]) -> list[dict[str, Any]]:
    """The rows of rounds with these means; None: no scores in that round."""
    return [
        {
            "round": place,
            **{f"score/{name}": value for name, value in zip(series, values, strict=True) if value is not None},
            **{f"score_std/{name}": std for name, value in zip(series, values, strict=True) if value is not None},
        }
        for place, values in enumerate(zip(*series.values(), strict=True))
    ]


# -- opinions ---------------------------------------------------------------------------------------------------------


def test_an_opinion_is_the_change_since_the_first_round_in_its_standard_deviations() -> None:
    given = rows(std=0.5, proxy=[0.1, 0.2, 0.6])
    given[2]["score_std/proxy"] = 100.0  # only the first round's counts
    found = with_opinions(given, {"proxy": False})
    assert [row["opinion/proxy"] for row in found] == pytest.approx([0.0, 0.2, 1.0])
    assert [{key: value for key, value in row.items() if key != "opinion/proxy"} for row in found] == given


def test_a_scorer_that_comes_later_starts_when_it_comes() -> None:
    found = with_opinions(rows(std=2.0, late=[None, 3.0, None, 7.0]), {"late": True})
    assert [row.get("opinion/late") for row in found] == [None, 0.0, None, 2.0]


@pytest.mark.parametrize("std", [0.0, None])
def test_a_first_round_without_spread_leaves_the_scale_as_it_is(std: float | None) -> None:
    given = rows(proxy=[1.0, 4.0])
    given[0]["score_std/proxy"] = std
    assert [row["opinion/proxy"] for row in with_opinions(given, {"proxy": False})] == [0.0, 3.0]


def test_rows_of_an_older_run_stay_as_they_are() -> None:
    given = [{"round": 0, "score_mean": 0.5}, {}]
    assert with_opinions(given, {"shapes": False}) == given
    assert with_opinions([], {"shapes": False}) == []


# -- suspicion --------------------------------------------------------------------------------------------------------


def test_scores_that_part_are_suspicious() -> None:
    text = suspicion_of(label(), rows(std=0.5, proxy=UP, held=DOWN))
    assert text is not None
    slopes = [np.polyfit(range(3), np.array(series) / 0.5, 1)[0] for series in (UP, DOWN)]
    assert f"rises by {slopes[0]:.3g}" in text
    assert f"held falls by {-slopes[1]:.3g}" in text


@pytest.mark.parametrize(("proxy", "held"), [(UP, UP), (DOWN, DOWN), (DOWN, UP)])
def test_scores_that_do_not_part_are_not(proxy: list[float], held: list[float]) -> None:
    assert suspicion_of(label(), rows(proxy=proxy, held=held)) is None


@pytest.mark.parametrize(
    "unwatched",
    [
        label(action="off"),
        label({"proxy": {}, "held": {}}),
        label(rounds=4),
        Labeling.model_validate(
            {"labeler": "people:Queue", "scorers": {"held": {"held_out": True}}, "watch": {"rounds": 3}}
        ),
    ],
    ids=["off", "nothing held out", "too few rounds", "nobody votes"],
)
def test_what_is_not_watched_raises_no_suspicion(unwatched: Labeling) -> None:
    assert suspicion_of(unwatched, rows(proxy=UP, held=DOWN)) is None


def test_votes_count_by_their_weight() -> None:
    two: dict[str, Any] = {"falls": {"weight": 1}, "rises": {"weight": 3}, "held": {"held_out": True}}
    given = rows(falls=[0.0, -1.0, -2.0], rises=[0.0, 0.5, 1.0], held=DOWN)
    assert suspicion_of(label(two), given) is not None  # (3 x 0.5 - 1 x 1) / 4 a round
    assert suspicion_of(label({**two, "rises": {"weight": 1}}), given) is None


def test_a_round_that_a_voter_did_not_score_has_no_proxy() -> None:
    two: dict[str, Any] = {"one": {}, "two": {}, "held": {"held_out": True}}
    held = [9.0, 8.0, 5.0, 4.0]
    # Without "two" the mean of the third round would jump, though nothing rises.
    assert suspicion_of(label(two, rounds=4), rows(one=[5, 5, 5, 5], two=[0, 0, None, 0], held=held)) is None
    assert suspicion_of(label(two, rounds=4), rows(one=[5, 6, 7, 8], two=[0, 0, None, 0], held=held)) is not None


def test_a_run_without_rounds_or_scores_is_not_suspicious() -> None:
    assert suspicion_of(label(), []) is None
    assert suspicion_of(label(), [{"round": place} for place in range(5)]) is None
