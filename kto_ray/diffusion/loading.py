"""Loading a base model, frozen, as its family: for `generate/replica.py` and `train/worker.py`. How its denoiser is
compiled, and where a replica's waits that is larger than its card.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from kto_ray.config import Model
from kto_ray.diffusion import base_adapters, source
from kto_ray.diffusion.components import components
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.family import Family, index_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Parts = Literal["all", "denoiser", "encoders", "autoencoder"]
"""Of a pipeline: all of it; without what draws; the text encoders alone; or the autoencoder alone."""


def load_family(
    folder: Path,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    guidance_scale: float = 1.0,
    parts: Parts = "all",
) -> Family:
    """Load a pipeline folder, frozen, as the family that its model_index.json names.

    Args:
        guidance_scale: see `Family`.
        parts: only these get to the device; of a model without adapters to start from, only these are read.

    Raises:
        UserError: see `source.check` and `base_adapters.fuse`.
    """
    source.check(folder, model)
    family = family_of(folder, model)
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()  # several components, loaded by every actor: no news
    unused = _unused(folder, family, parts)
    pipeline = DiffusionPipeline.from_pretrained(
        folder,
        variant=model.variant,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        **{**_empty(folder), **family.left_out, **({} if model.adapters else dict.fromkeys(unused))},
    )
    pipeline.set_progress_bar_config(disable=True)
    base_adapters.fuse(pipeline, model)
    pipeline.register_modules(**dict.fromkeys(unused))
    pipeline.to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return family(pipeline, family.process.from_folder(folder), family.geometry_of(folder), guidance_scale)


def _empty(folder: Path) -> dict[str, None]:
    """Components that the folder says it does without; diffusers wants to hear it again."""
    return {name: None for name, value in index_of(folder).items() if value == [None, None]}


def _unused(folder: Path, family: type[Family], parts: Parts) -> list[str]:
    """Components with weights that are left out."""
    models = [name for name, kind in components(folder, family).items() if kind == "model"]
    encoders = [name for name in models if name.startswith("text_encoder")]
    if any(name.startswith("text_encoder") for name in _empty(folder)):
        encoders.append(family.part)  # which tells how wide the missing text would have been
    used = {"all": models, "denoiser": [family.part], "encoders": encoders, "autoencoder": ["vae"]}[parts]
    return [name for name in models if name not in used]


def offload(pipeline: Any, how: Literal["none", "model", "group"], device: torch.device) -> None:
    """Let a pipeline in main memory go to its device piece by piece, when it is needed; see `generate.offload`.

    The policy has to be in it before: what is added afterwards would stay behind.
    """
    if how == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif how == "group":
        pipeline.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
            exclude_modules=["vae"],  # small, and `decode_upcast` changes its precision, which no copy would follow
        )


def renew_offloaded(denoiser: torch.nn.Module) -> None:
    """To be called after weights were loaded: groups that come to the card in a stream come from copies of their own.

    Of a layer that was on the card meanwhile, as an adapter's that was switched off, that copy is still what it was.
    """
    _maybe_remove_and_reapply_group_offloading(denoiser)


def compile_denoiser(denoiser: torch.nn.Module) -> None:
    """By the blocks that its class says it repeats, of which one is compiled for all; otherwise as a whole."""
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks()  # type: ignore[operator]
    else:
        denoiser.compile()


def pick_device(device: str, num_gpus: float) -> torch.device:
    """ "auto" is the actor's GPU when it was given one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if num_gpus > 0 else "cpu")
    return torch.device(device)
