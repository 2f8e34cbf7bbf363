"""Drawing images: any diffusers scheduler that fits, guidance, one seed an image.

Used by `generate/replica.py`. The latent that comes out of the sampler is kept as the training sample; pixels are its
decoding.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kto_ray.config import Generate, RunConfig, shaping
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.geometry import image_size
from kto_ray.diffusion.schedulers import scheduler_for
from kto_ray.diffusion.texts import Texts


def drawing_digest(config: RunConfig, components: Mapping[str, str]) -> str:
    """SHA-256 over everything that shapes an image besides prompt, seed and the policy's weights.

    Args:
        components: digest of each component of the base model.
    """
    shapes = shaping(config.generate)
    shapes |= {"base": dict(components), "adapter": config.train.adapter.model_dump(mode="json")}
    if prefixes := config.train.objective.needs.prefixes:
        shapes["prefix"] = prefixes[0]
    if held_out := config.held_out_otherwise:
        shapes["held_out"] = held_out
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def as_asked(config: RunConfig, prompts: Sequence[str], policy_version: int) -> list[str]:
    """Prompts as this policy is asked for them: with the prefix of desirable images, where it was trained with one."""
    prefixes = config.train.objective.needs.prefixes
    prefix = prefixes[0] if prefixes and policy_version else ""
    return [prefix + prompt for prompt in prompts]


def initial_noise(seed: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The noise that `draw` begins an image of this seed with, float32 of this shape (C, h, w).

    Args:
        dtype: that the pipeline draws noise in, see `Family.noise_dtype`.
    """
    noise_1CHW = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
    return noise_1CHW[0].float()


DECODED_PIXELS = 1024 * 1024
"""At once: to decode an image of this size takes gigabytes."""


@torch.no_grad()  # weights that an offloading pipeline moves in inference mode could not be loaded anew outside it
def draw(
    family: Family, texts: Texts, prompts: Sequence[str], seeds: Sequence[int], settings: Generate
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Draw one image a (prompt, seed), with the scheduler of the settings.

    Every image has a noise generator of its own, on the CPU whatever the model's device, so that its noise follows from
    its seed alone: not from the batch, the replica or the GPU that it was drawn on.

    Returns:
        Clean latents float32 (B, C, h, w), scaled as the denoiser was trained; pixels uint8 (B, H, W, 3); and whether
        all of an image's latents and decoded pixels are finite numbers, bool (B,). Where they are not, as happens in
        float16, pixels are 0.

    Raises:
        UserError: the scheduler cannot sample the model.
    """
    # From the pipeline's own: one made of another that took its place would inherit what that one was told.
    family.pipeline.scheduler = scheduler_for(family.scheduler, settings.scheduler, settings.scheduler_args)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    device, dtype = family.device, family.pipeline.dtype
    text_B, nothing_1 = (encoded.to(device, dtype) for encoded in (texts.encode(prompts), texts.nothing()))
    latents_BCHW = family.sample(text_B, nothing_1, generators, settings)
    height, width = image_size(settings, family.geometry)
    at_once = max(1, DECODED_PIXELS // (height * width))
    decoded_BCHW = torch.cat([family.decode(part_BCHW) for part_BCHW in torch.split(latents_BCHW, at_once)])
    # Looked at before pixels are clamped, which would hide an infinity.
    finite_B = (latents_BCHW.isfinite().flatten(1).all(1) & decoded_BCHW.isfinite().flatten(1).all(1)).cpu().numpy()
    images_BHWC = family.pipeline.image_processor.postprocess(decoded_BCHW, output_type="np")
    images_BHWC[~finite_B] = 0
    return latents_BCHW.float().cpu().numpy(), np.rint(images_BHWC * 255).astype(np.uint8), finite_B
