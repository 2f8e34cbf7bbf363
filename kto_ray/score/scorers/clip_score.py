"""CLIPScore: how near image and text lie to each other in CLIP's space. A `Scorer`; the model is `clip.py`'s."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.identity import Noted
from kto_ray.records import Prompt
from kto_ray.score.scorers.clip import Clip

CHECKPOINT = "openai/clip-vit-large-patch14"


class ClipScore:
    """How well an image fits its prompt: 100 * max(cos(image, text), 0), in [0, 100], mostly 15 to 35.

    Hessel et al. 2021 (arXiv 2104.08718) multiply by 2.5 and put "A photo depicts" before the text; this is the form
    that is in use, for instance in TorchMetrics: the factor 100, and the text as it stands. No natural threshold: use
    round_quantile. Licence: MIT.

    Args:
        checkpoint: folder or hub name of a CLIP in the layout of transformers; None: openai/clip-vit-large-patch14.
        device: "auto", "cpu", "cuda".
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        UserError: see `Clip`.
    """

    name = "clip_score"
    version = "1"

    def __init__(self, checkpoint: str | None = None, device: Noted[str] = "auto", dtype: str = "float32") -> None:
        self.clip = Clip(checkpoint or CHECKPOINT, device, dtype)

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        scores: list[float] = (100 * self.clip.cosines(images_BHWC, prompts)).clamp(min=0).tolist()
        return scores
