"""Diffusion-KTO: utilities, reference points, loss and health figures (Li et al., NeurIPS 2024, arXiv 2404.04465).

Pure torch: knows neither Ray nor diffusers. `train/learner.py` feeds it the denoising errors of policy and reference
on the same noisy latents and backpropagates its loss.

For a clean latent x0 with verdict w (+1 desirable, -1 undesirable), and noise and timestep that both models share:

    g    = error_reference - error_policy            the implicit reward: > 0 when the policy explains x0 better
    z    = reference point, no gradient; one number for the whole optimizer step, or for each part of the noise range
    loss = mean of  lambda_w * (1 - U(w * beta * (g - z)))

Shape suffixes: B samples of one rank's batch; C, H, W latent channels, height, width. `_B` tensors are float32 of
shape (B,), `desirable_B` is bool of shape (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

UtilityName = Literal["kahneman_tversky", "loss_averse", "risk_seeking"]
ReferencePointName = Literal["batch_kl", "mismatched_kl", "class_mean", "zero", "noise_mean"]

UTILITIES: dict[UtilityName, Callable[[Tensor], Tensor]] = {
    # Concave in gains, convex in losses; the paper's choice and the best of its ablation (Section 4, Table 3).
    "kahneman_tversky": torch.sigmoid,
    # Concave everywhere: losses weigh more and more. The shape of Diffusion-DPO, without pairs.
    "loss_averse": F.logsigmoid,
    # Convex everywhere: gains weigh more and more.
    "risk_seeking": lambda x: -F.logsigmoid(-x),
}

SATURATED = 4.0  # |beta (g - z)| beyond which the sigmoid's slope is under about 7 % of its largest: nearly mute


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over all but the first dimension, in float32: (B, ...) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over the ranks of the default process group; the tensor itself when there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # NCCL reduces only what lies on a GPU.
        device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else values.device
        total = values.to(device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(values.device)
    return values


@dataclass(frozen=True)
class NoiseMeans:
    """Running means of g by parts of the noise range: what "neither gain nor loss" is at each noise level.

    How far policy and reference differ depends on the noise far more than on the verdict. With one z for all levels,
    on which side of it a sample falls is decided by its noise level; with one for each part, by its verdict.

    A step t adds what it has seen of part k, over all ranks, to an exponentially weighted sum and count:

        sums_k   = memory * sums_k   + sum of g in k
        counts_k = memory * counts_k + samples in k
        z_k      = sums_k / counts_k      (of all parts together, as long as nothing of k was seen)

    so that a part with few samples in a step changes its mean by little. Not clamped at 0: where the policy has
    become worse than its reference on everything, a sample that is less so is still a gain.

    Args:
        sums_K, counts_K: float64.
        memory: share that stays from step to step, in [0, 1).
        noise_range: what is divided into K equal parts, cleanest first.
    """

    sums_K: Tensor
    counts_K: Tensor
    memory: float
    noise_range: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def none(cls, parts: int, memory: float, noise_range: tuple[float, float] = (0.0, 1.0)) -> "NoiseMeans":
        """Before the first step."""
        nothing_K = torch.zeros(parts, dtype=torch.float64)
        return cls(nothing_K, nothing_K, memory, noise_range)

    def _part(self, noise_level_B: Tensor) -> Tensor:
        low, high = self.noise_range
        parts = len(self.sums_K)
        part_B: Tensor = ((noise_level_B.double().cpu() - low) / (high - low) * parts).long().clamp(0, parts - 1)
        return part_B

    def after(self, reward_B: Tensor, noise_level_B: Tensor) -> "NoiseMeans":
        """The means after a step of which this rank has these samples; the other ranks call it with theirs."""
        part_B, reward_B = self._part(noise_level_B), reward_B.detach().double().cpu()
        seen_2K = torch.zeros(2, len(self.sums_K), dtype=torch.float64)
        seen_2K[0].index_add_(0, part_B, reward_B)
        seen_2K[1].index_add_(0, part_B, torch.ones_like(reward_B))
        sums_K, counts_K = sum_over_ranks(seen_2K)
        return replace(self, sums_K=self.memory * self.sums_K + sums_K, counts_K=self.memory * self.counts_K + counts_K)

    def at(self, noise_level_B: Tensor) -> Tensor:
        """z of each sample, float32 (B,)."""
        overall = self.sums_K.sum() / self.counts_K.sum().clamp(min=1e-12)
        z_K = torch.where(self.counts_K > 0, self.sums_K / self.counts_K.clamp(min=1e-12), overall)
        return z_K[self._part(noise_level_B)].to(noise_level_B.device, torch.float32)


@dataclass(frozen=True)
class Needs:
    """What an objective looks at besides the policy's own errors; `train/learner.py` computes no more than that."""

    reference: bool = False
    """The frozen reference's errors on the same noisy latents."""
    reference_of_the_round: bool = False
    """That reference is the policy that drew the round's samples, and not the base model."""
    mismatched: bool = False
    """Both models' errors on each image with a prompt that is not its own."""
    whole_step: bool = False
    """Figures over the whole optimizer step, before the first gradient."""
    noise_means: bool = False
    """What the steps before have seen of each part of the noise range."""


