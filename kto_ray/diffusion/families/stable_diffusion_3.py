"""Stable Diffusion 3 and 3.5: a transformer under two CLIP text encoders and T5. See `family.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family


class StableDiffusion3(Family):
    """`text` (P, T, D): tokens of CLIP, then of T5 (zeros without it); `pooled` (P, E): of both CLIPs."""

    left_out = {"feature_extractor": None, "image_encoder": None}
    reads = {"tokenizer_3": 256, "tokenizer": None}
    embeddings = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}

    @classmethod
    def target_modules(cls, denoiser: Mapping[str, Any]) -> tuple[str, ...]:
        own = "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
        return tuple(f"attn.{name}" for name in own)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD, _, pooled_PE, _ = self.pipeline.encode_prompt(
            list(texts), None, None, do_classifier_free_guidance=False
        )
        return Conditioning({"text": text_PTD, "pooled": pooled_PE})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        text_BTD, pooled_BE = text_B.tensors["text"], text_B.tensors["pooled"]
        prediction_BCHW: Tensor = denoiser(noisy_BCHW, text_BTD, pooled_BE, timesteps_B * 1000, return_dict=False)[0]
        return prediction_BCHW
