"""HPS v2: a CLIP fine-tuned on people's choices between images. A `Scorer` for the environment of the same name.

The package `hpsv2` has the model, its tokenizer and its preprocessing; its own `score` reads the checkpoint anew at
every call and takes one image at a time.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kto_ray.errors import UserError
from kto_ray.identity import Noted
from kto_ray.records import Prompt
from kto_ray.score.environments.finding import require
from kto_ray.score.protocol import check_batch
from kto_ray.score.scorers.blank import Unfilled, random_weights
from kto_ray.score.scorers.weights import find_file, load_weights, pick_device, pick_dtype, read_weights

ENVIRONMENT = "hpsv2"
REPOSITORY = "xswu/HPSv2"
FILENAMES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2:
    """Which image people would choose for a prompt: the cosine of image and prompt, mostly 0.2 to 0.35.

    Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341). It was trained to compare images of one prompt, so
    that there is no natural threshold: use prompt_quantile, or round_quantile. Scores of 2.0 and 2.1 do not compare.
    Licence: Apache-2.0, package (hpsv2) and weights. Runs in the environment "hpsv2".

    Args:
        checkpoint: file with the names of the authors'; None: HPS_v2.1_compressed.pt of xswu/HPSv2, or
            HPS_v2_compressed.pt for version 2.0.
        device: "auto", "cpu", "cuda".
        dtype: "float32", "bfloat16" or "float16", of the model; the authors use float16 on a GPU.
        version: "2.0" or "2.1".
        architecture: a CLIP among the package's model_configs, or a file like those.

    Raises:
        UserError: see `require`, `find_file` and `load_weights`; or version or architecture are unknown.
    """

    name = "hpsv2"
    version = "2.1"

    def __init__(
        self,
        checkpoint: str | None = None,
        device: Noted[str] = "auto",
        dtype: str = "float32",
        version: str = "2.1",
        architecture: str = "ViT-H-14",
    ) -> None:
        self.version = str(version)  # YAML reads 2.1 as a number
        if self.version not in FILENAMES:
            raise UserError(f"version {version!r} is not one of {', '.join(FILENAMES)}")
        require("hpsv2", ENVIRONMENT)  # before anything is downloaded
        self.device = pick_device(device)
        path = find_file(checkpoint, REPOSITORY, FILENAMES[self.version])
        model, self.tokenize, self.preprocess = build_model(architecture)
        load_weights(model, path, read_weights(path))
        self.model = model.to(self.device, pick_dtype(dtype))

    @torch.inference_mode()
    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        check_batch(images_BHWC, prompts)
        if not prompts:
            return []
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        rows = {text: row for row, text in enumerate(texts)}
        texts_BD = self.embed_texts(texts)[[rows[prompt.text] for prompt in prompts]]
        scores: list[float] = (self.embed_images(images_BHWC) * texts_BD).sum(-1).tolist()
        return scores

    def embed_images(self, images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
        """Unit vectors of shape (B, D), float32, of uint8 images of shape (B, H, W, 3)."""
        pixels_BCHW = torch.stack([self.preprocess(Image.fromarray(image_HWC)) for image_HWC in images_BHWC])
        vectors_BD = self.model.encode_image(pixels_BCHW.to(self.device, self.model.text_projection.dtype))
        return F.normalize(vectors_BD.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of shape (B, D), float32; what is longer than 77 tokens is cut off.

        The package runs all 77 places. A text is read off at its end, and attention looks back only: those after the
        longest end are left out.
        """
        model = self.model
        tokens_BT = self.tokenize(list(texts), context_length=len(model.positional_embedding)).to(self.device)
        ends_B = tokens_BT.argmax(-1)  # the end of a text is the token with the highest number
        length = int(ends_B.max()) + 1
        hidden_BTD = model.token_embedding(tokens_BT[:, :length]) + model.positional_embedding[:length]
        hidden_TBD = model.transformer(hidden_BTD.transpose(0, 1), attn_mask=model.attn_mask[:length, :length])
        texts_BD = model.ln_final(hidden_TBD[ends_B, torch.arange(len(texts))]) @ model.text_projection
        return F.normalize(texts_BD.float(), dim=-1)


def build_model(architecture: str) -> tuple[Any, Any, Any]:
    """Model without weights, tokenizer and preprocessing of an architecture: a name, or the path of a JSON file."""
    open_clip = require("hpsv2.src.open_clip", ENVIRONMENT)
    if architecture.endswith(".json"):
        if not Path(architecture).is_file():
            raise UserError(f"architecture {architecture} does not exist")
        open_clip.add_model_config(architecture)
        architecture = Path(architecture).stem
    if architecture not in open_clip.list_models():
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(f"architecture {architecture!r} is not in the package's model_configs{suggestion}")
    with Unfilled():
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, light_augmentation=True)
    return model.eval(), open_clip.get_tokenizer(architecture), preprocess


def random_checkpoint(folder: Path, full: bool = False) -> dict[str, Any]:
    """Write a checkpoint with random content; gives a scorer's arguments. It is tiny, or with `full` of true size."""
    architecture = "ViT-H-14"
    if not full:
        architecture = str(folder / "tiny.json")
        vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
        text = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 32, "heads": 2}
        Path(architecture).write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    checkpoint = folder / "HPS_v2.1_compressed.pt"
    weights = random_weights(build_model(architecture)[0])
    if full:  # a file of the true size, 4 GB: how long it takes to read matters to who reads it often
        weights = {name: value.clone() for name, value in weights.items()}
    torch.save({"state_dict": weights}, checkpoint)
    return {"checkpoint": str(checkpoint), "architecture": architecture}
