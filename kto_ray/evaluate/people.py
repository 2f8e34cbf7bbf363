"""What people's labels cost and brought, for summary and report; made from the metrics rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POINT = 0.01
"""Of a score."""


@dataclass(frozen=True)
class PeopleSummary:
    """Labels of people in a whole run.

    `answers` count skips and void ones out; `judged` images have a verdict of people, `late` ones of these were drawn
    for an earlier round than they are sealed with. `labels_per_point`: answers for each 0.01 by which a scorer's mean
    score on held-out prompts rose from the base to the last policy, by scorer; None for one that did not rise.
    """

    answers: int
    judged: int
    late: int
    labels_per_point: Mapping[str, float | None]


def people_summary(
    rounds: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> PeopleSummary | None:
    """None when no round was judged by people.

    Args:
        rounds: their rows, see `tracking.py`.
        evaluations: of the base first, of the last policy last.
    """
    asked = [row for row in rounds if "people/answers" in row]
    if not asked:
        return None
    answers, judged, late = (
        int(sum(row.get(f"people/{name}", 0) for row in asked)) for name in ("answers", "judged", "late")
    )
    first, last = evaluations[0], evaluations[-1]
    gains = {
        name.removeprefix("score/"): last[name] - first[name]
        for name in first
        if name.startswith("score/") and name in last
    }
    costs = {name: answers / (gain / POINT) if gain > 0 else None for name, gain in gains.items()}
    return PeopleSummary(answers, judged, late, costs)
