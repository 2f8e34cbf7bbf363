"""Stable Diffusion 1.x and 2.x: a U-Net under one CLIP text encoder; epsilon or v prediction. See `family.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of
from kto_ray.diffusion.noise import DiscreteDiffusion
from kto_ray.errors import UserError


class StableDiffusion(Family):
    """`text` (P, T, D): the text encoder's last hidden state."""

    part = "unet"
    process = DiscreteDiffusion
    aligned = "StableDiffusionTimesteps"
    # A safety checker would replace images by black ones, which are no samples of the policy.
    left_out = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }

    @classmethod
    def check(cls, folder: Path) -> None:
        require_undistilled(folder)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD = self.pipeline.encode_prompt(list(texts), self.device, 1, False)[0]
        return Conditioning({"text": text_PTD})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        prediction_BCHW: Tensor = denoiser(noisy_BCHW, timesteps_B, text_B.tensors["text"], return_dict=False)[0]
        return prediction_BCHW


def require_undistilled(folder: Path) -> None:
    """Raises UserError: a U-Net that is told the guidance (LCM), which no noise process here trains."""
    unet: dict[str, Any] = config_of(folder, "unet")
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"model.name: {folder} was distilled to draw in a few steps (LCM), and would be trained out of it; give "
            "the model that it was distilled from"
        )
