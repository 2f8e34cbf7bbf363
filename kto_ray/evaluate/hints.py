"""What a run's health figures say of its objective's settings: hints, said once each, that never end a run.

The loop says a hint after the round in which it is first seen, the report lists all. Functions of the rows alone, as
doubts are (`doubts.py`): a continued run says what it would have said. Figures and limits: docs/objectives.md.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kto_ray.config import RunConfig
from kto_ray.evaluate.collapse import figure
from kto_ray.objectives import AnyObjective, DiffusionKTO

Row = Mapping[str, Any]

ROUNDS = 3
"""In a row that a figure has to show it."""
ALIKE = 0.3
"""Share of the desirable images' g from which that of the undesirable ones is much the same."""


def hints_of(config: RunConfig, rows: Sequence[Row]) -> dict[str, str]:
    """What the last of these rounds, in order, have in common, by kind; {} for nothing."""
    if config.train.watch.action == "off" or len(rows) < ROUNDS:
        return {}
    found = {kind: hint(config.train.objective, rows[-ROUNDS:]) for kind, hint in HINTS.items()}
    return {kind: text for kind, text in found.items() if text}


def new_hints(config: RunConfig, rows: Sequence[Row]) -> list[str]:
    """Those that the last of these rounds is the first to give."""
    before = {kind for end in range(len(rows)) for kind in hints_of(config, rows[:end])}
    return [text for kind, text in hints_of(config, rows).items() if kind not in before]


def hints_in_all(config: RunConfig, rows: Sequence[Row]) -> list[str]:
    """Each kind as it was first given, with that round."""
    seen: dict[str, str] = {}
    for end in range(1, len(rows) + 1):
        for kind, text in hints_of(config, rows[:end]).items():
            seen.setdefault(kind, f"after round {rows[end - 1]['step']}: {text}")
    return list(seen.values())


def _accuracy(objective: AnyObjective, rows: Sequence[Row]) -> str | None:
    shares = [figure(row, "objective/accuracy") for row in rows]
    if not max(shares) < 0.5:
        return None
    remedy = "a smaller train.learning_rate, or more images a round"
    if isinstance(objective, DiffusionKTO):
        if objective.reference == "fixed":
            remedy = "train.objective.reference: round, which asks every round anew for better than what there is"
        if objective.reference_point != "noise_mean":
            remedy = (
                "train.objective.reference_point: noise_mean, since g depends on the noise far more than on the verdict"
            )
    return (
        f"the sign of a sample's margin agrees with its verdict in {shares[-1]:.0%} of the draws only, fewer than by "
        f"chance, in {len(rows)} rounds: most samples are taken for what they are not. In a new run, try {remedy}"
    )


def _alike(objective: AnyObjective, rows: Sequence[Row]) -> str | None:
    pairs = [[figure(row, f"objective/g_{label}") for label in ("desirable", "undesirable")] for row in rows]
    if not all(yes > 0 and no > ALIKE * yes for yes, no in pairs):
        return None
    yes, no = pairs[-1]
    remedy = "fewer train.epochs, or a larger share of undesirable images (train.gamma)"
    if getattr(objective, "reference", None) == "fixed":
        remedy = "train.objective.reference: round, or fewer train.epochs"
    return (
        f"the policy explains undesirable images better than its reference, too, and nearly as much as desirable ones "
        f"(g {no:.3g} and {yes:.3g}), in {len(rows)} rounds: it learns what its own images have in common, more than "
        f"what sets them apart. In a new run, try {remedy}"
    )


HINTS: dict[str, Callable[[AnyObjective, Sequence[Row]], str | None]] = {"accuracy": _accuracy, "alike": _alike}
