"""Plug-ins that tests name by dotted path, as a user would name their own."""

import os
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.records import Prompt


class CoinScorer:
    """A fair coin that the pixels toss: deterministic, and about half of any images score at least 0.5.

    Args:
        seconds: time that a batch takes, to have something to kill.
    """

    name = "coin"
    version = "1"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        time.sleep(self.seconds)
        return [float(image.astype(np.int64).sum() % 97) / 96 for image in images_BHWC]


class BrittleScorer(CoinScorer):
    """Fails on every image whose prompt names a circle; gives NaN for a ring; ends its process for a cross."""

    name = "brittle"

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        if any("cross" in prompt.text for prompt in prompts):
            os._exit(1)
        if any("circle" in prompt.text for prompt in prompts):
            raise RuntimeError("no circles, please")
        scores = super().score(images_BHWC, prompts)
        return [float("nan") if "ring" in prompt.text else score for prompt, score in zip(prompts, scores, strict=True)]
