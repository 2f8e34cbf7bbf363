"""What passes over the queue: images to judge, what people see and answer, and where a round stands.

`queue.py` makes them out of rows, `desk.py` hands them to the loop (`labeler.py`) and to the page (`web/`).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from kto_ray.records import Label

Answer = Literal["desirable", "undesirable", "unsure", "skip"]
"""What a person says of an image; the verdict of a sample is what all answers on it come to."""
ANSWERS: tuple[Answer, ...] = get_args(Answer)


@dataclass(frozen=True)
class NewItem:
    """An image for people to judge, and how many of them; of gold, `expected` is the known answer."""

    sample_id: str
    prompt_id: str
    prompt: str
    png: bytes
    policy_version: int = 0
    needed: int = 1
    expected: Answer | None = None


@dataclass(frozen=True)
class Offer:
    """What a labeler is shown: blind, so neither scores nor who drew it. `expires_at`: seconds since 1970."""

    item: str
    prompt: str
    expires_at: float


@dataclass(frozen=True)
class Progress:
    """Where the newest round stands, and one labeler's part in it."""

    round: int | None
    asked: int
    """Images of the round that people were asked about so far."""
    judged: int
    target: int | None
    """So many judged images are enough; None: not known yet, more are being drawn."""
    waits_for: Literal["images", "people", "training", "nothing"]
    """nothing: the run has ended."""
    answers: int
    """Of this labeler, skips included, in the whole run."""
    undoable: tuple[str, ...]
    """Items whose answers this labeler may take back, the latest first."""


@dataclass(frozen=True)
class Judged:
    """An item's verdict as it is sealed; `rule` says who said what."""

    sample_id: str
    label: Label
    rule: str
    policy_version: int


@dataclass(frozen=True)
class Standing:
    """Where a round stands, for the loop."""

    asked: int
    judged: int
    passed: int
    """Open images on which everybody who can label has answered or skipped: nobody is left to wait for."""
    answers: int
    labelers: int
    """People who can answer: neither excluded nor without a link that works."""
    enough: bool
