"""How noise is added and what the model is asked to predict: epsilon, v or flow.

One `NoiseProcess` a model; `learner.py` draws noise and timesteps and asks it for the noisy latent and the target.
Discrete diffusion is diffusers' `DDPMScheduler` (which knows every beta schedule by config); rectified flow is a line.

Shape suffixes: B samples; C, H, W latent channels, height, width.
"""

from pathlib import Path
from typing import Protocol

from diffusers import DDPMScheduler
from torch import Tensor

from kto_ray.errors import UserError


class NoiseProcess(Protocol):
    """The forward process of a diffusion or flow model. Noise levels are float in [0, 1): 0 is clean, 1 pure noise."""

    level_draw: str
    """How noise levels are drawn for such a model, unless the run says otherwise; see `train/levels.py`."""

    def timesteps(self, level_B: Tensor) -> Tensor:
        """Noise levels as the timesteps that the model is conditioned on, (B,)."""

    def noisy(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The clean latents with noise, as the model sees them at these timesteps."""

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the model is to predict."""


class DiscreteDiffusion:
    """Variance-preserving diffusion over integer timesteps; target noise (epsilon) or velocity (v).

    Args:
        scheduler: any diffusers scheduler's configuration, read as a DDPM one.
    """

    level_draw = "uniform"

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"model.name: the scheduler predicts {scheduler.config.prediction_type!r}; "
                "supported: epsilon, v_prediction"
            )

    @classmethod
    def from_folder(cls, pipeline_folder: Path) -> "DiscreteDiffusion":
        """The process that a pipeline folder's scheduler describes."""
        return cls(DDPMScheduler.from_pretrained(pipeline_folder, subfolder="scheduler"))

    def timesteps(self, level_B: Tensor) -> Tensor:
        timesteps: int = self.scheduler.config.num_train_timesteps
        # Float32 rounds a level just below 1 up to 1.
        return (level_B * timesteps).long().clamp(max=timesteps - 1)

    def noisy(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        noisy_BCHW: Tensor = self.scheduler.add_noise(clean_BCHW, noise_BCHW, timesteps_B)
        return noisy_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        if self.scheduler.config.prediction_type == "epsilon":
            return noise_BCHW
        velocity_BCHW: Tensor = self.scheduler.get_velocity(clean_BCHW, noise_BCHW, timesteps_B)
        return velocity_BCHW


class RectifiedFlow:
    """Straight lines from clean (level 0) to noise (level 1); target `noise - clean` (Liu et al., 2022).

    Args:
        num_train_timesteps: scale of the timesteps that the model is conditioned on.
    """

    level_draw = "logit_normal"

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def timesteps(self, level_B: Tensor) -> Tensor:
        return level_B * self.num_train_timesteps

    def noisy(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        level_B111 = (timesteps_B / self.num_train_timesteps).to(clean_BCHW.dtype)[:, None, None, None]
        return (1 - level_B111) * clean_BCHW + level_B111 * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return noise_BCHW - clean_BCHW
