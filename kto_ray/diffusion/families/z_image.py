"""Z-Image: a transformer over latents and captions of any length. See `family.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of, shrink_of
from kto_ray.diffusion.geometry import Geometry


class ZImage(Family):
    """`text` (P, T, D), as long as the longest caption; `length` (P,) int64: tokens of each."""

    reads = {"tokenizer": 512 - 12}  # less the chat's own
    noise_dtype = torch.float32

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        return Geometry(config_of(folder, cls.part)["in_channels"], shrink_of(folder), (1024, 1024), patch=2)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        # A list of its own: the pipeline writes its template into the one that it is given.
        rows = self.pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)[0]
        length_P = torch.tensor([len(row_TD) for row_TD in rows])
        return Conditioning({"text": pad_sequence(rows, batch_first=True), "length": length_P})

    def guided(self, scale: float) -> dict[str, Any]:
        """The pipeline adds this much of the contrast to what it would draw anyway: 0 is none."""
        return {"guidance_scale": scale - 1}

    def prompted(self, text_B: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": self._captions(text_B)}

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        images = list(noisy_BCHW[:, :, None])  # films of one frame
        # Time runs from noise to image, and so does the prediction.
        predictions = denoiser(images, 1 - timesteps_B, self._captions(text_B), return_dict=False)[0]
        return -torch.stack(predictions)[:, :, 0]

    def _captions(self, text_B: Conditioning) -> list[Tensor]:
        """Without what fills them up."""
        lengths = text_B.tensors["length"].tolist()
        return [text_TD[:length] for text_TD, length in zip(text_B.tensors["text"], lengths, strict=True)]
