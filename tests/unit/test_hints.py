"""What health figures say of settings: on the figures of a real run, and on made ones."""

from typing import Any

import pytest

from kto_ray.config import RunConfig, load
from kto_ray.evaluate.hints import hints_in_all, hints_of, new_hints

DEMO = load("shapes_demo", ["train.objective={kind: diffusion_kto, beta: 75}"])
PAPER = [
    {"step": step, "objective/accuracy": accuracy, "objective/g_desirable": yes, "objective/g_undesirable": no}
    for step, (accuracy, yes, no) in enumerate(
        (
            (0.48, 0.0061, -0.0098),
            (0.47, 0.0130, -0.0052),
            (0.46, 0.0178, 0.0035),
            (0.45, 0.0385, 0.0270),
            (0.43, 0.0463, 0.0254),
            (0.41, 0.0425, 0.0173),
        )
    )
]
"""Rounds 0 to 2 and 9 to 11 of the embedded world under the paper's objective."""


def kinds(rows: list[dict[str, Any]], config: RunConfig = DEMO) -> set[str]:
    return set(hints_of(config, rows))


def test_the_papers_objective_gives_both_hints_each_once() -> None:
    assert [kinds(PAPER[:end]) for end in range(7)] == [
        *([set()] * 3),
        {"accuracy"},
        {"accuracy"},
        {"accuracy"},
        {"accuracy", "alike"},
    ]
    assert [len(new_hints(DEMO, PAPER[:end])) for end in range(7)] == [0, 0, 0, 1, 0, 0, 1]
    first, second = hints_in_all(DEMO, PAPER)
    assert first.startswith("after round 2: the sign of a sample's margin agrees with its verdict in 46% of the draws")
    assert "train.objective.reference_point: noise_mean" in first
    assert second.startswith("after round 5: the policy explains undesirable images better than its reference, too")
    assert "train.objective.reference: round" in second


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ("{reference_point: noise_mean}", "train.objective.reference: round"),
        ("{reference_point: noise_mean, reference: round}", "a smaller train.learning_rate"),
        ("{kind: dpo}", "a smaller train.learning_rate"),
    ],
)
def test_a_setting_that_is_there_already_is_not_named(objective: str, named: str) -> None:
    config = load("shapes_demo", [f"train.objective={objective}", "generate.images_per_prompt=4"])
    assert f"In a new run, try {named}" in hints_of(config, PAPER[:3])["accuracy"]


def test_figures_that_are_not_there_or_not_steady_say_nothing() -> None:
    assert kinds([{"step": step} for step in range(5)]) == set()
    assert kinds([*PAPER[:2], {**PAPER[2], "objective/accuracy": 0.5}]) == set()
    assert kinds([*PAPER[3:5], {**PAPER[5], "objective/g_undesirable": -0.001}]) == {"accuracy"}
    assert kinds(PAPER, load("shapes_demo", ["train.watch=off"])) == set()
