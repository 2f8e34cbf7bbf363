"""LAION's aesthetic predictor: a small head on CLIP's vector of an image. A `Scorer`; the CLIP is `clip.py`'s."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kto_ray.errors import UserError
from kto_ray.identity import Noted
from kto_ray.records import Prompt
from kto_ray.score.protocol import check_batch
from kto_ray.score.scorers.clip import Clip
from kto_ray.score.scorers.weights import find_file, load_weights, read_weights

CLIP = "openai/clip-vit-large-patch14"
REPOSITORY, FILENAME = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
WIDTH = 768  # of the vectors of CLIP ViT-L/14


class Aesthetic:
    """How much people would like an image, whatever its prompt: a rating from about 1 to 10, mostly 4 to 7.

    The improved-aesthetic-predictor of LAION (Schuhmann 2022): layers without activations on the unit vector of CLIP
    ViT-L/14. Thresholds in use: 5 (the data set LAION-Aesthetics 5+), 7 (the synthetic user of Diffusion-KTO,
    appendix C). Licence: Apache-2.0, CLIP MIT.

    The authors' file of the head is sac+logos+ava1-l14-linearMSE.pth of the GitHub repository
    christophschuhmann/improved-aesthetic-predictor; on the hub it is mirrored for TRL's DDPO example, renamed.

    Args:
        checkpoint: file of the head (.pth or .safetensors with "layers.0.weight" to "layers.7.bias"); None:
            aesthetic-model.pth of trl-lib/ddpo-aesthetic-predictor.
        device: "auto", "cpu", "cuda".
        dtype: "float32", "bfloat16" or "float16", of CLIP; the head runs in float32.
        clip: folder or hub name of CLIP ViT-L/14, in the layout of transformers; None: openai/clip-vit-large-patch14.

    Raises:
        UserError: see `Clip`, `find_file` and `load_weights`; or `clip` is a CLIP of another width.
    """

    name = "aesthetic"
    version = "1"

    def __init__(
        self,
        checkpoint: str | None = None,
        device: Noted[str] = "auto",
        dtype: str = "float32",
        clip: str | None = None,
    ) -> None:
        path = find_file(checkpoint, REPOSITORY, FILENAME)
        self.head = build_head()
        load_weights(self.head, path, read_weights(path))
        self.clip = Clip(clip or CLIP, device, dtype, texts=False)
        if self.clip.width != WIDTH:
            raise UserError(f"clip {clip} gives vectors of {self.clip.width}, the aesthetic predictor reads {WIDTH}")
        self.head.to(self.clip.device)

    @torch.inference_mode()
    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        check_batch(images_BHWC, prompts)
        if not prompts:
            return []
        ratings: list[float] = self.head(self.clip.embed_images(images_BHWC)).squeeze(-1).tolist()
        return ratings


def build_head() -> nn.Module:
    """The head with the names of its file; the dropouts do nothing but number the layers."""
    layers = nn.Sequential(
        nn.Linear(WIDTH, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    return nn.Sequential(OrderedDict(layers=layers)).eval()
