"""The optimizer step of `Learner`, against its bound and against a step as the authors' released script takes it.

    python benchmarks/kto_step.py [--quick]

Contenders, all on the embedded world with batches of 72 and the same pictures, prompts and verdicts:

- ours, LoRA and full: `Learner.train_round` over one round of `shapes_demo`, divided by its steps. All that a step
  costs is in it: prompts encoded once a round, batches drawn, reference point, loss, clipping, AdamW, health figures.
- bound, LoRA and full: forward and backward pass of the policy and forward pass of the bare U-Net on one batch that
  lies ready. Nothing else; no optimizer either.
- released-like: see `ReleasedLike`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import Table, interleaved, median_and_range, ratios, run_alone
from torch import Tensor, nn

from kto_ray.config import RunConfig, Train, load, steps_for
from kto_ray.diffusion import source
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import load_family
from kto_ray.objectives.protocol import denoising_error
from kto_ray.shapes.world import all_scenes, draw_somewhere
from kto_ray.train.batches import LatentsInMemory, RoundData
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

    family = load_base(lora_config)
    pixels_NHWC, data = make_round(family, lora_config.generate.images_per_round)
    bare = copy.deepcopy(family.denoiser)
    lora, full = build_learner(lora_config), build_learner(full_config)
    released = ReleasedLike(family, full_config, pixels_NHWC, data.prompts, data.desirable_N)
    seconds = interleaved(
        {
            "ours, LoRA": lambda: lora.train_round(data),
            "bound, LoRA": bound(lora.family, lora.policy.module, bare, data, steps),
            "ours, full": lambda: full.train_round(data),
            "bound, full": bound(full.family, full.policy.module, bare, data, steps),
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


def load_base(config: RunConfig) -> Family:
    """The frozen base model, on the CPU."""
    return load_family(source.resolve(config.model), config.model, torch.device("cpu"), torch.float32)


def make_round(family: Family, images: int) -> tuple[npt.NDArray[np.uint8], RoundData]:
    """Pictures of random scenes (N, 64, 64, 3), and the same as a round to train on; verdicts are thrown."""
    rng = np.random.default_rng(0)
    scenes = rng.choice(np.array(all_scenes(), object), images).tolist()
    pixels_NHWC = np.stack([draw_somewhere(scene, rng) for scene in scenes])
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


def bound(family: Family, policy: nn.Module, reference: nn.Module, data: RoundData, steps: int) -> Callable[[], None]:
    """What no step can do without, `steps` times: the passes through policy and reference."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    clean_BCHW = torch.from_numpy(data.latents.take(np.arange(BATCH)))
    timesteps_B = family.noise.timesteps(torch.rand(BATCH))
    noisy_BCHW = family.noise.noisy(clean_BCHW, torch.randn_like(clean_BCHW), timesteps_B)
    text_B = family.encode_prompts(data.prompts[:BATCH])
    gradient_BCHW = torch.full_like(clean_BCHW, 1e-3)

    def run() -> None:
        for _ in range(steps):
            with torch.no_grad():
                family.predict(reference, noisy_BCHW, timesteps_B, text_B)
            torch.autograd.backward(family.predict(policy, noisy_BCHW, timesteps_B, text_B), gradient_BCHW)
            for parameter in parameters:
                parameter.grad = None

    return run


class ReleasedLike:
    """Full fine-tuning as the authors' released script does it; written anew from a description of that script.

    Inside every step: pictures are encoded by the autoencoder and prompts by the text encoder; the reference is the
    reference weights, copied into the one U-Net for its forward pass, the policy's being set aside and copied back.
    Decoding image files and tokenizing are left out, in its favour. Objective, batches and optimizer are ours.
    """

    def __init__(
        self,
        family: Family,
        config: RunConfig,
        pixels_NHWC: npt.NDArray[np.uint8],
        prompts: Sequence[str],
        desirable_N: npt.NDArray[np.bool_],
    ) -> None:
        self.family, self.pipeline, self.seed = family, family.pipeline, config.seed
        self.config: Train = config.train
        assert self.config.objective.kind == "diffusion_kto"
        self.objective = self.config.objective
        self.unet = family.denoiser.requires_grad_(True)
        self.parameters = list(self.unet.parameters())
        self.reference = [parameter.detach().clone() for parameter in self.parameters]
        self.set_aside = [torch.empty_like(parameter) for parameter in self.reference]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        self.pixels_NHWC = torch.from_numpy(pixels_NHWC)
        self.desirable_N = torch.from_numpy(desirable_N)
        self.tokens_NT: Tensor = self.pipeline.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def train_round(self, steps: int) -> None:
        """Take the batches that `Learner.train_round` takes."""
        plan = plan_round(self.desirable_N.numpy(), self.config.gamma, steps, BATCH, self.seed, 0)
        for picks_B in torch.from_numpy(plan):
            self._step(self.pixels_NHWC[picks_B], self.tokens_NT[picks_B], self.desirable_N[picks_B])

    def _step(self, pixels_BHWC: Tensor, tokens_BT: Tensor, desirable_B: Tensor) -> None:
        clean_BCHW = encode_pictures(self.pipeline, pixels_BHWC)
        with torch.no_grad():
            text_B = Conditioning({"text": self.pipeline.text_encoder(tokens_BT)[0]})
        noise_BCHW = torch.randn_like(clean_BCHW)
        timesteps_B = self.family.noise.timesteps(torch.rand(BATCH))
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
