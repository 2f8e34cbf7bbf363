"""A scorer, a function as scorer and a labeler to copy and change; docs/plugins.md walks through them."""

import asyncio
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.label.protocol import Labeler
from kto_ray.records import Prompt, Verdict
from kto_ray.samples import Samples
from kto_ray.score.protocol import check_batch


class Sharpness:
    """Variance of the Laplacian of the luma: 0 for a flat image, more the more fine detail or noise there is.

    Values in [0, 1040400]; 100 is the customary threshold between blurred and sharp photographs. Needs numpy only.

    Args:
        luma: weights of red, green and blue, by default those of Rec. 601.
    """

    name = "sharpness"
    version = "1"

    def __init__(self, luma: Sequence[float] = (0.299, 0.587, 0.114)) -> None:
        self.luma = np.asarray(luma, np.float32)

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for images of less than 3x3 pixels."""
        check_batch(images_BHWC, prompts)
        if min(images_BHWC.shape[1:3]) < 3:
            raise ValueError(f"sharpness needs images of at least 3x3 pixels, not {images_BHWC.shape[1:3]}")
        luma_BHW = images_BHWC @ self.luma
        middle_BHW = luma_BHW[:, 1:-1, 1:-1]
        beside_BHW = luma_BHW[:, 1:-1, :-2] + luma_BHW[:, 1:-1, 2:] + luma_BHW[:, :-2, 1:-1] + luma_BHW[:, 2:, 1:-1]
        variances_B: npt.NDArray[np.float64] = (beside_BHW - 4 * middle_BHW).var(axis=(1, 2), dtype=np.float64)
        return [float(variance) for variance in variances_B]


def daylight(images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
    """Mean brightness in [0, 255]; mean darkness where the prompt says "night"."""
    brightness_B = images_BHWC.mean(axis=(1, 2, 3))
    return [
        255 - brightness if "night" in prompt.text else brightness
        for brightness, prompt in zip(brightness_B.tolist(), prompts, strict=True)
    ]


class NeitherDarkNorGlaring(Labeler):
    """Yes to images whose mean brightness, in [0, 255], lies from `low` to `high`; answers at once.

    It remembers nothing over restarts: samples that were not judged then are submitted again.
    """

    name = "neither_dark_nor_glaring"

    def __init__(self, low: float = 60, high: float = 200) -> None:
        self.low, self.high = low, high
        self.seen: set[str] = set()
        self.verdicts: asyncio.Queue[list[Verdict]] = asyncio.Queue()

    async def submit(self, samples: Samples) -> None:
        pixels_BHWC = await samples.pixels_BHWC()
        new = {s.id: pixels_HWC for s, pixels_HWC in zip(samples, pixels_BHWC, strict=True) if s.id not in self.seen}
        self.seen.update(new)
        if new:
            self.verdicts.put_nowait([self.judge(*one) for one in new.items()])

    def judge(self, sample_id: str, pixels_HWC: npt.NDArray[np.uint8]) -> Verdict:
        pleasant = self.low <= pixels_HWC.mean() <= self.high
        rule = f"{self.low:g} <= mean brightness <= {self.high:g}"
        return Verdict(sample_id, "desirable" if pleasant else "undesirable", self.name, rule)

    async def collect(self) -> Sequence[Verdict]:
        return await self.verdicts.get()
