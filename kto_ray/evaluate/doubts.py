"""What a run's own figures give reason to doubt, after each round: reward hacking and collapse.

The loop says it aloud, and ends the run where the configuration asks for that; `summary.py` writes it down. Functions
of the rows alone, so that a continued run doubts, and stops, where it would have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kto_ray.config import RunConfig
from kto_ray.evaluate.collapse import signs_of_collapse
from kto_ray.evaluate.hacking import suspicion_of


@dataclass(frozen=True)
class Doubt:
    """Why a run may not be doing what it is meant to: the sign by a word, and the text.

    `stop`: whether the run has to end therefore.
    """

    sign: str
    text: str
    stop: bool


def doubts_of(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> list[Doubt]:
    """The doubts after the last of these rows, which are those of all rounds so far, in order."""
    hacking = suspicion_of(config.label, rows)
    suspected = [Doubt("hacking", hacking, config.label.watch.action == "stop")] if hacking else []
    signs = signs_of_collapse(config, rows)
    return suspected + [Doubt(sign, text, config.train.watch.action == "stop") for sign, text in signs.items()]


def doubts_in_all(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was ever doubted in these rounds: each sign as it stood when it was last seen, with that round."""
    seen = {
        doubt.sign: f"after round {rows[end - 1]['step']}: {doubt.text}"
        for end in range(1, len(rows) + 1)
        for doubt in doubts_of(config, rows[:end])
    }
    return list(seen.values())
