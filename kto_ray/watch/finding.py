"""Which images somebody wants to see, and in which order: the filters of the grid, as its address has them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BeforeValidator, Field

from kto_ray.evaluate.albums import Album, ImageStory
from kto_ray.section import Section

PAGE = 120
"""Images of a page: a few screens."""
KEPT = 16
"""Wishes whose images are remembered."""
APART = 0.5
"""From this disagreement on scorers count as being of two minds; see `albums.disagreements`."""


def _none(value: Any) -> Any:
    """A field that was left empty says nothing."""
    return None if value == "" else value


Score = Annotated[float | None, BeforeValidator(_none)]


class Wish(Section):
    """What is asked for; fields that are left alone ask for everything."""

    album: str = ""
    """An album's key; empty: all rounds."""
    verdict: Literal["", "desirable", "undesirable", "abstain", "failed", "pending"] = ""
    """failed: also where one scorer of several failed."""
    prompt: Annotated[str, Field(max_length=500)] = ""
    """A part of the prompt's text, in small or capital letters."""
    scorer: Annotated[str, Field(max_length=200)] = ""
    """Whose scores `low`, `high` and the order go by; empty: the first."""
    low: Score = None
    high: Score = None
    disagree: Literal["", "scorers", "people"] = ""
    order: Literal["", "highest", "lowest", "disagreement"] = ""
    """Empty: the newest round first, and in it by prompt."""
    page: Annotated[int, Field(ge=1, le=10**6)] = 1

    def query(self, **changes: Any) -> str:
        """As an address has it, without what is left alone."""
        asked = {**self.model_dump(), **changes}
        default = {name: field.default for name, field in type(self).model_fields.items()}
        return urlencode({name: value for name, value in asked.items() if value != default[name]})


@dataclass(frozen=True)
class Found:
    """All images that are wanted, in order, and the part that the page shows."""

    images: Sequence[ImageStory]
    page: int
    pages: int

    @property
    def shown(self) -> Sequence[ImageStory]:
        return self.images[(self.page - 1) * PAGE : self.page * PAGE]


class Finder:
    """Finds, and keeps what was found last: who walks through images asks for the same again, and so do open pages."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Sequence[Album], Sequence[ImageStory]]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, albums: Sequence[Album], wish: Wish, scorers: Sequence[str]) -> Found:
        """As `find` does, in all images of some albums. To be called from any thread."""
        asked = wish.query(page=1)
        with self._lock:
            known, images = self._kept.pop(asked, ((), ()))
        # An album that may have changed is another object.
        if len(known) != len(albums) or any(a is not b for a, b in zip(known, albums, strict=True)):
            images = find((image for album in albums for image in album.images), wish, scorers).images
        with self._lock:
            self._kept[asked] = albums, images
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return _on_page(images, wish)


def find(images: Iterable[ImageStory], wish: Wish, scorers: Sequence[str]) -> Found:
    """Those that are wanted, out of these.

    Args:
        scorers: names of all.
    """
    scorer = wish.scorer or next(iter(scorers), "")
    tests: list[Callable[[ImageStory], bool]] = []
    if wish.verdict == "failed":
        tests.append(lambda image: image.label == "failed" or image.error is not None)
    elif wish.verdict:
        tests.append(lambda image: image.label == wish.verdict)
    if text := wish.prompt.casefold().strip():
        tests.append(lambda image: text in image.record.prompt.text.casefold())
    if wish.low is not None or wish.high is not None:
        low = float("-inf") if wish.low is None else wish.low
        high = float("inf") if wish.high is None else wish.high
        tests.append(lambda image: (value := image.value(scorer)) is not None and low <= value <= high)
    if wish.disagree == "scorers":
        tests.append(lambda image: (image.disagreement or 0) >= APART)
    elif wish.disagree == "people":
        tests.append(lambda image: image.people_disagree)
    found = [image for image in images if all(test(image) for test in tests)]
    if wish.order == "disagreement":
        found.sort(key=lambda image: -(image.disagreement or 0))
    elif wish.order:
        sign = -1 if wish.order == "highest" else 1
        found.sort(key=lambda image: (1, 0.0) if (value := image.value(scorer)) is None else (0, sign * value))
    return _on_page(found, wish)


def _on_page(images: Sequence[ImageStory], wish: Wish) -> Found:
    pages = max(1, -(-len(images) // PAGE))
    return Found(images, min(wish.page, pages), pages)
