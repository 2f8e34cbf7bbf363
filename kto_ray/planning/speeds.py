"""What one actor of each role does in a second: as somebody states it, or as a finished run measured it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kto_ray.config import steps_for
from kto_ray.errors import UserError
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage


@dataclass(frozen=True)
class Speeds:
    """Of one replica, one train worker, one scorer actor."""

    images_per_s: float
    """Images that a replica draws, with the steps of rounds."""
    samples_per_s: float
    """Training samples that a worker takes through the model and back."""
    scores_per_s: Mapping[str, float] = field(default_factory=dict)
    """Images that an actor scores, by scorer; one that is missing is not waited for."""
    label_s: float | None = None
    """What labeling takes beyond the last image of a round; None: as long as scorers need to catch up."""
    other_s: float = 0.0
    """What else a round takes: sealing it, loading it, publishing the policy."""


def measured(run: Storage) -> Speeds:
    """Of a run's rounds, but for the first, in which everything was new, where there are others.

    Raises:
        UserError: it is no run folder, or has not trained on what it drew.
    """
    config = saved_config(run, "--speeds")
    text = run.read("metrics.jsonl").decode() if run.exists("metrics.jsonl") else ""
    rows = [row for row in map(json.loads, text.splitlines()) if row["kind"] == "round"]
    rows = [row for row in rows if row.get("busy/generate") and row.get("seconds/train")]
    if not rows:
        raise UserError(f"--speeds: {run} has no round that it drew and trained on, from which speeds could be taken")
    rows = rows[1:] or rows

    def total(name: str) -> float:
        return sum(row.get(name) or 0.0 for row in rows)

    draws = sum(
        steps_for(row["desirable"] + row["undesirable"], config.train) * config.train.global_batch for row in rows
    )
    waited = total("seconds/generate") + total("seconds/label") + total("seconds/train")
    return Speeds(
        images_per_s=len(rows) * config.generate.images_per_round / total("busy/generate"),
        samples_per_s=draws / total("seconds/train") / config.train.workers,
        label_s=total("seconds/label") / len(rows),
        # Of a run whose rounds overlap, what a round takes is not the sum of its parts.
        other_s=max(0.0, total("seconds/round") - waited) / len(rows) if not config.rounds_ahead else _load(rows),
    )


def _load(rows: list[dict[str, Any]]) -> float:
    return sum(row.get("seconds/load") or 0.0 for row in rows) / len(rows)
