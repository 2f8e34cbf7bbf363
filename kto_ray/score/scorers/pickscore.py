"""PickScore: a CLIP fine-tuned on people's choices between two images. A `Scorer`; the model is `clip.py`'s."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.identity import Noted
from kto_ray.records import Prompt
from kto_ray.score.scorers.clip import Clip

CHECKPOINT = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """Which image people would pick for a prompt: exp(logit_scale) * cos(image, text), mostly 17 to 25.

    The score of the model card (Kirstain et al. 2023, arXiv 2305.01569), before its softmax over the images of one
    prompt. It was trained to compare images of one prompt, so that there is no natural threshold: use prompt_quantile,
    or round_quantile. Licence: MIT for the authors' code and for the CLIP that was fine-tuned; the model card states
    none for the weights.

    Args:
        checkpoint: folder or hub name of the model, in the layout of transformers; None: yuvalkirstain/PickScore_v1.
        device: "auto", "cpu", "cuda".
        dtype: "float32", "bfloat16" or "float16".
        processor: folder or hub name with tokenizer and preprocessor_config.json; None: the checkpoint itself if one
            is given (a download of the hub repository has both), else, as on the model card,
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    Raises:
        UserError: see `Clip`.
    """

    name = "pickscore"
    version = "1"

    def __init__(
        self,
        checkpoint: str | None = None,
        device: Noted[str] = "auto",
        dtype: str = "float32",
        processor: str | None = None,
    ) -> None:
        self.clip = Clip(checkpoint or CHECKPOINT, device, dtype, processor or checkpoint or PROCESSOR)

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        scores: list[float] = (self.clip.scale * self.clip.cosines(images_BHWC, prompts)).tolist()
        return scores
