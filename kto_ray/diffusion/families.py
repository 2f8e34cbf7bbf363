"""What differs between model families, behind one small protocol.

`generate/replica.py` and `train/worker.py` load a family through `load_family`; `layouts.py` is the table of them.

Shape suffixes: B samples; C, H, W latent channels, height, width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from kto_ray.diffusion import source
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.layouts import LAYOUTS, Layout
from kto_ray.diffusion.noise import NoiseProcess
from kto_ray.plugins import load_plugin


class Family(Protocol):
    """A loaded base model and how to train its denoiser."""

    layout: Layout
    pipeline: DiffusionPipeline
    noise: NoiseProcess

    @classmethod
    def load(cls, folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype) -> Self:
        """Read a pipeline folder that `source.check` has passed."""

    @property
    def denoiser(self) -> nn.Module:
        """The module that is trained."""

    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """What the frozen text encoder makes of each text, on the model's device."""

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, timesteps_B: Tensor, text_B: Conditioning) -> Tensor:
        """The denoiser's prediction, (B, C, H, W). `denoiser` may be the policy, the reference, or a wrapper of one."""


def load_family(folder: Path, variant: str | None, device: torch.device, dtype: torch.dtype) -> Family:
    """Load a pipeline folder as the family that its model_index.json names. Raises UserError, see `source.check`."""
    family: type[Family] = load_plugin("model.name", LAYOUTS[source.check(folder, variant)].family, {})
    return family.load(folder, variant, device, dtype)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str, num_gpus: float) -> torch.device:
    """ "auto" is the actor's GPU when it was given one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if num_gpus > 0 else "cpu")
    return torch.device(device)
