"""Noisy latents and targets against closed forms in float64."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDPMScheduler

from kto_ray.diffusion.noise import DiscreteDiffusion, RectifiedFlow
from kto_ray.errors import UserError
from tests.pipelines import SCHEDULE

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.9999)
CLEAN, NOISE = torch.randn(2, len(LEVELS), 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def alphas_cumprod() -> npt.NDArray[np.float64]:
    """Of the Stable Diffusion schedule ("scaled_linear")."""
    betas = np.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    return np.cumprod(1 - betas, dtype=np.float64)


def alpha_and_sigma() -> tuple[torch.Tensor, torch.Tensor]:
    """Of the images in CLEAN at LEVELS, (B, 1, 1, 1) each."""
    kept = torch.from_numpy(alphas_cumprod()[[int(level * 1000) for level in LEVELS]])[:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def test_noise_is_mixed_in_by_the_closed_form(tiny_folder: Path) -> None:
    noise = DiscreteDiffusion.from_folder(tiny_folder)
    noisy = noise.noisy(CLEAN, NOISE, noise.timesteps(torch.tensor(LEVELS)))
    alpha, sigma = alpha_and_sigma()
    torch.testing.assert_close(noisy, alpha * CLEAN + sigma * NOISE, rtol=1e-5, atol=1e-5)


def test_epsilon_models_are_to_predict_the_noise(tiny_sd1_folder: Path) -> None:
    noise = DiscreteDiffusion.from_folder(tiny_sd1_folder)
    assert torch.equal(noise.target(CLEAN, NOISE, noise.timesteps(torch.tensor(LEVELS))), NOISE)


def test_v_models_are_to_predict_the_velocity(tiny_sd2_folder: Path) -> None:
    noise = DiscreteDiffusion.from_folder(tiny_sd2_folder)
    target = noise.target(CLEAN, NOISE, noise.timesteps(torch.tensor(LEVELS)))
    alpha, sigma = alpha_and_sigma()
    torch.testing.assert_close(target, alpha * NOISE - sigma * CLEAN, rtol=1e-5, atol=1e-5)


def test_with_zero_terminal_snr_the_last_timestep_is_pure_noise() -> None:
    config = SCHEDULE | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    noise = DiscreteDiffusion(DDPMScheduler.from_config(config))
    last = noise.timesteps(torch.full((len(LEVELS),), 0.9999))
    assert last.tolist() == [999] * len(LEVELS)
    torch.testing.assert_close(noise.noisy(CLEAN, NOISE, last), NOISE, rtol=0, atol=1e-6)
    torch.testing.assert_close(noise.target(CLEAN, NOISE, last), -CLEAN, rtol=0, atol=1e-6)


def test_levels_cover_every_timestep_and_no_other(tiny_sd1_folder: Path) -> None:
    noise = DiscreteDiffusion.from_folder(tiny_sd1_folder)
    timesteps = noise.timesteps(torch.linspace(0, 1, 10_001))  # 1 itself: what float32 makes of a level just below
    assert sorted(set(timesteps.tolist())) == list(range(1000))


def test_a_rectified_flow_runs_straight_from_clean_to_noise() -> None:
    flow = RectifiedFlow()
    level = torch.tensor(LEVELS, dtype=torch.float64)
    timesteps = flow.timesteps(level)
    assert torch.equal(timesteps, level)
    t = level[:, None, None, None]
    torch.testing.assert_close(flow.noisy(CLEAN, NOISE, timesteps), (1 - t) * CLEAN + t * NOISE)
    assert torch.equal(flow.target(CLEAN, NOISE, timesteps), NOISE - CLEAN)
    half_way = flow.noisy(CLEAN, NOISE, flow.timesteps(torch.full_like(level, 0.5)))
    torch.testing.assert_close(half_way + 0.5 * flow.target(CLEAN, NOISE, timesteps), NOISE)


def test_a_model_that_predicts_something_else_is_refused() -> None:
    scheduler = DDPMScheduler.from_config(SCHEDULE | {"prediction_type": "sample"})
    with pytest.raises(UserError, match=r"predicts 'sample'; supported: epsilon, v_prediction"):
        DiscreteDiffusion(scheduler)
