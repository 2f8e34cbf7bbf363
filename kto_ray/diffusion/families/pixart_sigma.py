"""PixArt-Sigma: a transformer of the discrete kind under T5; every weight is trained, it takes no adapters. See
`family.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.noise import DiscreteDiffusion


class PixArtSigma(Family):
    """`text` (P, T, D); `mask` (P, T): 1 where it is of the prompt."""

    process = DiscreteDiffusion
    reads = {"tokenizer": 300}
    embeddings = {"text": "prompt_embeds", "mask": "prompt_attention_mask"}
    takes_adapters = False
    # Otherwise images of other sizes than trained on are drawn in the nearest such size, and scaled; and captions are
    # cleaned by a library that need not be there. What guidance contrasts with is given encoded.
    arguments = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        text_PTD, mask_PT, _, _ = self.pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
        return Conditioning({"text": text_PTD, "mask": mask_PT})

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        prediction_BCHW: Tensor = denoiser(
            noisy_BCHW,
            encoder_hidden_states=text_B.tensors["text"],
            encoder_attention_mask=text_B.tensors["mask"],
            timestep=timesteps_B,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return prediction_BCHW.chunk(2, dim=1)[0]  # the other half is the variance
