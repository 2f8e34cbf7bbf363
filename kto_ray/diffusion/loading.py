"""Loading a base model, frozen, as its family: for `generate/replica.py` and `train/worker.py`."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from kto_ray.config import Model
from kto_ray.diffusion import base_adapters, source
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.family import Family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_family(
    folder: Path, model: Model, device: torch.device, dtype: torch.dtype, guidance_scale: float = 1.0
) -> Family:
    """Load a pipeline folder, frozen, as the family that its model_index.json names.

    Raises:
        UserError: see `source.check` and `base_adapters.fuse`.
    """
    source.check(folder, model)
    family = family_of(folder, model)
    diffusers_logging.disable_progress_bar()  # several components, loaded by every actor: no news
    pipeline = DiffusionPipeline.from_pretrained(
        folder,
        variant=model.variant,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        **family.left_out,
    )
    pipeline.set_progress_bar_config(disable=True)
    base_adapters.fuse(pipeline, model)
    pipeline.to(device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return family(pipeline, family.process.from_folder(folder), family.geometry_of(folder), guidance_scale)


def pick_device(device: str, num_gpus: float) -> torch.device:
    """ "auto" is the actor's GPU when it was given one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if num_gpus > 0 else "cpu")
    return torch.device(device)
