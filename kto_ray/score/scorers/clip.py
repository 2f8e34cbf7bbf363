"""What `ClipScore`, `PickScore` and `Aesthetic` share: a CLIP with its own preprocessing, and unit vectors out of it.

Weights come from a folder in the layout of transformers, or from the hub. How images are resized, cropped and
normalised stands in the preprocessor_config.json beside them, and is done by Pillow and numpy: there is no torchvision
here. transformers fills what a checkpoint lacks with random numbers and a warning; here that is a `UserError`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.protocol import check_batch
from kto_ray.score.scorers.weights import pick_device, pick_dtype

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Clip:
    """A `CLIPModel` and what turns images and texts into its inputs.

    Args:
        checkpoint: folder with config.json and weights, or hub name.
        device, dtype: where and in what the towers run; vectors come out in float32.
        processor: folder or hub name with tokenizer and preprocessor_config.json; None: the checkpoint.
        texts: False leaves out the text tower and the tokenizer.

    Attributes:
        scale: the temperature that the model learned, exp(logit_scale).
        width: D of the vectors.

    Raises:
        UserError: a file is missing, truncated or of another model; the message names the folder.
    """

    def __init__(
        self, checkpoint: str, device: str, dtype: str, processor: str | None = None, texts: bool = True
    ) -> None:
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        processor = processor or checkpoint
        self.images = load(processor, "preprocessor_config.json", CLIPImageProcessorPil.from_pretrained)
        self.tokenizer = load(processor, "the tokenizer", CLIPTokenizer.from_pretrained) if texts else None
        model = load_model(checkpoint)
        self.tokens: int = model.config.text_config.max_position_embeddings
        known = model.config.text_config.vocab_size
        # transformers makes up a tokenizer of special tokens alone where its files are missing.
        if self.tokenizer is not None and len(self.tokenizer) != known:
            raise UserError(
                f"the tokenizer of {processor} has {len(self.tokenizer)} tokens, the model {checkpoint} has {known}: "
                "its files are missing, or it is another model's"
            )
        self.width: int = model.config.projection_dim
        # Cast only now: half precision would round the temperature, and move all scores by a percent.
        self.scale: float = model.logit_scale.detach().exp().item()
        if self.tokenizer is None:
            del model.text_model, model.text_projection
        self.model = model.to(self.device, self.dtype)

    def embed_images(self, images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
        """Unit vectors of shape (B, D), float32, of uint8 images of shape (B, H, W, 3); B is at least 1."""
        images = [Image.fromarray(image_HWC) for image_HWC in images_BHWC]
        pixels_BCHW = self.images(images, return_tensors="pt").pixel_values.to(self.device, self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels_BCHW).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of shape (B, D), float32; what is longer than the model's window (77 tokens) is cut off."""
        assert self.tokenizer is not None, "built with texts=False"
        tokens_BT = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens_BT.input_ids, attention_mask=tokens_BT.attention_mask
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    @torch.inference_mode()
    def cosines(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> Tensor:
        """Cosine of the angle between each image and its own prompt: shape (B,), in [-1, 1].

        Raises:
            ValueError: see `check_batch`.
        """
        check_batch(images_BHWC, prompts)
        if not prompts:
            return torch.empty(0)
        texts_BD = self.embed_texts([prompt.text for prompt in prompts])
        return (self.embed_images(images_BHWC) * texts_BD).sum(-1)


def load_model(checkpoint: str) -> Any:
    """A `CLIPModel` on the CPU in float32. Raises UserError where a weight is missing or has another shape."""
    from transformers import CLIPModel

    if Path(checkpoint).is_dir() and not (Path(checkpoint) / "config.json").is_file():
        raise UserError(f"checkpoint {checkpoint} has no config.json")  # transformers would make one up

    def from_pretrained(source: str) -> Any:
        return CLIPModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )

    model, report = load(checkpoint, "a CLIP", from_pretrained)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"checkpoint {checkpoint} has no {missing[0]!r}: it is not a checkpoint of this model")
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"checkpoint {checkpoint}: {name!r} has shape {tuple(found)}, its config.json wants {tuple(wanted)}"
        )
    return model


def load(source: str, what: str, from_pretrained: Callable[[str], Any]) -> Any:
    """`from_pretrained(source)`, or a UserError that names the source, whatever is wrong with it."""
    if not Path(source).is_dir() and not HUB_NAME.fullmatch(source):
        raise UserError(f"there is no folder {source}; give a folder in the layout of transformers, or a hub name")
    try:
        return from_pretrained(source)
    except Exception as error:  # whatever the readers of JSON, safetensors and the hub may raise
        kind = "folder" if Path(source).is_dir() else "hub repository (there is no folder of that name)"
        raise UserError(f"cannot load {what} of the {kind} {source}: {type(error).__name__}: {error}") from error
