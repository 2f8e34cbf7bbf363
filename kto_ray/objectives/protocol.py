"""What an objective is to the rest: settings, what it needs of a learner, and a loss for every sample.

Each objective is a section of the configuration (`train.objective`) with its formula in it: settings and equations
stand side by side in one file of this package. `train/learner.py` serves what `needs` asks for, `config/` checks the
settings against the rest of the tree. Importing an objective loads no torch: its methods do.

An objective sees a step twice, where it asks to (`whole_step`): first the implicit rewards of all samples of the
optimizer step, from which it takes what they share (`scale`), then each micro-batch with gradient (`losses`).

For a clean latent x0, and noise and timestep that policy and reference share:

    g = error_reference - error_policy            the implicit reward: > 0 when the policy explains x0 better

Shape suffixes: B samples of one rank's batch, or M of a micro-batch; C, H, W latent channels, height, width. `_B`
tensors are float32 of shape (B,), `desirable_B` is bool of shape (B,).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from kto_ray.section import Section

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-5
"""Mean absolute error by which something is divided."""

Memory = Mapping[str, "Tensor"]
"""What an objective knows of the steps before, by name; float64, equal on every rank, kept in checkpoints."""

ReferenceName = Literal["fixed", "round", "ema"]


@dataclass(frozen=True)
class Needs:
    """What an objective looks at besides the policy's own errors; no more than that is computed, or drawn."""

    reference: ReferenceName | None = None
    """The predictions of a frozen reference on the same noisy latents: the base model, the policy that drew the round,
    or a running average of the policies."""
    own_rounds: bool = False
    """Only rounds that this run's own policies drew."""
    mismatched: bool = False
    """The implicit reward of each image with a prompt that is not its own."""
    whole_step: bool = False
    """The implicit rewards of the whole optimizer step, before its first gradient."""
    undesirable: bool = True
    """Undesirable samples; without, only desirable ones are drawn."""
    pairs: Literal["verdicts", "scores"] | None = None
    """Batches of pairs: at every even place the better of two samples of one prompt, after it the other, by their
    verdicts or by their scores. The two share noise, timestep and whether their prompt is dropped; the better one
    counts as desirable."""
    classes_apart: bool = False
    """The gradients of desirable and undesirable samples apart, so that the safeguard can scale the latter."""
    prefixes: tuple[str, str] | None = None
    """What goes before the prompts of desirable and of undesirable samples; images are drawn with the first of them."""


@dataclass(frozen=True)
class Rewards:
    """What this rank's samples of an optimizer step come to before its gradient.

    Args:
        reward_B: g.
        noise_level_B: in [0, 1): 0 is clean, 1 is pure noise.
        mismatched_reward_B: g with prompts that are not the images' own; where `Needs.mismatched` asks for it.
    """

    reward_B: "Tensor"
    desirable_B: "Tensor"
    noise_level_B: "Tensor"
    mismatched_reward_B: "Tensor | None" = None


@dataclass(frozen=True)
class Scale:
    """What the samples of a step share, for each of them: margins are beta * (g - z)."""

    z_B: "Tensor"
    beta_B: "Tensor"

    def __getitem__(self, place: slice) -> "Scale":
        return Scale(self.z_B[place], self.beta_B[place])


@dataclass(frozen=True)
class Outputs:
    """What the policy, with gradient, and its reference predict for the same noisy latents; (B, C, H, W) each."""

    prediction_BCHW: "Tensor"
    target_BCHW: "Tensor"
    reference_BCHW: "Tensor | None" = None

    @cached_property
    def error_B(self) -> "Tensor":
        """The policy's denoising error."""
        return denoising_error(self.prediction_BCHW, self.target_BCHW)

    @cached_property
    def reward_B(self) -> "Tensor":
        """g; raises ValueError without a reference."""
        return denoising_error(self._reference_BCHW, self.target_BCHW) - self.error_B

    @cached_property
    def mirrored_reward_B(self) -> "Tensor":
        """g by the policy's mirror image in its reference, with the sign turned: see `DiffusionKTO.mirror`."""
        reference_BCHW = self._reference_BCHW.float()
        mirror_BCHW = 2 * reference_BCHW - self.prediction_BCHW.float()
        return denoising_error(mirror_BCHW, self.target_BCHW) - denoising_error(reference_BCHW, self.target_BCHW)

    @cached_property
    def usual_B(self) -> "Tensor":
        """The reference's mean absolute error, by which a sample's g becomes one of parts: float32, above 0."""
        distance_BCHW = (self._reference_BCHW.float() - self.target_BCHW.float()).abs()
        return distance_BCHW.flatten(1).mean(1).clamp(min=SMALLEST)

    @property
    def _reference_BCHW(self) -> "Tensor":
        if self.reference_BCHW is None:
            raise ValueError("there is no implicit reward without a reference")
        return self.reference_BCHW


@dataclass(frozen=True)
class Losses:
    """Of each sample; the step's loss is their mean over the global batch.

    Args:
        margin_B: what the objective pushes up for desirable samples and down for undesirable ones, in the units in
            which its utility bends; None: it has none.
    """

    loss_B: "Tensor"
    margin_B: "Tensor | None" = None


class ObjectiveSection(Section):
    """What all objectives have; those without memory or scale leave these as they are."""

    @property
    def needs(self) -> Needs:
        """What the learner has to serve."""
        return Needs()

    def reward(self, outputs: Outputs) -> "Tensor":
        """g of each sample, as this objective measures it; with a reference only."""
        return outputs.reward_B

    def check_batch(self, global_batch: int, micro_batch: int) -> None:
        """Raises ValueError where an optimizer step of so many samples, so many at once, is no step for it."""

    def begin(self, noise_range: tuple[float, float]) -> Memory:
        """What is known before the first step.

        Args:
            noise_range: `train.noise_range`.
        """
        return {}

    def scale(self, rewards: Rewards, memory: Memory) -> tuple[Scale, Memory]:
        """What the samples of a step share, and what is known after it; for those that need the whole step.

        The step may still be given up: `memory` is left as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} needs no whole step")

    def losses(self, outputs: Outputs, desirable_B: "Tensor", scale: Scale | None) -> Losses:
        """The loss of each sample.

        Args:
            scale: of these samples; None where the objective needs no whole step.
        """
        raise NotImplementedError


def denoising_error(prediction: "Tensor", target: "Tensor") -> "Tensor":
    """Mean squared error of each sample over all but the first dimension, in float32: (B, ...) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
