"""The `Scorer` protocol; `scorers/` has the built-in ones, `actor.py` runs one, `check/` tries one's own."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kto_ray.records import Prompt


class Scorer(Protocol):
    """Says how good images are. Built inside the actor that runs it, from keyword arguments of the configuration."""

    name: str
    version: str

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> Sequence[float]:
        """One finite float an image, in order; higher is better. May raise: a failure is stored as such.

        Args:
            images_BHWC: uint8 RGB of shape (B, H, W, 3), as they were drawn; read-only. B may be 0.
            prompts: B prompts.
        """


class BatchFailed(Exception):  # noqa: N818  it says what happened to the batch
    """Raised by a scorer when nothing about single images is wrong, for instance a server that does not answer.

    The whole batch fails at once; other exceptions have its images tried one by one, so that one bad image costs one
    score.
    """


def check_batch(images_BHWC: npt.NDArray[Any], prompts: Sequence[Prompt]) -> None:
    """Raises ValueError when images are not uint8 RGB of shape (B, H, W, 3), or prompts are not as many."""
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, height, width, 3), not {images_BHWC.dtype} of shape {images_BHWC.shape}"
        )
    if len(images_BHWC) != len(prompts):
        raise ValueError(f"{len(images_BHWC)} images with {len(prompts)} prompts: there must be one for each")
