"""Drawing images: seeds, guidance, schedulers, and the two faces of a sample."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kto_ray.config import Generate, Model
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import compile_denoiser, load_family
from kto_ray.diffusion.sampling import draw
from kto_ray.diffusion.texts import Texts
from kto_ray.errors import UserError
from tests.pipelines import PIXELS

TEXTS = ("a red circle on black", "a blue square on white", "a green circle")
SEEDS = (11, 2**62 + 5, 13)


@pytest.fixture
def family(tiny_folder: Path) -> Family:
    return load_family(tiny_folder, Model(), torch.device("cpu"), torch.float32)


def sample(
    family: Family,
    texts: tuple[str, ...] = TEXTS,
    seeds: tuple[int, ...] = SEEDS,
    scheduler: str = "DDIMScheduler",
    guidance_scale: float = 3.0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    latents_BCHW, pixels_BHWC, finite_B = draw(
        family,
        Texts(lambda: family),
        texts,
        seeds,
        Generate(scheduler=scheduler, guidance_scale=guidance_scale, steps=4),
    )
    assert finite_B.all()
    return latents_BCHW, pixels_BHWC


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_seed_gives_its_image_whatever_else_is_in_the_batch(family: Family, scheduler: str) -> None:
    latents_BCHW, pixels_BHWC = sample(family, scheduler=scheduler)
    for text, seed, latents_CHW, pixels_HWC in zip(TEXTS, SEEDS, latents_BCHW, pixels_BHWC, strict=True):
        (alone_CHW,), (alone_HWC,) = sample(family, (text,), (seed,), scheduler=scheduler)
        np.testing.assert_allclose(alone_CHW, latents_CHW, rtol=1e-4, atol=1e-4)
        assert np.abs(alone_HWC.astype(int) - pixels_HWC).max() <= 1


def test_the_same_call_gives_the_same_bits(family: Family) -> None:
    (latents_BCHW, pixels_BHWC), (latents_again_BCHW, pixels_again_BHWC) = sample(family), sample(family)
    assert np.array_equal(latents_BCHW, latents_again_BCHW)
    assert np.array_equal(pixels_BHWC, pixels_again_BHWC)


def test_every_seed_and_every_prompt_gives_another_image(family: Family) -> None:
    by_seed, _ = sample(family, (TEXTS[0],) * 3, SEEDS)
    by_prompt, _ = sample(family, TEXTS, (SEEDS[0],) * 3)
    for latents_BCHW in (by_seed, by_prompt):
        assert np.abs(latents_BCHW[0] - latents_BCHW[1]).max() > 1e-2
        assert np.abs(latents_BCHW[1] - latents_BCHW[2]).max() > 1e-2


def test_guidance_changes_the_image(family: Family) -> None:
    without, _ = sample(family, guidance_scale=1.0)
    with_guidance, _ = sample(family, guidance_scale=5.0)
    assert np.abs(without - with_guidance).max() > 1e-2


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "PNDMScheduler",
        "HeunDiscreteScheduler",
    ],
)
def test_any_compatible_scheduler_draws(family: Family, scheduler: str) -> None:
    latents_BCHW, pixels_BHWC = sample(family, scheduler=scheduler)
    assert type(family.pipeline.scheduler).__name__ == scheduler
    assert latents_BCHW.shape == (3, 4, PIXELS // 2, PIXELS // 2)
    assert np.isfinite(latents_BCHW).all()
    assert pixels_BHWC.std() > 0


def test_another_scheduler_keeps_the_noise_schedule_and_the_prediction_type(family: Family) -> None:
    before = family.pipeline.scheduler
    sample(family, scheduler="DPMSolverMultistepScheduler")
    after = family.pipeline.scheduler
    assert type(after).__name__ == "DPMSolverMultistepScheduler"
    torch.testing.assert_close(after.alphas_cumprod, before.alphas_cumprod)
    assert after.config.prediction_type == family.noise.scheduler.config.prediction_type  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DDIMSheduler", r"'DDIMSheduler' is unknown to diffusers, did you mean 'DDIMScheduler'\?"),
        ("FlowMatchEulerDiscreteScheduler", r"is not compatible with this pipeline.*fitting: .*EulerDiscreteScheduler"),
    ],
)
def test_an_unfit_scheduler_is_refused_with_the_nearest_that_fits(family: Family, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(family, scheduler=name)


def test_a_scheduler_leaves_nothing_behind_for_the_next(tiny_sd1_folder: Path) -> None:
    """Whatever drew before, also one that does not know what the pipeline's own is told."""
    family = load_family(tiny_sd1_folder, Model(), torch.device("cpu"), torch.float32)
    alone_BCHW, _ = sample(family, scheduler="PNDMScheduler")
    for before in ("DDIMScheduler", "HeunDiscreteScheduler"):
        sample(family, scheduler=before)
        again_BCHW, _ = sample(family, scheduler="PNDMScheduler")
        assert family.pipeline.scheduler.config.skip_prk_steps
        assert np.array_equal(again_BCHW, alone_BCHW)


