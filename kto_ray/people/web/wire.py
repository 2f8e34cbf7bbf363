"""What goes over the wire of the JSON API: requests and replies of `api.py`, with the words that its users read."""

from typing import Annotated, Literal

from pydantic import Field

from kto_ray.people.terms import Answer
from kto_ray.section import NonNegative, Section

Item = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["3f9a1c0de4b87256"])]
MOST_OFFERS = 10
MOST_VOTES = 1000


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


class OneVote(Section):
    """What a user of the application said of an image."""

    id: Annotated[str, Field(min_length=1, max_length=200, examples=["81723"])]
    """Tells it from all other votes: sent again, it counts once."""
    image: Annotated[str, Field(min_length=1, max_length=200)]
    """The id under which the image was published."""
    verdict: Literal["desirable", "undesirable", "none"]
    """none: the person takes an earlier vote on this image back."""
    who: Annotated[str, Field(pattern=r"^[^\x00-\x1f]{1,80}$", examples=["user-4711"])] | None = None
    """Of one person's votes on an image the last one counts; null: somebody who has not voted on it."""
    when: NonNegative | None = None
    """Seconds since 1970; null: now."""


class SomeVotes(Section):
    """Several votes, in the order in which they were given."""

    votes: Annotated[list[OneVote], Field(min_length=1, max_length=MOST_VOTES)]


class VotesReply(Section):
    """What became of votes."""

    counted: int
    """They count as long as their voter does not vote otherwise."""
    known: int
    """They came before."""
    older: int
    """A later vote of the same person on the same image came before."""
    taken_back: int
    """Of verdict none."""
    unknown_image: int
    """Nothing was published under that id."""
    too_late: int
    """The image's round is sealed with a verdict."""
    excluded: int
    """Of people whom the operator has excluded."""
    odd: int
    """Of somebody with a name that nobody can have, such as that of the operator."""
    examples: dict[str, list[str]]
    """A few of the images, or people, by what became of their votes."""


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
