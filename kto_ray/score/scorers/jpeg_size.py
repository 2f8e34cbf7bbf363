"""How well an image compresses: the simplest reward of DDPO, good for trying out a loop. A `Scorer`."""

import io
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.protocol import check_batch

Goal = Literal["compressible", "incompressible"]
QUALITY = 95  # of DDPO's experiments


class JpegSize:
    """The size of the image as JPEG of quality 95, in kB (1000 bytes); negative where small is good.

    Black et al. 2023 (arXiv 2305.13301). Sizes compare only between images of one resolution. No natural threshold:
    use round_quantile. Does not look at the prompt.

    Args:
        goal: "compressible" (the score is minus the size) or "incompressible" (the score is the size).

    Raises:
        UserError: another goal.
    """

    name = "jpeg_size"
    version = "1"

    def __init__(self, goal: Goal = "compressible") -> None:
        if goal not in get_args(Goal):
            raise UserError(f"goal {goal!r} is not one of {', '.join(get_args(Goal))}")
        self.sign = -1 if goal == "compressible" else 1

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        check_batch(images_BHWC, prompts)
        return [self.sign * jpeg_bytes(image_HWC) / 1000 for image_HWC in images_BHWC]


def jpeg_bytes(image_HWC: npt.NDArray[np.uint8]) -> int:
    """How many bytes a uint8 RGB image has as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "jpeg", quality=QUALITY)
    return buffer.tell()
