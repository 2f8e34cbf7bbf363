"""The watch for collapse, on the figures of real runs of the embedded world and on made ones."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import linregress

from kto_ray.config import RunConfig, load
from kto_ray.evaluate.collapse import signs_of_collapse
from kto_ray.evaluate.doubts import doubts_in_all, doubts_of

NAMES = ("pass_rate", "objective/g_desirable", "objective/g_undesirable", "objective/saturated", "pictures/diversity")
Row = dict[str, Any]


def rows(*figures: Sequence[float | None]) -> list[Row]:
    return [{"step": step, **dict(zip(NAMES, values, strict=True))} for step, values in enumerate(figures)]


def passing(*rates: float | None) -> list[Row]:
    return [{"step": step, "pass_rate": rate} for step, rate in enumerate(rates)]


DEMO = load("shapes_demo")
"""432 images a round, each of another prompt; beta 75."""
RECIPE = rows(
    (0.530, 0.0061, -0.0098, 0.036, 0.406),
    (0.685, 0.0130, -0.0052, 0.074, 0.407),
    (0.745, 0.0178, 0.0035, 0.099, 0.407),
    (0.755, 0.0230, 0.0031, 0.105, 0.407),
    (0.822, 0.0270, 0.0016, 0.117, 0.408),
    (0.843, 0.0293, 0.0104, 0.113, 0.406),
    (0.873, 0.0345, 0.0189, 0.135, 0.409),
    (0.806, 0.0379, 0.0204, 0.151, 0.409),
    (0.840, 0.0398, 0.0308, 0.154, 0.410),
    (0.850, 0.0385, 0.0270, 0.169, 0.409),
    (0.866, 0.0463, 0.0254, 0.179, 0.411),
    (0.838, 0.0425, 0.0173, 0.144, 0.409),
)
"""Its own figures, all twelve rounds."""
TOO_FAST = rows((0.514, -0.0515, -0.0867, 0.441, 0.406), (0.171, -0.0511, -0.0324, 0.600, 0.391))
"""Those of a learning rate ten times as high; of the next round's images none passed."""


def signs(figures: Sequence[Row], *overrides: str, config: RunConfig = DEMO) -> set[str]:
    return set(signs_of_collapse(load("shapes_demo", overrides) if overrides else config, figures))


@pytest.mark.parametrize("length", range(len(RECIPE) + 1))
def test_the_recipe_shows_no_sign(length: int) -> None:
    assert signs(RECIPE[:length]) == set()


def test_a_learning_rate_that_destroys_is_seen_in_its_first_round() -> None:
    found = signs_of_collapse(DEMO, TOO_FAST[:1])
    assert found.keys() == {"worse", "saturated"}
    assert "-3.86 and -6.5" in found["worse"]  # beta times the means
    assert "44%" in found["saturated"]
    assert all(text.startswith("possible collapse: ") and "train.learning_rate" in text for text in found.values())


@pytest.mark.parametrize(
    ("yes", "no"), [(0.01, -0.09), (-0.09, 0.01), (-0.09, -0.01), (0.0, 0.0), (None, -0.09), (math.nan, -0.09)]
)
def test_both_classes_must_be_explained_worse(yes: float | None, no: float) -> None:
    assert signs(rows((0.5, yes, no, 0.1, 0.4))) == set()
    assert signs(rows((0.5, -0.09, -0.09, 0.1, 0.4))) == {"worse"}


def test_pictures_that_become_alike_are_a_sign() -> None:
    assert signs(rows((0.5, 0.01, 0.0, 0.1, 0.40), (0.5, 0.01, 0.0, 0.1, 0.21))) == set()
    assert signs(rows((0.5, 0.01, 0.0, 0.1, 0.40), (0.5, 0.01, 0.0, 0.1, 0.19))) == {"diversity"}


def test_a_fast_fall_needs_three_rounds_and_a_slow_one_more() -> None:
    assert signs(passing(0.5, 0.17)) == set()
    assert signs(passing(0.5, 0.3, 0.1)) == {"falls"}
    slow = [0.8, 0.77, 0.74, 0.71, 0.68]
    assert signs(passing(*slow[:3])) == set()  # as much may be chance
    assert signs(passing(*slow)) == {"falls"}
    assert signs(passing(0.1, *slow)) == {"falls"}  # what was before the last five does not count
    assert signs(passing(*slow, 0.75, 0.8)) == set()  # it has recovered