def test_pixels_are_the_decoded_latents(family: Family) -> None:
    latents_BCHW, pixels_BHWC = sample(family)
    assert (latents_BCHW.dtype.name, pixels_BHWC.dtype.name) == ("float32", "uint8")
    assert pixels_BHWC.shape == (3, PIXELS, PIXELS, 3)
    vae: Any = family.pipeline.vae
    with torch.no_grad():
        decoded_BCHW = vae.decode(torch.from_numpy(latents_BCHW) / vae.config.scaling_factor).sample
    expected_BHWC = ((decoded_BCHW / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels_BHWC - expected_BHWC).max() <= 0.5 + 1e-3


def test_half_precision_models_give_float32_latents(tiny_folder: Path) -> None:
    half = load_family(tiny_folder, Model(), torch.device("cpu"), torch.bfloat16)
    latents_BCHW, pixels_BHWC = sample(half)
    assert (latents_BCHW.dtype.name, pixels_BHWC.dtype.name) == ("float32", "uint8")
    assert np.isfinite(latents_BCHW).all()


def test_prompts_are_encoded_for_training_as_for_sampling(family: Family) -> None:
    texts = ["", *TEXTS, "a " * 50]
    encoded_BTD, _ = family.pipeline.encode_prompt(texts, torch.device("cpu"), 1, False)
    assert torch.equal(family.encode_prompts(texts).tensors["text"], encoded_BTD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_numbers_that_are_not_finite_are_told_of_one_image_and_spoil_no_other(
    family: Family, part: str, value: float
) -> None:
    """As half precision gives them; an infinite pixel would otherwise be clamped to a white one."""
    expected_BCHW, expected_BHWC = sample(family)
    module: Any = getattr(family.pipeline, part)
    decoder = module.decoder if part == "vae" else module

    def overflow(_module: Any, _inputs: Any, outputs: Any) -> None:
        tensor_BCHW = outputs if part == "vae" else outputs[0]
        tensor_BCHW[1, 0, 0, 0] = value

    with decoder.register_forward_hook(overflow):
        latents_BCHW, pixels_BHWC, finite_B = draw(
            family, Texts(lambda: family), TEXTS, SEEDS, Generate(scheduler="DDIMScheduler", guidance_scale=3, steps=4)
        )
    assert finite_B.tolist() == [True, False, True]
    assert not pixels_BHWC[1].any()
    for whole in (0, 2):
        assert np.array_equal(latents_BCHW[whole], expected_BCHW[whole])
        assert np.array_equal(pixels_BHWC[whole], expected_BHWC[whole])


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # by torch's compiler
def test_a_denoiser_is_compiled_by_its_repeated_blocks_or_as_a_whole(family: Family) -> None:
    """Nothing is, before it is called."""
    compile_denoiser(family.denoiser)
    compiled = {type(module).__name__ for module in family.denoiser.modules() if module._compiled_call_impl}
    assert compiled == {"BasicTransformerBlock"}
    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compile_denoiser(other)
    assert [bool(module._compiled_call_impl) for module in other.modules()] == [True, False]
