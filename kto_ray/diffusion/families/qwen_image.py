"""Qwen-Image: a transformer over packed latents under a vision-language model. See `family.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of, encode_upcast, mean_and_spread
from kto_ray.diffusion.geometry import Geometry
from kto_ray.diffusion.packing import pack, unpack

TOKENS = 512
"""As the pipeline's call has it; its `encode_prompt` alone would take 1024."""


class QwenImage(Family):
    """`text` (P, T, D), as long as the longest prompt; `mask` (P, T) int64: 1 where it is of the prompt."""

    reads = {"tokenizer": TOKENS}
    leaves_unused = True  # what the last block makes of the text
    embeddings = {"text": "prompt_embeds", "mask": "prompt_embeds_mask"}

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        shrink = 2 ** len(config_of(folder, "vae")["temperal_downsample"])  # so in diffusers
        return Geometry(config_of(folder, cls.part)["in_channels"] // 4, shrink, (128 * shrink, 128 * shrink), patch=2)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD, mask_PT = self.pipeline.encode_prompt(list(texts), max_sequence_length=TOKENS)
        if mask_PT is None:  # all of it is
            mask_PT = torch.ones(text_PTD.shape[:2], dtype=torch.int64, device=text_PTD.device)
        return Conditioning({"text": text_PTD, "mask": mask_PT.long()})

    def guided(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale}

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        height, width = noisy_BCHW.shape[-2:]
        text_BTD, mask_BT = text_B.tensors["text"], text_B.tensors["mask"]
        longest = int(mask_BT.sum(1).max())  # of these prompts; those of the round may be longer
        text_BTD, mask_BT = text_BTD[:, :longest], mask_BT[:, :longest]
        prediction_BTD: Tensor = denoiser(
            hidden_states=pack(noisy_BCHW),
            encoder_hidden_states=text_BTD,
            encoder_hidden_states_mask=None if mask_BT.all() else mask_BT,
            timestep=timesteps_B,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy_BCHW),
            return_dict=False,
        )[0]
        return unpack(prediction_BTD, height, width)

    def latents_of(self, made: Tensor, height: int, width: int) -> Tensor:
        return unpack(made, height, width)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean_1C11, std_1C11 = mean_and_spread(vae, latents_BCHW)
        frame_BC1HW = (latents_BCHW * std_1C11 + mean_1C11)[:, :, None].to(vae.dtype)  # a film of one frame
        decoded_BCHW: Tensor = vae.decode(frame_BC1HW, return_dict=False)[0][:, :, 0]
        return decoded_BCHW

    def encode(self, images_B3HW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        vae = self.pipeline.vae
        raw_BC1HW = encode_upcast(vae, images_B3HW[:, :, None], generators)
        mean_1C11, std_1C11 = mean_and_spread(vae, raw_BC1HW)
        return (raw_BC1HW[:, :, 0] - mean_1C11) / std_1C11
