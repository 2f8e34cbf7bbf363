"""Lumina-Image 2.0: a transformer over latents and the tokens of Gemma. See `family.py`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of
from kto_ray.diffusion.geometry import Geometry

SHRINK = 8
"""So in diffusers, whatever the autoencoder."""


class Lumina2(Family):
    """`text` (P, T, D) under the pipeline's system prompt; `mask` (P, T): 1 where it is of the prompt."""

    reads = {"tokenizer": 256 - 32}  # less the system prompt
    embeddings = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        denoiser = config_of(folder, cls.part)
        side = denoiser["sample_size"] * SHRINK
        return Geometry(denoiser["in_channels"], SHRINK, (side, side), patch=2)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD, mask_PT, _, _ = self.pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
        return Conditioning({"text": text_PTD, "mask": mask_PT})

    @torch.no_grad()
    def nothing(self) -> Conditioning:
        """The empty prompt, without the system prompt that all others have."""
        text_1TD, mask_1T = self.pipeline._get_gemma_prompt_embeds([""])
        return Conditioning({"text": text_1TD, "mask": mask_1T})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        # Time runs from noise to image, and so does the prediction.
        prediction_BCHW: Tensor = denoiser(
            hidden_states=noisy_BCHW,
            timestep=1 - timesteps_B,
            encoder_hidden_states=text_B.tensors["text"],
            encoder_attention_mask=text_B.tensors["mask"],
            return_dict=False,
        )[0]
        return -prediction_BCHW
