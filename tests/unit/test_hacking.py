"""When the watch for reward hacking speaks, and when it holds its tongue."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import linregress

from kto_ray.evaluate.hacking import suspicion

UP, DOWN, LEVEL = [0.1, 0.3, 0.2, 0.5, 0.6], [0.9, 0.7, 0.8, 0.4, 0.3], [0.1] * 5
Series = Sequence[float | None]


def test_a_rising_proxy_and_a_falling_held_out_score_are_suspicious() -> None:
    text = suspicion(UP, {"clip_score": DOWN, "aesthetic": UP}, 5)
    assert text is not None
    assert "last 5 rounds" in text
    assert "clip_score" in text
    assert "aesthetic" not in text
    for series in (UP, DOWN):
        assert f"{abs(linregress(range(5), series).slope):.3g} a round" in text


def test_every_falling_scorer_is_named() -> None:
    text = suspicion(UP, {"one": DOWN, "two": UP, "three": DOWN}, 5)
    assert text is not None
    assert "one" in text
    assert "three" in text
    assert "two" not in text


@pytest.mark.parametrize(
    ("proxy", "held_out"),
    [(UP, UP), (DOWN, DOWN), (DOWN, UP), (LEVEL, DOWN), (UP, LEVEL), (UP, [None] * 5), ([None] * 5, DOWN)],
)
def test_anything_else_is_not(proxy: Series, held_out: Series) -> None:
    assert suspicion(proxy, {"held": held_out}, 5) is None


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1e-9, 12345.678])
@pytest.mark.parametrize("rounds", [3, 5, 6, 7, 20])
def test_a_level_line_does_not_fall_by_rounding(value: float, rounds: int) -> None:
    rising = [0.01 * i for i in range(rounds)]
    assert suspicion(rising, {"held": [value] * rounds}, rounds) is None
    assert suspicion([value] * rounds, {"held": [-x for x in rising]}, rounds) is None


def test_without_held_out_scorers_there_is_nothing_to_compare() -> None:
    assert suspicion(UP, {}, 5) is None


def test_only_the_last_rounds_count() -> None:
    proxy, held_out = [9.0, 8.0, 7.0, *UP], [0.0, 0.1, 0.2, *DOWN]
    assert suspicion(proxy, {"held": held_out}, 8) is None
    assert suspicion(proxy, {"held": held_out}, 5) is not None
    assert suspicion([*proxy, 0.0, 0.0], {"held": [*held_out, 0.3, 0.3]}, 3) is None


def test_before_enough_rounds_nothing_is_said() -> None:
    assert suspicion(UP[:4], {"held": DOWN[:4]}, 5) is None
    assert suspicion([], {"held": []}, 5) is None
    assert suspicion(UP, {"held": DOWN}, 5) is not None


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_round_without_figure_is_left_out_and_the_others_keep_their_places(missing: float | None) -> None:
    held_out: list[float | None] = [0.9, missing, missing, 0.8, 0.4]
    text = suspicion(UP, {"held": held_out}, 5)
    assert text is not None
    assert f"{-linregress([0, 3, 4], [0.9, 0.8, 0.4]).slope:.3g}" in text
    proxy: list[float | None] = [0.1, missing, 0.2, 0.5, missing]
    text = suspicion(proxy, {"held": DOWN}, 5)
    assert text is not None
    assert f"{linregress([0, 2, 3], [0.1, 0.2, 0.5]).slope:.3g}" in text


def test_two_figures_are_no_trend() -> None:
    assert suspicion(UP, {"held": [0.9, None, None, None, 0.1]}, 5) is None
    assert suspicion([0.1, None, None, None, 0.9], {"held": DOWN}, 5) is None


def test_the_sign_is_the_least_squares_line_s() -> None:
    rng = np.random.default_rng(0)
    spoken = 0
    for _ in range(200):
        proxy, held_out = rng.normal(size=7), rng.normal(size=7)
        expected = np.polyfit(range(7), proxy, 1)[0] > 0 > np.polyfit(range(7), held_out, 1)[0]
        assert (suspicion(proxy.tolist(), {"held": held_out.tolist()}, 7) is not None) == expected
        spoken += expected
    assert 20 < spoken < 100


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 rounds, not 2"):
        suspicion(UP, {"held": DOWN}, 2)
    with pytest.raises(ValueError, match="'held' has 4 rounds and the proxy 5"):
        suspicion(UP, {"held": DOWN[:4]}, 5)


def test_slopes_that_are_not_steeper_than_the_least_are_chance() -> None:
    proxy, falling = [0.0, 0.2, 0.4, 0.6], {"watch": [0.0, -0.1, -0.2, -0.3]}
    assert suspicion(proxy, falling, 4, least=0.09)
    assert suspicion(proxy, falling, 4, least=0.11) is None
    assert suspicion([value / 4 for value in proxy], falling, 4, least=0.09) is None
