"""Another scheduler than the pipeline's own: taken only where it samples the same model."""

from typing import Any

import diffusers as d
import pytest
import torch

from kto_ray.diffusion.schedulers import scheduler_for
from kto_ray.errors import UserError
from tests.pipelines import SCHEDULE

SCHEDULE_OF_OLD = {key: value for key, value in SCHEDULE.items() if key != "clip_sample"}
"""As written by a class that does not know the key."""


def own(name: str, **config: Any) -> Any:
    return getattr(d, name).from_config({**SCHEDULE_OF_OLD, **config})


def refusal(scheduler: Any, name: str) -> str:
    with pytest.raises(UserError) as caught:
        scheduler_for(scheduler, name)
    return str(caught.value)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_none_is_the_pipelines_own(scheduler: str) -> None:
    mine = own(scheduler)
    again = scheduler_for(mine, None)
    assert type(again) is type(mine)
    assert again.config == mine.config


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_latents_are_not_cut_by_a_scheduler_that_would_cut_pixels(scheduler: str, name: str) -> None:
    """Such a folder's latents had a spread of 0.86 in the place of 3.2."""
    swapped = scheduler_for(own(scheduler), name)
    assert type(swapped).__name__ == name
    assert not swapped.config.clip_sample
    swapped.set_timesteps(10)
    far = torch.full((1, 1, 1, 1), 30.0)
    assert swapped.step(torch.zeros_like(far), swapped.timesteps[-1], far).prev_sample.abs() > 5


def test_a_model_that_was_trained_with_cutting_keeps_it() -> None:
    assert scheduler_for(own("DDIMScheduler", clip_sample=True), "DDPMScheduler").config.clip_sample


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"])
def test_zero_terminal_snr_is_never_dropped(name: str) -> None:
    zero = own("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    text = refusal(zero, name)
    assert "is without zero terminal SNR, which this model was trained with" in text
    assert "fitting: " in text
    swapped = scheduler_for(zero, "EulerDiscreteScheduler")
    assert swapped.config.rescale_betas_zero_snr
    assert swapped.alphas_cumprod[-1] < 1e-6


def test_models_with_an_snr_of_their_own_take_any() -> None:
    assert type(scheduler_for(own("DDIMScheduler"), "HeunDiscreteScheduler")) is d.HeunDiscreteScheduler


def test_a_flow_model_takes_schedulers_made_for_flow() -> None:
    solver = d.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    swapped = scheduler_for(solver, "UniPCMultistepScheduler")
    assert (swapped.config.prediction_type, swapped.config.use_flow_sigmas) == ("flow_prediction", True)
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"):
        assert "is not for flow models" in refusal(solver, name)
    euler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert "is not compatible with this pipeline; fitting: FlowMatchEulerDiscreteScheduler" in refusal(
        euler, "DDIMScheduler"
    )
    assert scheduler_for(euler, "FlowMatchEulerDiscreteScheduler").config.shift == 3.0


def test_schedulers_of_another_kind_of_model_are_refused() -> None:
    assert "for models that were trained with EDM's own noise levels" in refusal(
        own("DDIMScheduler"), "EDMEulerScheduler"
    )


def test_arguments_are_laid_over_the_configuration_of_the_pipelines_own() -> None:
    for name in (None, "DPMSolverMultistepScheduler"):
        spaced = scheduler_for(own("EulerDiscreteScheduler"), name, {"timestep_spacing": "trailing"})
        assert spaced.config.beta_end == SCHEDULE["beta_end"]
        spaced.set_timesteps(4)
        assert spaced.timesteps.tolist() == [999, 749, 499, 249]
    karras = scheduler_for(own("EulerDiscreteScheduler"), None, {"use_karras_sigmas": True})
    plain = scheduler_for(own("EulerDiscreteScheduler"), None)
    for scheduler in (karras, plain):
        scheduler.set_timesteps(5)
    assert not torch.allclose(karras.sigmas, plain.sigmas)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"timestep_spcing": "trailing"}, "EulerDiscreteScheduler knows no 'timestep_spcing', did you mean "),
        ({"algorithm_type": "sde-dpmsolver++"}, "knows no 'algorithm_type'; known: interpolation_type, "),
        ({"prediction_type": "v_prediction"}, "prediction_type is what the model was trained with"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "cannot be made with {'use_karras_sigmas': True"),
    ],
)
def test_arguments_that_a_scheduler_does_not_take_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.generate\.scheduler_args: ") as caught:
        scheduler_for(own("EulerDiscreteScheduler"), None, args, "evaluate.generate")
    assert message in str(caught.value)
