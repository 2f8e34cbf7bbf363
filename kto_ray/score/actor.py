"""The actor that holds one scorer; `pool.py` runs several of them.

Where cards are shared by turns, it sleeps between them: what its scorer has on a card is found by looking.

It may live in another Python environment than the loop: this module imports nothing that is not there, and the batches
and answers that cross that border are bytes, numbers and strings.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.records import Prompt
from kto_ray.score.protocol import BatchFailed, Scorer, check_batch
from kto_ray.score.scorers import load_scorer
from kto_ray.sleeping import Sleeper, held_by, on_card

Answers = list[tuple[float | None, str | None]]
"""(value, None) or (None, error) for each image."""
PlainPrompt = tuple[str, str, dict[str, str]]
"""Id, text and metadata of a prompt."""
PlainPixels = tuple[Any, tuple[int, ...]]
"""A buffer of uint8 RGB, for instance bytes, and its shape (B, H, W, 3)."""


class ScorerActor:
    """Builds a scorer and runs it. Batches that raise are scored image by image, so that one bad image costs one."""

    def __init__(self, scorer: str, arguments: Mapping[str, Any]) -> None:
        self.scorer: Scorer = load_scorer(scorer)(**arguments)
        self._sleeper: Sleeper | None = None  # of who has been on a card

    def describe(self) -> tuple[str, str]:
        """Name and version of the scorer; returns once it is built."""
        return self.scorer.name, self.scorer.version

    def sleep(self) -> None:
        """Leave the card, if it is on one, until the next batch; see `Sleeper`."""
        if self._sleeper is None and (card := on_card()) is not None:
            self._sleeper = Sleeper(card, lambda: held_by(self.scorer))
        if self._sleeper is not None:
            self._sleeper.sleep()

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> Answers:
        """Score arrays that share this environment. Raises ValueError for what is no batch (`check_batch`)."""
        check_batch(images_BHWC, prompts)
        try:
            return self._score(images_BHWC, prompts)
        except BatchFailed as error:
            return [(None, str(error))] * len(prompts)
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything; it goes into the record
            if len(prompts) == 1:
                return [(None, f"{type(error).__name__}: {error}")]
        return [self.score(images_BHWC[i : i + 1], [prompt])[0] for i, prompt in enumerate(prompts)]

    def score_plain(self, pixels: PlainPixels, prompts: Sequence[PlainPrompt]) -> Answers:
        """Score images that came from another process, or another environment."""
        if self._sleeper is not None:
            self._sleeper.wake()
        data, shape = pixels
        return self.score(np.frombuffer(data, np.uint8).reshape(shape), [Prompt(*prompt) for prompt in prompts])

    def _score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> Answers:
        values = [float(value) for value in self.scorer.score(images_BHWC, prompts)]
        if len(values) != len(prompts):
            raise ValueError(f"{self.scorer.name} gave {len(values)} scores for {len(prompts)} images")
        return [(value, None) if math.isfinite(value) else (None, f"the score is {value}") for value in values]


def plain(prompts: Sequence[Prompt]) -> list[PlainPrompt]:
    """Prompts as built-in types."""
    return [(prompt.id, prompt.text, dict(prompt.metadata)) for prompt in prompts]