@dataclass(frozen=True)
class DiffusionKTO:
    """The objective with its settings.

    Args:
        utility: a name of `UTILITIES`.
        reference_point: how z is found, see `find_reference_point`.
        beta: scale of the implicit reward; choose it so that the median of beta * |g| is about 0.5 to 2.
        desirable_weight, undesirable_weight: lambda_w.
        reference: the base model, or the policy that drew the round; the learner serves it.
        noise_parts, memory: of `NoiseMeans`, for the reference point `noise_mean`.
    """

    utility: UtilityName = "kahneman_tversky"
    reference_point: ReferencePointName = "batch_kl"
    beta: float = 5000.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Literal["fixed", "round"] = "fixed"
    noise_parts: int = 8
    memory: float = 0.9

    @property
    def needs(self) -> Needs:
        return Needs(
            reference=True,
            reference_of_the_round=self.reference == "round",
            mismatched=self.reference_point == "mismatched_kl",
            whole_step=self.reference_point != "zero",
            noise_means=self.reference_point == "noise_mean",
        )

    def find_reference_point(
        self, reward_B: Tensor, desirable_B: Tensor, mismatched_reward_B: Tensor | None = None
    ) -> Tensor:
        """z, the implicit reward that counts as neither gain nor loss: a float32 scalar, equal on every rank.

        Must see the samples of the whole optimizer step: all accumulated micro-batches of this rank at once, while
        the other ranks call it with theirs. The sums are reduced over the ranks before anything is divided or clamped.

        Args:
            reward_B: g of this rank's samples.
            desirable_B: their verdicts.
            mismatched_reward_B: g of (x0, prompt) pairs that do not belong together; for `mismatched_kl` only.

        Returns:
            `batch_kl`: max(0, mean g); the released script's default. `mismatched_kl`: max(0, mean g of mismatched
            pairs); the paper's text (Section 4). `class_mean`: mean of the two classes' mean g, or the mean of the one
            class that is there. `zero`: 0. Those of `noise_mean` differ from sample to sample: see `NoiseMeans`.

        Raises:
            ValueError: `noise_mean`; `mismatched_kl` without mismatched rewards; or a global batch of one sample, whose
                own mean says nothing.
        """
        if self.reference_point == "zero":
            return reward_B.new_zeros(())
        if self.reference_point == "noise_mean":
            raise ValueError("the reference points of noise_mean are those of NoiseMeans")
        rewards_B = reward_B
        if self.reference_point == "mismatched_kl":
            if mismatched_reward_B is None:
                raise ValueError("reference point mismatched_kl needs the rewards of mismatched pairs")
            rewards_B = mismatched_reward_B
        classes = (
            (desirable_B, ~desirable_B) if self.reference_point == "class_mean" else (torch.ones_like(desirable_B),)
        )
        rewards_B = rewards_B.detach().double()
        sums_and_counts = torch.stack(
            [torch.stack([rewards_B[chosen_B].sum(), chosen_B.sum().double()]) for chosen_B in classes]
        )
        sums, counts = sum_over_ranks(sums_and_counts).unbind(1)
        if counts.sum() < 2:
            raise ValueError(
                f"reference point {self.reference_point} of a global batch of {int(counts.sum())} sample: "
                "it needs at least 2 samples in an optimizer step (or reference_point: zero)"
            )
        z = (sums[counts > 0] / counts[counts > 0]).mean()
        if self.reference_point != "class_mean":
            z = z.clamp(min=0)
        return z.to(reward_B.dtype)

    def losses(self, reward_B: Tensor, desirable_B: Tensor, z: Tensor) -> Tensor:
        """lambda_w * (1 - U(w * beta * (g - z))) of each sample, (B,); the loss is its mean over the global batch.

        Args:
            z: a scalar, or one for each sample, (B,).
        """
        sign_B = desirable_B.to(reward_B.dtype) * 2 - 1
        utility_B = UTILITIES[self.utility](sign_B * self.beta * (reward_B - z))
        weight_B = torch.where(desirable_B, self.desirable_weight, self.undesirable_weight)
        return weight_B.to(reward_B.dtype) * (1 - utility_B)


