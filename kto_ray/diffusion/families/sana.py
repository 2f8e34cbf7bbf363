"""SANA: a linear transformer over latents that are 32 times smaller than the image. See `family.py`."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of, shrink_of
from kto_ray.diffusion.geometry import Geometry


class Sana(Family):
    """`text` (P, T, D) of Gemma under the pipeline's instruction; `mask` (P, T): 1 where it is of the prompt."""

    reads = {"tokenizer": 300}
    noise_dtype = torch.float32
    embeddings = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    # Otherwise images of other sizes than trained on are drawn in the nearest such size, and scaled.
    # And what guidance contrasts with is given encoded, in the place of the empty prompt.
    arguments = {"use_resolution_binning": False, "negative_prompt": None}

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        shrink = shrink_of(folder, "encoder_block_out_channels")
        denoiser = config_of(folder, cls.part)
        side = denoiser["sample_size"] * shrink
        # The pipeline takes multiples of 32 only, whatever the autoencoder.
        patch = max(denoiser["patch_size"], 32 // shrink)
        return Geometry(denoiser["in_channels"], shrink, (side, side), patch)

    @classmethod
    def target_modules(cls, denoiser: Mapping[str, Any]) -> tuple[str, ...]:
        return "to_q", "to_k", "to_v"

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        # The instruction to rewrite a prompt is a default of the pipeline's call, not of its `encode_prompt`.
        call = inspect.signature(type(self.pipeline).__call__).parameters
        return self._encode(texts, call["complex_human_instruction"].default)

    def nothing(self) -> Conditioning:
        """The empty prompt, without an instruction."""
        return self._encode([""], None)

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        scale: float = self.denoiser.config.timestep_scale  # type: ignore[union-attr, assignment]
        prediction_BCHW: Tensor = denoiser(
            noisy_BCHW,
            encoder_hidden_states=text_B.tensors["text"],
            encoder_attention_mask=text_B.tensors["mask"],
            timestep=timesteps_B * 1000 * scale,
            return_dict=False,
        )[0]
        return prediction_BCHW

    def _encode(self, texts: Sequence[str], instruction: Any) -> Conditioning:
        text_PTD, mask_PT, _, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, complex_human_instruction=instruction
        )
        return Conditioning({"text": text_PTD, "mask": mask_PT})
