"""Drawing images: any diffusers scheduler by name, classifier-free guidance, one seed an image.

Used by `generate/replica.py`. The latent that comes out of the sampler is kept as the training sample; pixels are its
decoding.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kto_ray.config import Generate, RunConfig
from kto_ray.diffusion.families import Family
from kto_ray.errors import UserError


def compatible_scheduler(current: Any, name: str) -> Any:
    """The diffusers scheduler class of that name, if it can stand in for the pipeline's own.

    Raises:
        UserError: there is none; names the nearest that fits.
    """
    compatible = {scheduler.__name__: scheduler for scheduler in current.compatibles if not is_edm(scheduler.__name__)}
    if name not in compatible:
        close = difflib.get_close_matches(name, compatible, n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        why = "not compatible with this pipeline" if hasattr(diffusers, name) else "unknown to diffusers"
        if is_edm(name):
            why = "for models that were trained with EDM's own noise levels"
        raise UserError(f"generate.scheduler: {name!r} is {why}{suggestion}; fitting: {', '.join(sorted(compatible))}")
    return compatible[name]


def is_edm(name: str) -> bool:
    """diffusers calls them compatible with all others, but out of another model they draw noise."""
    return name.startswith("EDM")


def use_scheduler(pipeline: Any, name: str) -> None:
    """Give a pipeline another scheduler over the same noise schedule. Raises UserError, see `compatible_scheduler`."""
    pipeline.scheduler = compatible_scheduler(pipeline.scheduler, name).from_config(pipeline.scheduler.config)


DRAWING = ("scheduler", "steps", "guidance_scale", "height", "width", "dtype")
"""Fields of `generate` that shape an image; the others say how many are drawn, and on what."""


def drawing_digest(config: RunConfig, components: Mapping[str, str]) -> str:
    """SHA-256 over everything that shapes an image besides prompt, seed and the policy's weights.

    Args:
        components: digest of each component of the base model.
    """
    shaping = config.generate.model_dump(mode="json", include=set(DRAWING))
    shaping |= {"base": dict(components), "adapter": config.train.adapter.model_dump(mode="json")}
    if prefixes := config.train.objective.needs.prefixes:
        shaping["prefix"] = prefixes[0]
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def as_asked(config: RunConfig, prompts: Sequence[str], policy_version: int) -> list[str]:
    """Prompts as this policy is asked for them: with the prefix of desirable images, where it was trained with one."""
    prefixes = config.train.objective.needs.prefixes
    prefix = prefixes[0] if prefixes and policy_version else ""
    return [prefix + prompt for prompt in prompts]


def initial_noise(seed: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The noise that `draw` begins an image of this seed with, float32 of this shape (C, h, w).

    Args:
        dtype: that the image was drawn in.
    """
    noise_1CHW = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)
    return noise_1CHW[0].float()


@torch.inference_mode()
def draw(
    family: Family, texts: Sequence[str], seeds: Sequence[int], settings: Generate
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Draw one image a (text, seed).

    Every image has a noise generator of its own, on the CPU whatever the model's device, so that its noise follows from
    its seed alone: not from the batch, the replica or the GPU that it was drawn on.

    Returns:
        Clean latents float32 (B, C, h, w), scaled as the denoiser was trained; pixels uint8 (B, H, W, 3); and whether
        all of an image's latents and decoded pixels are finite numbers, bool (B,). Where they are not, as happens in
        float16, pixels are 0.
    """
    pipeline: Any = family.pipeline
    latents_BCHW = pipeline(
        list(texts),
        guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.steps,
        height=settings.height,
        width=settings.width,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="latent",
    ).images
    decoded_BCHW = pipeline.vae.decode(latents_BCHW / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    # Looked at before pixels are clamped, which would hide an infinity.
    finite_B = (latents_BCHW.isfinite().flatten(1).all(1) & decoded_BCHW.isfinite().flatten(1).all(1)).cpu().numpy()
    images_BHWC = pipeline.image_processor.postprocess(decoded_BCHW, output_type="np")
    images_BHWC[~finite_B] = 0
    return latents_BCHW.float().cpu().numpy(), np.rint(images_BHWC * 255).astype(np.uint8), finite_B
