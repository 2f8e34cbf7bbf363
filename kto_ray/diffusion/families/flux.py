"""FLUX.1, dev and schnell: a transformer over packed latents under CLIP and T5, told the guidance. See `family.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of, shrink_of
from kto_ray.diffusion.geometry import Geometry
from kto_ray.diffusion.packing import pack, unpack


class Flux(Family):
    """`text` (P, T, D): tokens of T5; `pooled` (P, E): of CLIP.

    There is no second prediction to contrast with: dev is told the guidance scale, in training the one that images are
    drawn with; schnell takes none.
    """

    left_out = {"feature_extractor": None, "image_encoder": None}
    reads = {"tokenizer_2": 512}
    embeddings = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    contrasts = False

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        shrink = shrink_of(folder)
        return Geometry(config_of(folder, cls.part)["in_channels"] // 4, shrink, (128 * shrink, 128 * shrink), patch=2)

    @classmethod
    def takes_guidance(cls, folder: Path) -> bool:
        return bool(config_of(folder, cls.part).get("guidance_embeds"))

    @classmethod
    def target_modules(cls, denoiser: Mapping[str, Any]) -> tuple[str, ...]:
        own = "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
        layers = "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"
        return (*(f"attn.{name}" for name in own), *layers)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD, pooled_PE, _ = self.pipeline.encode_prompt(list(texts), None)
        return Conditioning({"text": text_PTD, "pooled": pooled_PE})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        height, width = noisy_BCHW.shape[-2:]
        text_BTD = text_B.tensors["text"]
        told = self.denoiser.config.guidance_embeds  # type: ignore[union-attr]
        prediction_BTD: Tensor = denoiser(
            hidden_states=pack(noisy_BCHW),
            encoder_hidden_states=text_BTD,
            pooled_projections=text_B.tensors["pooled"],
            timestep=timesteps_B,
            img_ids=self.pipeline._prepare_latent_image_ids(
                1, height // 2, width // 2, noisy_BCHW.device, noisy_BCHW.dtype
            ),
            txt_ids=noisy_BCHW.new_zeros(text_BTD.shape[1], 3),
            guidance=noisy_BCHW.new_full((len(noisy_BCHW),), self.guidance_scale) if told else None,
            return_dict=False,
        )[0]
        return unpack(prediction_BTD, height, width)

    def latents_of(self, made: Tensor, height: int, width: int) -> Tensor:
        return unpack(made, height, width)
