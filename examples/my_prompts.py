"""A prompt source to copy and change; docs/prompts.md walks through it."""

import random
from collections.abc import Iterator, Sequence

from kto_ray.records import Prompt


class Scenes:
    """Things in places, drawn by lot: the same for the same seed, on every machine.

    Args:
        count: how many prompts.
        seed: of the lots; training and held-out prompts take different ones.
    """

    places = ("on a beach", "in a kitchen", "under a tree", "at night")

    def __init__(self, things: Sequence[str], count: int, seed: int = 0) -> None:
        self.things, self.count, self.seed = things, count, seed

    def __iter__(self) -> Iterator[Prompt]:
        lots = random.Random(self.seed)
        for number in range(self.count):
            thing, place = lots.choice(self.things), lots.choice(self.places)
            yield Prompt(f"{self.seed}-{number}", f"a photo of a {thing} {place}", {"thing": thing, "place": place})
