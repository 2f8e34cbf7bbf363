"""How noise is added and what the model is asked to predict: epsilon, v or flow.

One `NoiseProcess` a model; `learner.py` draws noise and timesteps and asks it for the noisy latent and the target.
Discrete diffusion is diffusers' `DDPMScheduler` (which knows every beta schedule by config); rectified flow is a line.

Shape suffixes: B samples; C, H, W latent channels, height, width.
"""

import json
from pathlib import Path
from typing import Any, Protocol, Self

from diffusers import DDPMScheduler
from torch import Tensor

from kto_ray.errors import UserError


class NoiseProcess(Protocol):
    """The forward process of a diffusion or flow model. Noise levels are float in [0, 1): 0 is clean, 1 pure noise."""

    level_draw: str
    """How noise levels are drawn for such a model, unless the run says otherwise; see `train/levels.py`."""

    @classmethod
    def from_folder(cls, pipeline_folder: Path) -> Self:
        """The process that a pipeline folder's scheduler describes. Raises UserError: it is another kind of process."""

    def timesteps(self, level_B: Tensor) -> Tensor:
        """Noise levels as what the model is conditioned on, (B,): integer timesteps of discrete diffusion, the share of
        noise of a flow."""

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
    def from_folder(cls, pipeline_folder: Path) -> Self:
        config = scheduler_config(pipeline_folder)
        if config["_class_name"].startswith("EDM"):
            raise UserError(
                f"model.name: {pipeline_folder} was trained with EDM's own noise levels ({config['_class_name']}), "
                "which no noise process here has"
            )
        if is_flow(config):
            raise UserError(
                f"model.name: the scheduler of {pipeline_folder} ({config['_class_name']}) is that of a flow model, "
                "which other models of this family are not"
            )
        return cls(DDPMScheduler.from_config(config))

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
        shift: k of Esser et al. (arXiv 2403.03206, Section 5.3.2): a level u stands for the share of noise
            k u / (1 + (k - 1) u), so that the model sees more of the noisy end. 1: none.
    """

    level_draw = "logit_normal"

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    @classmethod
    def from_folder(cls, pipeline_folder: Path) -> Self:
        """A shift that depends on the image's size is the sampler's affair: models are trained without it, as by
        diffusers' scripts."""
        config = scheduler_config(pipeline_folder)
        if not is_flow(config):
            raise UserError(
                f"model.name: the scheduler of {pipeline_folder} ({config['_class_name']}) is not that of a flow "
                "model, as this family's are"
            )
        dynamic = config.get("use_dynamic_shifting", False)
        return cls(1.0 if dynamic else float(config.get("shift", config.get("flow_shift")) or 1.0))

    def timesteps(self, level_B: Tensor) -> Tensor:
        return self.shift * level_B / (1 + (self.shift - 1) * level_B)

    def noisy(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        share_B111 = timesteps_B.to(clean_BCHW.dtype)[:, None, None, None]
        return (1 - share_B111) * clean_BCHW + share_B111 * noise_BCHW

    def target(self, clean_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return noise_BCHW - clean_BCHW


def scheduler_config(pipeline_folder: Path) -> dict[str, Any]:
    """Of the pipeline's own scheduler."""
    file = pipeline_folder / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler's configuration is that of a flow model."""
    return "FlowMatch" in config["_class_name"] or config.get("prediction_type") == "flow_prediction"