def test_rounds_without_a_pass_rate_keep_their_places() -> None:
    assert signs(passing(None, None, None)) == set()
    assert signs(passing(0.8, None, 0.74, None, 0.68)) == {"falls"}
    assert "by 3.0% a round" in signs_of_collapse(DEMO, passing(0.8, None, 0.74, None, 0.68))["falls"]


@pytest.mark.parametrize("slope", [-0.01, -0.019, -0.03])
def test_a_fall_is_one_from_the_least_slope_on(slope: float) -> None:
    config = load("shapes_demo", ["generate.images_per_round=1000000"])  # chance moves next to nothing
    rates = [0.9 + slope * step for step in range(5)]
    assert linregress(range(5), rates).slope == pytest.approx(slope)
    assert bool(signs(passing(*rates), config=config)) is (slope < -0.02)


@pytest.mark.parametrize(("images", "per_prompt"), [(60, 1), (432, 1), (512, 8)])
def test_chance_alone_hardly_ever_looks_like_a_fall(images: int, per_prompt: int) -> None:
    """Also where all images of a prompt pass or none does."""
    config = load("shapes_demo", [f"generate.images_per_round={images}", f"generate.images_per_prompt={per_prompt}"])
    prompts = images // per_prompt
    rates = np.random.default_rng(0).binomial(prompts, 0.6, (1000, 5)) / prompts
    alarms = sum(bool(signs(passing(*series), config=config)) for series in rates.tolist())
    assert alarms <= 5  # 1.35 expected beyond three standard errors


def test_what_is_not_watched_shows_no_sign() -> None:
    assert signs(TOO_FAST, "train.watch=off") == set()
    assert signs(TOO_FAST[:1], "train.watch.saturated=0.5", "train.watch.worse=9") == set()


def test_a_noise_range_without_its_clean_end_is_seen_once_the_pass_rate_has_turned() -> None:
    """A real run at a constant rate: both g stay above 0, since they are measured in that range."""
    config = load("shapes_demo", ["generate.images_per_round=288", "train.noise_range=[0.3, 1]"])
    rates = passing(0.503, 0.705, 0.705, 0.764, 0.764, 0.726, 0.608, 0.583, 0.642, 0.528)
    assert [bool(signs(rates[:length], config=config)) for length in range(1, 11)] == [False] * 7 + [True] * 3
    assert "train.noise_range begin at 0" in signs_of_collapse(config, rates)["falls"]


def test_a_noise_range_without_its_clean_end_is_named() -> None:
    assert "train.noise_range" not in signs_of_collapse(DEMO, TOO_FAST[:1])["worse"]
    config = load("shapes_demo", ["train.noise_range=[0.2, 1]"])
    assert "train.noise_range" in signs_of_collapse(config, TOO_FAST[:1])["worse"]


def test_each_watch_has_its_own_say_in_ending_the_run() -> None:
    overrides = ["label.scorers={shapes: {}, redness: {held_out: true}}", "label.watch=stop", "label.watch.rounds=3"]
    hacked = [
        {"step": step, "score/shapes": 0.1 * step, "score/redness": -0.1 * step, **TOO_FAST[0]} for step in range(3)
    ]
    doubts = doubts_of(load("shapes_demo", overrides), hacked)
    assert {(doubt.sign, doubt.stop) for doubt in doubts} == {("hacking", True), ("worse", False), ("saturated", False)}


def test_what_was_ever_doubted_is_told_as_it_was_last_seen() -> None:
    told = doubts_in_all(DEMO, [RECIPE[0], *({**row, "step": row["step"] + 1} for row in TOO_FAST), {"step": 3}])
    assert [text.split(":")[0] for text in told] == ["after round 2", "after round 2", "after round 3"]
    assert "60%" in told[1]
    assert doubts_in_all(DEMO, RECIPE) == []
