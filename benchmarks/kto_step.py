"""The optimizer step of `Learner`, against its bound and against a step as the authors' released script takes it.

    python benchmarks/kto_step.py [--quick]

Contenders, all on the embedded world with batches of 72 and the same pictures, prompts and verdicts:

- ours, LoRA and full: `Learner.train_round` over one round of `shapes_demo`, divided by its steps. All that a step
  costs is in it: prompts encoded once a round, batches drawn, reference point, loss, clipping, AdamW, health figures.
- bound, LoRA and full: forward and backward pass of the policy and forward pass of its reference on one batch that
  lies ready. Nothing else; no optimizer either.
- released-like: see `ReleasedLike`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import Table, interleaved, median_and_range, ratios, run_alone
from torch import Tensor

from kto_ray.config import load, steps_for
from kto_ray.diffusion.family import Family
from kto_ray.objectives.diffusion_kto import DiffusionKTO
from kto_ray.objectives.protocol import denoising_error
from kto_ray.shapes.world import all_scenes, draw_somewhere
from kto_ray.train.batches import LatentsInMemory, RoundData
from kto_ray.train.learner import Learner
from kto_ray.train.sampler import plan_round
from kto_ray.train.worker import build_learner

BATCH = 72
# Thousands of timed steps must not carry the weights to where arithmetic is slower or faster; the step costs the same.
OVERRIDES = ("train.learning_rate=1e-6", f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}")


def measure(quick: bool) -> Table:
    """Time the five contenders in turn."""
    # The texts are encoded once a round, so a round must be long enough for that not to weigh more than it does.
    size = (f"generate.images_per_round={2 * BATCH}", "train.epochs=1") if quick else ("train.epochs=2",)
    lora_config = load("shapes_demo", [*OVERRIDES, *size, "train.adapter.kind=lora"])
    full_config = load("shapes_demo", [*OVERRIDES, *size, "train.adapter.kind=full"])
    steps = steps_for(lora_config.generate.images_per_round, lora_config.train)
    repeats = 3 if quick else 7

    lora, full, other = (build_learner(config) for config in (lora_config, full_config, full_config))
    pixels_NHWC, data = make_round(lora.family, lora_config.generate.images_per_round)
    released = ReleasedLike(other, pixels_NHWC, data)
    seconds = interleaved(
        {
            "ours, LoRA": lambda: lora.train_round(data),
            "bound, LoRA": bound(lora, data, steps),
            "ours, full": lambda: full.train_round(data),
            "bound, full": bound(full, data, steps),
            "released-like, full": lambda: released.train_round(steps),
        },
        repeats,
    )

    def row(above: str, below: str) -> tuple[str, ...]:
        takes = [median_and_range([value / steps for value in seconds[name]], "{:.3f}")[0] for name in (above, below)]
        return f"{above} / {below}", *median_and_range(ratios(seconds[above], seconds[below])), " / ".join(takes)

    return Table(
        title=f"KTO optimizer step, batch {BATCH}",
        columns=("step", "ratio", "lowest - highest", "seconds a step"),
        rows=(
            row("ours, LoRA", "bound, LoRA"),
            row("ours, full", "bound, full"),
            row("released-like, full", "ours, full"),
            row("released-like, full", "ours, LoRA"),
        ),
        note=f"Median of {repeats} repeats of {steps} steps each.",
    )


def make_round(family: Family, images: int, side: int | None = None) -> tuple[npt.NDArray[np.uint8], RoundData]:
    """Pictures of random scenes (N, H, W, 3), and the same as a round to train on; verdicts are thrown.

    Args:
        side: of the pictures, a multiple of 64, their own size.
    """
    rng = np.random.default_rng(0)
    scenes = rng.choice(np.array(all_scenes(), object), images).tolist()
    pixels_NHWC = np.stack([draw_somewhere(scene, rng) for scene in scenes])
    if side is not None:
        times = side // pixels_NHWC.shape[1]
        pixels_NHWC = pixels_NHWC.repeat(times, 1).repeat(times, 2)
    latents_NCHW = encode_pictures(family.pipeline, torch.from_numpy(pixels_NHWC)).numpy()
    return pixels_NHWC, RoundData(
        0, LatentsInMemory(latents_NCHW), [scene.caption for scene in scenes], rng.random(images) < 0.5
    )


@torch.no_grad()
def encode_pictures(pipeline: Any, pixels_BHWC: Tensor) -> Tensor:
    """Latents (B, C, H, W) of uint8 pictures, as the denoiser is trained on them."""
    pictures_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents_BCHW: Tensor = pipeline.vae.encode(pictures_BCHW).latent_dist.sample() * pipeline.vae.config.scaling_factor
    return latents_BCHW


def bound(learner: Learner, data: RoundData, steps: int) -> Callable[[], None]:
    """What no step can do without, `steps` times: the passes through policy and reference."""
    family, policy, batch = learner.family, learner.policy, learner.config.global_batch
    parameters = policy.parameters()
    clean_BCHW = torch.from_numpy(data.latents.take(np.arange(batch)))
    timesteps_B = family.noise.timesteps(torch.rand(batch))
    noisy_BCHW = family.noise.noisy(clean_BCHW, torch.randn_like(clean_BCHW), timesteps_B)
    text_B = learner.texts.encode(data.prompts[:batch])
    gradient_BCHW = torch.full_like(clean_BCHW, 1e-3)

    def run() -> None:
        for _ in range(steps):
            with torch.no_grad(), policy.reference() as reference:
                family.predict(reference, noisy_BCHW, timesteps_B, text_B)
            torch.autograd.backward(family.predict(policy.module, noisy_BCHW, timesteps_B, text_B), gradient_BCHW)
            for parameter in parameters:
                parameter.grad = None

    return run


class ReleasedLike:
    """Training as the authors' released script does it; written anew from a description of that script.

    Inside every step: pictures are encoded by the autoencoder and prompts by the text encoders; the reference is the
    reference weights, copied into the one U-Net for its forward pass, the policy's being set aside and copied back.
    Decoding image files is left out, in its favour. Batches and optimizer are ours. The script trains every
    weight; of adapters, theirs are copied to and fro.

    Args:
        learner: of which model, policy and settings are taken; it takes no step itself.
    """

    def __init__(self, learner: Learner, pixels_NHWC: npt.NDArray[np.uint8], data: RoundData) -> None:
        self.family, self.pipeline, self.seed = learner.family, learner.family.pipeline, learner.seed
        self.config = learner.config
        assert isinstance(self.config.objective, DiffusionKTO)
        self.objective = DiffusionKTO(beta=self.config.objective.beta)  # the paper's, without options
        self.unet, self.parameters = learner.policy.module, learner.policy.parameters()
        self.reference = [parameter.detach().clone() for parameter in self.parameters]
        self.set_aside = [torch.empty_like(parameter) for parameter in self.reference]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        self.pixels_NHWC = torch.from_numpy(pixels_NHWC)
        self.prompts, self.desirable_N = data.prompts, torch.from_numpy(data.desirable_N)

    def train_round(self, steps: int) -> None:
        """Take the batches that `Learner.train_round` takes."""
        desirable_N, batch = self.desirable_N.numpy(), self.config.global_batch
        for picks_B in torch.from_numpy(plan_round(desirable_N, self.config.gamma, steps, batch, self.seed, 0)):
            prompts = [self.prompts[pick] for pick in picks_B.tolist()]
            self._step(self.pixels_NHWC[picks_B], prompts, self.desirable_N[picks_B])

    def _step(self, pixels_BHWC: Tensor, prompts: Sequence[str], desirable_B: Tensor) -> None:
        clean_BCHW = encode_pictures(self.pipeline, pixels_BHWC)
        text_B = self.family.encode_prompts(prompts)
        noise_BCHW = torch.randn_like(clean_BCHW)
        timesteps_B = self.family.noise.timesteps(torch.rand(len(clean_BCHW)))
        noisy_BCHW = self.family.noise.noisy(clean_BCHW, noise_BCHW, timesteps_B)
        target_BCHW = self.family.noise.target(clean_BCHW, noise_BCHW, timesteps_B)

        with torch.no_grad():
            copy_all(self.parameters, self.set_aside)
            copy_all(self.reference, self.parameters)
            prediction_BCHW = self.family.predict(self.unet, noisy_BCHW, timesteps_B, text_B)
            copy_all(self.set_aside, self.parameters)
            error_reference_B = denoising_error(prediction_BCHW, target_BCHW)
        prediction_BCHW = self.family.predict(self.unet, noisy_BCHW, timesteps_B, text_B)
        reward_B = error_reference_B - denoising_error(prediction_BCHW, target_BCHW)
        z = self.objective.find_reference_point(reward_B, desirable_B)

        self.optimizer.zero_grad(set_to_none=True)
        margin_B = self.objective.beta * (reward_B - z)
        torch.autograd.backward(self.objective.losses_of(margin_B, desirable_B).mean())
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()


def copy_all(origins: Sequence[Tensor], destinations: Sequence[Tensor]) -> None:
    for origin, destination in zip(origins, destinations, strict=True):
        destination.copy_(origin)


if __name__ == "__main__":
    run_alone(measure, __doc__)
