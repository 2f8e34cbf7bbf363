"""Somebody who likes red images: the synthetic user of Diffusion-KTO's appendix C. A `Scorer`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.records import Prompt
from kto_ray.score.protocol import check_batch


class Redness:
    """Mean of the red channel minus mean of all channels, of intensities in [0, 1].

    From -2/3 (all cyan) to 2/3 (all red); gray is 0, the natural threshold: above it there is more red than green and
    blue on average. Li et al. 2024 (arXiv 2404.04465), appendix C. Does not look at the prompt.
    """

    name = "redness"
    version = "1"

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        check_batch(images_BHWC, prompts)
        means_BC = images_BHWC.mean(axis=(1, 2)) / 255
        redness: list[float] = (means_BC[:, 0] - means_BC.mean(axis=1)).tolist()
        return redness
