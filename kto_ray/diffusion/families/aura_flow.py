"""AuraFlow: a transformer under UMT5. See `family.py`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, decode_upcast
from kto_ray.diffusion.geometry import Geometry


class AuraFlow(Family):
    """`text` (P, T, D), zeros beyond the prompt's end."""

    reads = {"tokenizer": 256}

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        """The pipeline draws 1024 pixels unless told otherwise, whatever its network's configuration says."""
        return replace(super().geometry_of(folder), pixels=(1024, 1024))

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD = self.pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)[0]
        return Conditioning({"text": text_PTD})

    def prompted(self, text_B: Conditioning) -> dict[str, Any]:
        """The mask is asked for, and nobody looks at it."""
        text_BTD = text_B.tensors["text"]
        return {"prompt_embeds": text_BTD, "prompt_attention_mask": text_BTD.new_ones(text_BTD.shape[:2])}

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        prediction_BCHW: Tensor = denoiser(
            noisy_BCHW, encoder_hidden_states=text_B.tensors["text"], timestep=timesteps_B, return_dict=False
        )[0]
        return prediction_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """By the autoencoder of Stable Diffusion XL."""
        vae = self.pipeline.vae
        return decode_upcast(vae, latents_BCHW / vae.config.scaling_factor)
