"""Stable Diffusion 1.x and 2.x, as a family; see `families.py`.

Shape suffixes: B samples; T, D tokens and width of a text embedding; C, H, W latent channels, height, width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.layouts import LAYOUTS
from kto_ray.diffusion.noise import DiscreteDiffusion, NoiseProcess

WITHOUT: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "requires_safety_checker": False,
}
"""A safety checker would replace images by black ones, which are no samples of the policy."""


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a U-Net under one CLIP text encoder; epsilon or v prediction."""

    layout = LAYOUTS["StableDiffusionPipeline"]

    def __init__(self, pipeline: StableDiffusionPipeline, noise: NoiseProcess) -> None:
        self.pipeline = pipeline
        self.noise = noise

    @classmethod
    def load(cls, folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype) -> "StableDiffusion":
        diffusers_logging.disable_progress_bar()  # five components, loaded by every actor: no news
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            **WITHOUT,
            local_files_only=True,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            module.requires_grad_(False).eval()
        return cls(pipeline, DiscreteDiffusion.from_folder(folder))

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.pipeline.unet
        return unet

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """`text` (B, T, D): the text encoder's last hidden state, as the pipeline itself makes it."""
        tokens = self.pipeline.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        text_BTD: Tensor = self.pipeline.text_encoder(tokens.to(self.pipeline.text_encoder.device))[0]
        return Conditioning({"text": text_BTD})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        text_BTD = text_B.tensors["text"]
        prediction_BCHW: Tensor = denoiser(noisy_BCHW, timesteps_B, text_BTD, return_dict=False)[0]
        return prediction_BCHW
