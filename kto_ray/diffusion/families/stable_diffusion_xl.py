"""Stable Diffusion XL: a U-Net under two CLIP text encoders, told the size of the image. See `family.py`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.families.stable_diffusion import require_undistilled
from kto_ray.diffusion.family import Family, decode_upcast, encode_upcast, mean_and_spread
from kto_ray.diffusion.noise import DiscreteDiffusion


class StableDiffusionXL(Family):
    """`text` (P, T, D): both encoders' last hidden states but one; `pooled` (P, E): the second one's projection."""

    part = "unet"
    process = DiscreteDiffusion
    aligned = "StableDiffusionXLTimesteps"
    left_out = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    embeddings = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}

    @classmethod
    def check(cls, folder: Path) -> None:
        require_undistilled(folder)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD, _, pooled_PE, _ = self.pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
        return Conditioning({"text": text_PTD, "pooled": pooled_PE})

    def nothing(self) -> Conditioning:
        """Zeros, or the empty prompt, as the folder says."""
        empty = self.encode_prompts([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning({name: torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        text_BTD = text_B.tensors["text"]
        height, width = (side * self.geometry.shrink for side in noisy_BCHW.shape[-2:])
        # Original size, offset of the cut, target size: as the pipeline says them of an image that it draws.
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=text_BTD.dtype, device=noisy_BCHW.device)
        more = {"text_embeds": text_B.tensors["pooled"], "time_ids": sizes.expand(len(noisy_BCHW), -1)}
        prediction_BCHW: Tensor = denoiser(
            noisy_BCHW, timesteps_B, text_BTD, added_cond_kwargs=more, return_dict=False
        )[0]
        return prediction_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """As the pipeline does: by the autoencoder's own mean and spread where it has them, and in float32 where it
        would overflow in float16."""
        vae = self.pipeline.vae
        raw_BCHW = latents_BCHW / vae.config.scaling_factor
        if self._has_statistics:
            mean_1C11, std_1C11 = mean_and_spread(vae, raw_BCHW)
            raw_BCHW = raw_BCHW * std_1C11 + mean_1C11
        return decode_upcast(vae, raw_BCHW)

    def encode(self, images_B3HW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        vae = self.pipeline.vae
        raw_BCHW = encode_upcast(vae, images_B3HW, generators)
        if self._has_statistics:
            mean_1C11, std_1C11 = mean_and_spread(vae, raw_BCHW)
            raw_BCHW = (raw_BCHW - mean_1C11) / std_1C11
        return raw_BCHW * float(vae.config.scaling_factor)

    @property
    def _has_statistics(self) -> bool:
        config = self.pipeline.vae.config
        return all(getattr(config, name, None) is not None for name in ("latents_mean", "latents_std"))
