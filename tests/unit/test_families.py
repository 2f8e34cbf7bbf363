"""Model families, each on a tiny random pipeline in its true layout, against what the pipeline itself does.

Replay: our prediction is what the pipeline gave its scheduler. Oracle: with the exact target in place of the network,
written down here by hand, the pipeline's own loop lands on the chosen latent. Decode: our images are the pipeline's.
Guidance: what we drop prompts for is what the pipeline contrasts with. And the controls: whatever a prediction is
conditioned on changes it, and a row alone is a row of a batch.

Shape suffixes as in `family.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from kto_ray.config import Generate, Model
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.families import FAMILIES
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.noise import DiscreteDiffusion
from kto_ray.diffusion.sampling import draw, initial_noise
from kto_ray.diffusion.texts import Texts
from tests.tiny_models import NAMES, side_of, write_model

CPU = torch.device("cpu")
TEXTS = ["a red circle on black", "green square"]
SEEDS = [1, 2]
TOLD = {"flux": 3.5, "flux2": 3.5}
"""Guidance that is told to the network; drawing without guidance is not drawing with scale 1 then."""
BACKWARDS = ("z_image", "lumina2")
"""Networks whose time runs from noise to image."""


@dataclass(frozen=True)
class Subject:
    """A tiny model under test."""

    name: str
    family: Family

    @property
    def pipeline(self) -> Any:
        return self.family.pipeline

    @property
    def side(self) -> int:
        return side_of(self.name)

    @property
    def discrete(self) -> bool:
        return isinstance(self.family.noise, DiscreteDiffusion)

    def settings(self, scale: float | None = None) -> Generate:
        scale = TOLD.get(self.name, 1.0) if scale is None else scale
        return Generate(steps=4, height=self.side, width=self.side, guidance_scale=scale)

    def sample(self, scale: float | None = None) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        with torch.no_grad():
            text_B, nothing_1 = self.family.encode_prompts(TEXTS), self.family.nothing()
            return self.family.sample(text_B, nothing_1, generators, self.settings(scale))

    def theirs(self, scale: float | None = None) -> Any:
        """Images as the pipeline draws them of texts, (B, H, W, C) in [0, 1]."""
        settings = self.settings(scale)
        guidance = self.family.guided(settings.guidance_scale)
        if self.name == "qwen_image":  # without one it does not guide
            guidance["negative_prompt"] = ""
        arguments = {name: value for name, value in self.family.arguments.items() if name != "negative_prompt"}
        return self.pipeline(
            prompt=list(TEXTS),
            num_inference_steps=settings.steps,
            height=self.side,
            width=self.side,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="np",
            **guidance,
            **arguments,
        ).images

    @property
    def latent_side(self) -> int:
        return self.side // self.family.geometry.shrink

    def latents(self, seed: int) -> Tensor:
        shape = (len(TEXTS), self.family.geometry.channels, self.latent_side, self.latent_side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def images_of(self, state: Tensor) -> Tensor:
        """What the pipeline calls latents, tokens or not, as (B, C, H, W)."""
        if state.dim() != 3:
            return state.squeeze(2) if state.dim() == 5 else state
        if self.name.startswith("flux2"):
            return state.mT.reshape(len(state), -1, self.latent_side, self.latent_side)
        unpacked: Tensor = FluxPipeline._unpack_latents(state, self.latent_side, self.latent_side, 1)
        return unpacked

    def tokens_of(self, latents_BCHW: Tensor) -> Tensor:
        """The inverse of `images_of`, for the pipelines whose networks take tokens."""
        if self.name.startswith("flux2"):
            return latents_BCHW.flatten(2).mT
        packed: Tensor = FluxPipeline._pack_latents(latents_BCHW, *latents_BCHW.shape)
        return packed


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = write_model(tmp_path_factory.mktemp(request.param), request.param)
    return Subject(request.param, load_family(folder, Model(), CPU, torch.float32, TOLD.get(request.param, 1.0)))


@dataclass
class Steps:
    """What a scheduler was given, step by step: the network's output, the time, and the state."""

    outputs: list[Tensor] = field(default_factory=list)
    times: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(pipeline: Any) -> Iterator[Steps]:
    steps, scheduler = Steps(), type(pipeline.scheduler)
    step = scheduler.step

    def spy(self: Any, output: Tensor, time: Any, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.outputs.append(output.clone())
        steps.times.append(torch.as_tensor(time).clone())
        steps.states.append(state.clone())
        return step(self, output, time, state, *args, **kwargs)

    scheduler.step = spy
    try:
        yield steps
    finally:
        scheduler.step = step


def seen(subject: Subject, steps: Steps, index: int) -> tuple[Tensor, Tensor]:
    """State and time of a step as the network has them: noisy latents (B, C, H, W), and timesteps (B,) as ours."""
    noisy_BCHW, time = subject.images_of(steps.states[index]), steps.times[index]
    if not subject.discrete:
        return noisy_BCHW, (time / 1000).float().expand(len(TEXTS))
    scheduler = subject.pipeline.scheduler
    if "Euler" in type(scheduler).__name__:
        noisy_BCHW = noisy_BCHW / (scheduler.sigmas[index] ** 2 + 1) ** 0.5
    return noisy_BCHW, time.expand(len(TEXTS))


def difference(one: Tensor, other: Tensor) -> float:
    """Largest, as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def test_every_row_of_the_table_has_a_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folders = [write_model(tmp_path_factory.mktemp(name), name) for name in NAMES]
    assert {(folder / "model_index.json").read_text().split('"')[3] for folder in folders} == set(FAMILIES)


@torch.no_grad()
def test_replay_our_prediction_is_what_the_pipeline_gave_its_scheduler(subject: Subject) -> None:
    with watched(subject.pipeline) as steps:
        subject.sample()
    text_B = subject.family.encode_prompts(TEXTS)
    assert len(steps.outputs) >= 4
    for index, output in enumerate(steps.outputs):
        if subject.name == "sd1" and index:  # PNDM's first steps are at times of its own
            break
        ours = subject.family.predict(subject.family.denoiser, *seen(subject, steps, index), text_B)
        assert difference(ours, subject.images_of(output)) < 5e-6


@torch.no_grad()
def test_oracle_the_pipeline_lands_where_the_exact_target_leads(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_BCHW, family, name = subject.latents(7), subject.family, subject.name

    def exact(*args: Any, **kwargs: Any) -> tuple[Any]:
        state = args[0] if args else kwargs["hidden_states"]
        time = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0].float()
        noisy_BCHW = subject.images_of(torch.stack(state) if isinstance(state, list) else state)
        if subject.discrete:
            kept = subject.pipeline.scheduler.alphas_cumprod[int(time)]
            output = (noisy_BCHW - kept.sqrt() * clean_BCHW) / (1 - kept).sqrt()
            if subject.pipeline.scheduler.config.prediction_type == "v_prediction":
                output = kept.sqrt() * output - (1 - kept).sqrt() * clean_BCHW
            if name == "pixart_sigma":  # and the variance, which samplers pass over
                output = torch.cat([output, torch.zeros_like(output)], 1)
        else:
            share = {"sd3": time / 1000, "sana": time / 1000}.get(name, 1 - time if name in BACKWARDS else time)
            output = (noisy_BCHW - clean_BCHW) / share  # noise - clean
            output = -output if name in BACKWARDS else output
        if not isinstance(state, list) and state.dim() == 3:
            output = subject.tokens_of(output)
        return (list(output[:, :, None]) if isinstance(state, list) else output,)

    monkeypatch.setattr(family.denoiser, "forward", exact)
    landed_BCHW = subject.sample()
    # Stable Diffusion's schedule leaves its first level of noise in every image; SANA's solver cuts times to integers.
    within = {"sd1": 0.2, "sd2": 0.2, "sana": 1e-2}.get(name, 2e-6)
    assert (landed_BCHW - clean_BCHW).abs().max() < within


@pytest.mark.parametrize("scale", [None, 3.0])
@torch.no_grad()
def test_images_and_latents_are_the_pipelines_own(subject: Subject, scale: float | None) -> None:
    settings = subject.settings(scale)
    latents_BCHW, pixels_BHWC, finite_B = draw(subject.family, Texts(lambda: subject.family), TEXTS, SEEDS, settings)
    assert latents_BCHW.shape == (2, subject.family.geometry.channels, subject.latent_side, subject.latent_side)
    assert finite_B.all()
    assert np.abs(pixels_BHWC / 255 - subject.theirs(scale)).max() <= 0.501 / 255
    assert pixels_BHWC.std() > 1


@torch.no_grad()
def test_encoded_images_lie_where_the_denoiser_was_trained(subject: Subject) -> None:
    """Latents of images are in the space of those that are drawn: by the autoencoder's own answer, `decode` undone.

    The tiny autoencoders are random, so that no image comes back from them; what is asked for is that `decode` hands
    the autoencoder exactly what it gave for the image.
    """
    family, vae = subject.family, subject.pipeline.vae
    images_B3HW = torch.rand((2, 3, subject.side, subject.side), generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents_BCHW = family.encode(images_B3HW)
    assert latents_BCHW.shape == (2, *subject.sample().shape[1:])
    film = subject.name == "qwen_image"
    given = vae.encode(images_B3HW[:, :, None] if film else images_B3HW)
    raw = given.latent_dist.mean if hasattr(given, "latent_dist") else given.latent
    expected_B3HW = vae.decode(raw, return_dict=False)[0]
    expected_B3HW = expected_B3HW[:, :, 0] if film else expected_B3HW
    torch.testing.assert_close(family.decode(latents_BCHW), expected_B3HW, rtol=1e-4, atol=1e-4)
    alone_1CHW = family.encode(images_B3HW[:1])
    torch.testing.assert_close(alone_1CHW, latents_BCHW[:1], rtol=1e-4, atol=1e-5)

    def drawn(seeds: list[int]) -> Tensor:
        return family.encode(images_B3HW, [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(drawn([1, 2]), drawn([1, 2]))
    assert torch.equal(drawn([1, 2]), drawn([3, 2])) == (not hasattr(given, "latent_dist"))


def test_an_image_begins_with_the_noise_of_its_seed(subject: Subject) -> None:
    with watched(subject.pipeline) as steps:
        subject.sample()
    scale = getattr(subject.pipeline.scheduler, "init_noise_sigma", 1.0)
    shape = subject.latents(0).shape[1:]
    expected = torch.stack([initial_noise(seed, shape, torch.float32) for seed in SEEDS])
    torch.testing.assert_close(subject.images_of(steps.states[0]), scale * expected)


@torch.no_grad()
def test_whatever_a_prediction_is_conditioned_on_changes_it(subject: Subject) -> None:
    family, noisy_BCHW = subject.family, subject.latents(3)
    text_B = family.encode_prompts(TEXTS)
    timesteps_B = family.noise.timesteps(torch.tensor([0.3, 0.7]))
    prediction = family.predict(family.denoiser, noisy_BCHW, timesteps_B, text_B)
    assert prediction.shape == noisy_BCHW.shape
    # AuraFlow's text hardly counts in a model of one random layer.
    least = 1e-5 if subject.name == "aura_flow" else 1e-4
    for name, tensor in text_B.tensors.items():
        if not (tensor == tensor[:1]).all():
            other = Conditioning({**text_B.tensors, name: tensor.roll(1, 0)})
            assert difference(family.predict(family.denoiser, noisy_BCHW, timesteps_B, other), prediction) > least, name
    assert difference(family.predict(family.denoiser, noisy_BCHW, timesteps_B.flip(0), text_B), prediction) > 1e-4
    assert difference(family.predict(family.denoiser, -noisy_BCHW, timesteps_B, text_B), prediction) > 1e-4


@torch.no_grad()
def test_a_row_alone_is_a_row_of_a_batch(subject: Subject) -> None:
    family, noisy_BCHW = subject.family, subject.latents(3)
    alone = [family.encode_prompts([text]) for text in TEXTS]
    timesteps_B = family.noise.timesteps(torch.tensor([0.3, 0.7]))
    together = family.predict(family.denoiser, noisy_BCHW, timesteps_B, Conditioning.cat(alone))
    for index, text_1 in enumerate(alone):
        row = slice(index, index + 1)
        single = family.predict(family.denoiser, noisy_BCHW[row], timesteps_B[row], text_1)
        assert difference(together[row], single) < 1e-4
    torch.testing.assert_close(
        family.predict(family.denoiser, noisy_BCHW, timesteps_B, family.encode_prompts(TEXTS)), together
    )


@torch.no_grad()
def test_dropped_prompts_are_what_guidance_contrasts_with(subject: Subject) -> None:
    """Of the first step, where guidance is what the pipeline adds to a prediction that we know."""
    family, scale = subject.family, 4.0
    if subject.name in ("flux", "flux_schnell", "flux2"):
        pytest.skip("there is no second prediction")
    with watched(subject.pipeline) as steps:
        subject.theirs(scale)
    noisy_BCHW, timesteps_B = seen(subject, steps, 0)
    text_B = family.encode_prompts(TEXTS)
    nothing_B = Conditioning.cat([family.nothing(), family.nothing()])
    with_text, without = (family.predict(family.denoiser, noisy_BCHW, timesteps_B, c) for c in (text_B, nothing_B))
    guided = without + scale * (with_text - without)
    if subject.name in ("qwen_image", "lumina2"):  # as long as the prediction for the prompt, channel by channel
        dimension = 1 if subject.name == "qwen_image" else -1
        guided, with_text = (subject.tokens_of(t) if dimension == 1 else t for t in (guided, with_text))
        norm = {"dim": -1, "keepdim": True}
        guided = guided * with_text.norm(**norm) / guided.norm(**norm)
        guided, with_text = (subject.images_of(t) if dimension == 1 else t for t in (guided, with_text))
    effect = (guided - with_text).abs().max()
    assert (guided - subject.images_of(steps.outputs[0])).abs().max() < 1e-3 * effect


def test_a_dropped_prompt_has_the_shape_of_one(subject: Subject) -> None:
    text_B, nothing_1 = subject.family.encode_prompts(TEXTS), subject.family.nothing()
    assert len(nothing_1) == 1
    assert nothing_1.tensors.keys() == text_B.tensors.keys()
    assert len(Conditioning.cat([nothing_1, text_B])) == 3


def test_the_callers_prompts_stay_as_they_are(subject: Subject) -> None:
    texts = list(TEXTS)
    subject.family.encode_prompts(texts)
    assert texts == TEXTS


def test_sizes_are_read_from_the_folder_as_the_pipeline_has_them(subject: Subject) -> None:
    geometry = subject.family.geometry
    latents_BCHW = subject.sample()
    assert geometry.channels == latents_BCHW.shape[1]
    assert geometry.shrink * latents_BCHW.shape[2] == subject.side
    assert subject.side % geometry.multiple == 0
    default = getattr(subject.pipeline, "default_sample_size", None)
    if default is not None and geometry.pixels is not None:
        assert geometry.pixels == (default * subject.pipeline.vae_scale_factor,) * 2
