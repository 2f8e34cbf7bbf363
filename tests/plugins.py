"""Plug-ins that tests name by dotted path, as a user would name their own."""

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kto_ray.identity import Free, Noted
from kto_ray.records import Prompt


class CoinScorer:
    """A fair coin that the pixels toss: deterministic, and about half of any images score at least 0.5.

    Args:
        seconds: time that a batch takes, to have something to kill.
        device, api_key: do nothing, and may change while a run goes on.
    """

    name = "coin"
    version = "1"

    def __init__(self, seconds: float = 0.0, device: Noted[str] = "auto", api_key: Free[str | None] = None) -> None:
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


class FatefulScorer(CoinScorer):
    """A coin that is watched: what actors build and score is noted in a folder, and some come to grief.

    Args:
        folder: takes a file for each process that builds the scorer, by its id, and one for each batch, by its number;
            the latter holds the prompts' ids.
        fate: what becomes of the first `times` batches: "die" ends the process, "hang" never answers.
        builds: whatever is built after so many "break"s in the building, or "hang"s.
    """

    name = "fateful"

    def __init__(
        self, folder: str, fate: str = "", times: int = 0, builds: int | None = None, later: str = "break"
    ) -> None:
        super().__init__()
        self.folder, self.fate, self.times = Path(folder), fate, times
        (self.folder / f"build-{os.getpid()}").touch()
        if builds is not None and len(list(self.folder.glob("build-*"))) > builds:
            if later == "hang":
                time.sleep(3600)
            raise RuntimeError("no more of these")

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        if self._note(prompts) < self.times:
            if self.fate == "die":
                os._exit(1)
            time.sleep(3600)
        return super().score(images_BHWC, prompts)

    def _note(self, prompts: Sequence[Prompt]) -> int:
        """The number of this batch among those of all processes."""
        for number in itertools.count():
            with contextlib.suppress(FileExistsError), open(self.folder / f"batch-{number:03}", "x") as file:
                file.write(" ".join(prompt.id for prompt in prompts))
                return number
        raise AssertionError


class SociableScorer(CoinScorer):
    """Scores once as many batches are being scored at the same time as are `company`, whoever scores the others.

    Args:
        folder: where they find each other.
    """

    def __init__(self, folder: str, company: int) -> None:
        super().__init__()
        self.folder, self.company = Path(folder), company

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        (self.folder / f"here-{os.getpid()}").touch()
        for _ in range(600):
            if len(list(self.folder.glob("here-*"))) >= self.company:
                return super().score(images_BHWC, prompts)
            time.sleep(0.1)
        raise TimeoutError("nobody came")


class NamelessScorer:
    """Can be built, but lacks what the protocol asks for."""

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        return [0.0] * len(prompts)


def brightness(images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt], scale: float = 255) -> list[float]:
    """A function as scorer."""
    return [float(image.mean() / scale) for image, _ in zip(images_BHWC, prompts, strict=True)]