OBJECTIVES = {"diffusion_kto": DiffusionKTO}


def make_objective(kind: str, **settings: Any) -> DiffusionKTO:
    """The objective that `train.objective` names, with its settings."""
    return OBJECTIVES[kind](**settings)


class Health:
    """Collects, over the steps of a round, what one needs to debug KTO; `summary` reduces it over the ranks.

    Args:
        noise_bins: number of equal parts of the noise range for which g is told apart.
    """

    def __init__(self, noise_bins: int = 4) -> None:
        self.noise_bins = noise_bins
        self._samples: list[Tensor] = []  # one (B, 5) float64 tensor a step; columns as in `add`
        self._steps: list[Tensor] = []  # one (2,) float64 tensor a step: z, gradient norm

    @torch.no_grad()
    def add(
        self,
        objective: DiffusionKTO,
        reward_B: Tensor,
        desirable_B: Tensor,
        z: Tensor,
        loss_B: Tensor,
        noise_level_B: Tensor,
        gradient_norm: Tensor,
    ) -> None:
        """Take in one optimizer step. `noise_level_B` in [0, 1): 0 is clean, 1 is pure noise; `z` as in `losses`."""
        margin_B = objective.beta * (reward_B - z)
        columns = (reward_B, desirable_B, margin_B, loss_B, noise_level_B)
        self._samples.append(torch.stack([column.detach().double().cpu() for column in columns], dim=1))
        self._steps.append(torch.stack([z.double().mean().cpu(), gradient_norm.double().cpu()]))

    def summary(self) -> dict[str, float]:
        """Means over the round and all ranks; a figure without samples is left out, never made up.

        `g_desirable`, `g_undesirable`, `z`; `saturated` (|beta (g - z)| > 4) and `accuracy` (sign of g - z agrees with
        the verdict) as shares of samples; `margin` (mean |beta (g - z)|); `loss`; `gradient_norm`; `g_noise_K` for
        the K-th part of the noise range, cleanest first.
        """
        samples = torch.cat(self._samples) if self._samples else torch.zeros((0, 5), dtype=torch.float64)
        steps = torch.stack(self._steps) if self._steps else torch.zeros((0, 2), dtype=torch.float64)
        reward_B, desirable_B, margin_B, loss_B, noise_level_B = samples.unbind(1)
        desirable_B = desirable_B > 0.5
        bin_B = (noise_level_B * self.noise_bins).long().clamp(max=self.noise_bins - 1)
        figures = {
            "loss": loss_B,
            "accuracy": ((margin_B > 0) == desirable_B).double(),
            "saturated": (margin_B.abs() > SATURATED).double(),
            "margin": margin_B.abs(),
            "g_desirable": reward_B[desirable_B],
            "g_undesirable": reward_B[~desirable_B],
            **{f"g_noise_{part}": reward_B[bin_B == part] for part in range(self.noise_bins)},
            "z": steps[:, 0],
            "gradient_norm": steps[:, 1],
        }
        sums_and_counts = torch.stack([values.new_tensor([values.sum(), len(values)]) for values in figures.values()])
        totals = sum_over_ranks(sums_and_counts).tolist()
        return {name: total / count for name, (total, count) in zip(figures, totals, strict=True) if count}
