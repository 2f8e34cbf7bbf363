"""FLUX.2, dev and Klein: a transformer under a language model, over the autoencoder's normalised 2 x 2 patches. See
`family.py`.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family, config_of, encode_upcast, index_of, shrink_of
from kto_ray.diffusion.geometry import Geometry
from kto_ray.errors import UserError


class Flux2(Family):
    """FLUX.2 dev, which is told the guidance, in training that with which images are drawn.

    `text` (P, T, D): three layers' hidden states of the language model.
    """

    reads = {"tokenizer": 512 - 40}  # less what the pipeline says besides
    contrasts = False

    @classmethod
    def check(cls, folder: Path) -> None:
        if "Processor" in index_of(folder)["tokenizer"][1] and find_spec("torchvision") is None:
            raise UserError(
                f"model.name: {folder} reads prompts with a processor that needs torchvision, which is not installed; "
                "pip install torchvision"
            )

    @classmethod
    def geometry_of(cls, folder: Path) -> Geometry:
        # 128 cells of the autoencoder are what the pipelines draw unless told otherwise.
        shrink = shrink_of(folder)
        return Geometry(config_of(folder, cls.part)["in_channels"], 2 * shrink, (128 * shrink, 128 * shrink))

    @classmethod
    def target_modules(cls, denoiser: Mapping[str, Any]) -> tuple[str, ...]:
        # "attn.to_out" alone would also name the lists of the double blocks.
        single = (f"single_transformer_blocks.{index}.attn.to_out" for index in range(denoiser["num_single_layers"]))
        return ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", *single)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning({"text": self.pipeline.encode_prompt(list(texts))[0]})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        text_BTD = text_B.tensors["text"]
        told = self.denoiser.config.guidance_embeds  # type: ignore[union-attr]
        prediction_BTC: Tensor = denoiser(
            hidden_states=noisy_BCHW.flatten(2).mT,
            encoder_hidden_states=text_BTD,
            timestep=timesteps_B,
            img_ids=self.pipeline._prepare_latent_ids(noisy_BCHW).to(noisy_BCHW.device),
            txt_ids=self.pipeline._prepare_text_ids(text_BTD).to(noisy_BCHW.device),
            guidance=noisy_BCHW.new_full((len(noisy_BCHW),), self.guidance_scale) if told else None,
            return_dict=False,
        )[0]
        return prediction_BTC.mT.reshape(noisy_BCHW.shape)

    def latents_of(self, made: Tensor, height: int, width: int) -> Tensor:
        return made.mT.reshape(len(made), self.geometry.channels, height, width)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        mean_1C11, std_1C11 = self._statistics(latents_BCHW)
        raw_BCHW = self.pipeline._unpatchify_latents(latents_BCHW * std_1C11 + mean_1C11)
        vae = self.pipeline.vae
        decoded_BCHW: Tensor = vae.decode(raw_BCHW.to(vae.dtype), return_dict=False)[0]
        return decoded_BCHW

    def encode(self, images_B3HW: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        return self._normalised(encode_upcast(self.pipeline.vae, images_B3HW, generators))

    def _normalised(self, raw_BCHW: Tensor) -> Tensor:
        """What the autoencoder gives, as the denoiser was trained on it: patches, less their mean, by their spread."""
        mean_1C11, std_1C11 = self._statistics(raw_BCHW)
        normalised_BCHW: Tensor = (self.pipeline._patchify_latents(raw_BCHW) - mean_1C11) / std_1C11
        return normalised_BCHW

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of the autoencoder's patches, (1, C, 1, 1), where the latents are."""
        vae = self.pipeline.vae
        mean_C, variance_C = (values_C.to(like.device) for values_C in (vae.bn.running_mean, vae.bn.running_var))
        spread_C = (variance_C + vae.config.batch_norm_eps).sqrt()
        return mean_C[None, :, None, None], spread_C[None, :, None, None]


class Flux2Klein(Flux2):
    """FLUX.2 Klein: guided by contrast with the empty prompt, unless it was distilled to a few steps."""

    contrasts = True

    @classmethod
    def takes_guidance(cls, folder: Path) -> bool:
        return not index_of(folder).get("is_distilled", False)

    def latents_of(self, made: Tensor, height: int, width: int) -> Tensor:
        """This pipeline gives what its autoencoder wants."""
        return self._normalised(made)
