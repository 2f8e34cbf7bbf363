"""What goes over the wire of the JSON API: requests and replies of `api.py`, with the words that its users read."""

from typing import Annotated, Literal

from pydantic import Field

from kto_ray.people.terms import Answer
from kto_ray.section import NonNegative, Section

Item = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["3f9a1c0de4b87256"])]
MOST_OFFERS = 10


class Ask(Section):
    """A wish for images."""

    count: Annotated[int, Field(ge=1, le=MOST_OFFERS)] = 1
    """How many images are wanted."""


class Said(Section):
    """An answer on one image."""

    item: Item
    """Which image."""
    verdict: Answer
    """desirable and undesirable are what the model learns from; unsure counts as an answer without one; skip leaves
    the image to others."""
    seconds: NonNegative | None = None
    """How long the person looked at it, if that is known."""
    count: Annotated[int, Field(ge=0, le=MOST_OFFERS)] = 1
    """How many images to give next."""


class OneItem(Section):
    """One image."""

    item: Item


class SomeItems(Section):
    """Several images."""

    items: Annotated[list[Item], Field(max_length=50)]


class LabelerName(Section):
    """A labeler."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,80}$", examples=["anna"])]
    """As the overview has it."""


class OfferedImage(Section):
    """An image to judge. It is this labeler's until the lease ends; extend it, answer it or give it back."""

    item: str
    """What it is called in all other calls; says nothing about the image."""
    prompt: str
    """What it was drawn for. Text from outside: escape it where you show it."""
    image: str
    """Where its PNG is, relative to the run's address."""
    expires_in: float
    """Seconds until the lease ends."""


class ProgressReply(Section):
    """Where the newest round stands, and this labeler's part in the run."""

    round: int | None
    """Its number; null: there is none yet."""
    asked: int
    """Images of the round that people were asked about so far."""
    judged: int
    """Those of them that have all the answers they need."""
    target: int | None
    """So many judged images complete the round; null: not known yet, more are being drawn."""
    waits_for: Literal["images", "people", "training", "nothing"]
    """What happens next when there is nothing to judge. images: more are being drawn; people: the rest is with others;
    training: the round is complete and the model learns from it; nothing: the run has ended."""
    answers: int
    """Given by this labeler, skips included."""
    undoable: list[str]
    """Items whose answers this labeler may take back, the latest first."""


class TurnReply(Section):
    """Where things stand, and images to judge, those held already first. None: ask again in a second or two."""

    progress: ProgressReply
    offers: list[OfferedImage]


class Kept(Section):
    """Images that are this labeler's for another lease; those that are missing went to somebody else or are judged."""

    items: list[str]


class Refusal(Section):
    """Why something was not done."""

    why: str
    """A word for programs."""
    message: str
    """For people."""
