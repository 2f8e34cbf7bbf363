"""Diffusion-KTO: utilities and reference points (Li et al., NeurIPS 2024, arXiv 2404.04465), and what came after it.

For samples with verdict w (+1 desirable, -1 undesirable) and implicit reward g (see `protocol.py`):

    z    = reference point, no gradient; one number for the whole optimizer step, or for each part of the noise range
    loss = mean of  lambda_w * (1 - U(w * beta * (g - z)))

The defaults are the paper's. Options beyond it, each off by default:

- `reference_point: noise_mean`, `scale_by_noise`: z, and the unit in which margins are measured, by noise level, so
  that every part of the schedule has a say (after timestep-aware training, arXiv 2505.18736).
- `relative`: g in units of the sample's own error (after DiffusionNFT's self-normalised regression, arXiv 2509.16117).
- `mirror`: what undesirable samples are measured by (after the implicit negative policy of DiffusionNFT, arXiv
  2509.16117).
- `reference: round | ema`: what g is measured against moves with the policy (arXiv 2505.18736, 2605.21123).
- `target_margin`: beta sets itself.
- `utility: linear` (arXiv 2605.21123), and `safeguard` (closed form after arXiv 2511.03317; `train/safeguard.py`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kto_ray.identity import Fixed
from kto_ray.objectives.protocol import Losses, Memory, Needs, ObjectiveSection, Outputs, Rewards, Scale
from kto_ray.objectives.reference import Referring
from kto_ray.section import Count, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from kto_ray.objectives.noise_means import NoiseMeans

UtilityName = Literal["kahneman_tversky", "loss_averse", "risk_seeking", "linear"]
ReferencePointName = Literal["batch_kl", "mismatched_kl", "class_mean", "zero", "noise_mean"]


def _log_sigmoid(x: "Tensor") -> "Tensor":
    from torch.nn import functional

    return functional.logsigmoid(x)


UTILITIES: dict[UtilityName, Callable[["Tensor"], "Tensor"]] = {
    # Concave in gains, convex in losses; the paper's choice and the best of its ablation (Section 4, Table 3).
    "kahneman_tversky": lambda x: x.sigmoid(),
    # Concave everywhere: losses weigh more and more. The shape of Diffusion-DPO, without pairs.
    "loss_averse": _log_sigmoid,
    # Convex everywhere: gains weigh more and more.
    "risk_seeking": lambda x: -_log_sigmoid(-x),
    # Never flat, neither in gains nor in losses: it knows no end, and wants the safeguard.
    "linear": lambda x: x,
}


class DiffusionKTO(Referring, ObjectiveSection):
    """Diffusion-KTO with its settings."""

    kind: Literal["diffusion_kto"] = "diffusion_kto"
    utility: Fixed[UtilityName] = "kahneman_tversky"
    """The paper's choice, its two others, or "linear", whose slope is the same everywhere (and wants `safeguard`)."""
    reference_point: Fixed[ReferencePointName] = "batch_kl"
    """What counts as neither gain nor loss. "batch_kl" is the released script's, "mismatched_kl" the paper's;
    "noise_mean" has one for each part of the noise range."""
    noise_parts: Fixed[Count] = 8
    """Equal parts of `train.noise_range`, for "noise_mean" and `scale_by_noise`."""
    memory: Fixed[Annotated[float, Field(ge=0, lt=1)]] = 0.9
    """Share of what is kept by noise level that stays from step to step."""
    scale_by_noise: Fixed[bool] = False
    """Measure each margin in units of what is usual at its noise level, so that every part of the schedule has a say:
    beta is multiplied by (mean of all |g - z|) / (mean of |g - z| in the sample's part of the noise range)."""
    beta: Fixed[Positive] = 5000
    """Scale of the implicit reward; choose it so that the median of beta |g - z| is about 0.5 to 2."""
    relative: Fixed[bool] = False
    """Divide each sample's g by the mean absolute error of its reference, |q - t|_1 / d, so that samples count by how
    much better they are explained in proportion, whatever their noise level and picture; beta is then of the size of
    1 / (the share by which errors change)."""
    mirror: Fixed[bool] = False
    """Measure undesirable samples by the policy's mirror image in the reference. With predictions p of the policy and q
    of the reference, and target t:

        g = |q - t|^2 - |p - t|^2              in the loss of desirable samples, and wherever else g is spoken of
        g = |2q - p - t|^2 - |q - t|^2         in the loss of undesirable ones

    Both are 2 <t - q, p - q> to first order. But the first one falls with any step of p away from t, without end; the
    second one only as far as the mirror image explains the sample better, and no lower than -|q - t|^2: a policy that
    is taken apart gains nothing by it."""
    target_margin: Fixed[Positive | None] = None
    """Let beta set itself, so that the median of beta |g - z| is about this; `beta` is what it begins with. 1 is a good
    value where the right beta is not known."""
    margin_memory: Fixed[Annotated[float, Field(ge=0, lt=1)]] = 0.98
    """Share of the median that `target_margin` goes by that stays from step to step."""
    desirable_weight: Fixed[Positive] = 1
    """Factor of the loss of desirable samples."""
    undesirable_weight: Fixed[Positive] = 1
    """Factor of the loss of undesirable samples."""
    safeguard: Fixed[bool] = False
    """Scale the gradient of undesirable samples down, step by step, so far that to first order it makes no desirable
    sample worse explained. Takes a second backward pass."""

    @property
    def needs(self) -> Needs:
        return Needs(
            reference=self.reference,
            mismatched=self.reference_point == "mismatched_kl",
            whole_step=self.reference_point != "zero" or self.scale_by_noise or self.target_margin is not None,
            classes_apart=self.safeguard,
        )

    def check_batch(self, global_batch: int, micro_batch: int) -> None:
        if global_batch == 1 and self.reference_point != "zero":
            raise ValueError(
                f"global_batch 1 with objective.reference_point {self.reference_point}: the mean over one sample says "
                "nothing; use global_batch >= 2, or objective.reference_point: zero"
            )
        by_noise = self.reference_point == "noise_mean" or self.scale_by_noise
        if by_noise and self.noise_parts > global_batch:
            raise ValueError(
                f"objective.noise_parts ({self.noise_parts}) must be at most global_batch ({global_batch}), so that a "
                "step has samples of each part"
            )

    def begin(self, noise_range: tuple[float, float]) -> Memory:
        import torch

        by_noise = self._by_noise(noise_range).none()
        return {
            "noise_range": torch.tensor(noise_range, dtype=torch.float64),  # that the parts below divide
            "rewards": by_noise,  # sums and counts of g
            "distances": by_noise.clone(),  # of |g - z|
            "medians": torch.zeros(2, dtype=torch.float64),  # of a step's |g - z|: weighted sum, and sum of weights
        }

    def reward(self, outputs: Outputs) -> "Tensor":
        return outputs.reward_B / outputs.usual_B if self.relative else outputs.reward_B

    def scale(self, rewards: Rewards, memory: Memory) -> tuple[Scale, Memory]:
        """z and beta of each sample.

            z_k      see `find_reference_point`, or by part k of the noise range: running mean of g, not clamped at 0:
                     where the policy has become worse than its reference on everything, less so is still a gain
            beta_k   beta * (running mean of all |g - z|) / (running mean of |g - z| in k)     for `scale_by_noise`
            beta     target_margin / (running mean of the steps' medians of |g - z| * beta_k / beta)

        Steps in which every g is z, as the first after the reference has become the policy, say nothing of the median
        and do not enter it.

        Raises:
            ValueError: see `find_reference_point`.
        """
        import torch

        reward_B, level_B = rewards.reward_B.detach(), rewards.noise_level_B
        after = dict(memory)
        low, high = memory["noise_range"].tolist()
        by_noise = self._by_noise((low, high))
        if self.reference_point == "noise_mean":
            after["rewards"] = by_noise.after(memory["rewards"], reward_B, level_B)
            z_B = by_noise.at(after["rewards"], level_B)
        else:
            z = self.find_reference_point(reward_B, rewards.desirable_B, rewards.mismatched_reward_B)
            z_B = z.expand(len(reward_B))
        distance_B = (reward_B - z_B).abs()
        stretch_B = torch.ones_like(distance_B)
        if self.scale_by_noise:
            after["distances"] = by_noise.after(memory["distances"], distance_B, level_B)
            usual_B = by_noise.at(after["distances"], level_B)
            sums_K, counts_K = after["distances"]
            overall = (sums_K.sum() / counts_K.sum()).to(usual_B)
            stretch_B = torch.where(usual_B > 0, overall / usual_B, stretch_B)
        beta = self.beta
        if self.target_margin is not None:
            after["medians"] = self._medians(memory["medians"], distance_B * stretch_B)
            weighted, weights = after["medians"].tolist()
            beta = self.target_margin * weights / weighted if weighted else beta
        return Scale(z_B, beta * stretch_B), after

    def find_reference_point(
        self, reward_B: "Tensor", desirable_B: "Tensor", mismatched_reward_B: "Tensor | None" = None
    ) -> "Tensor":
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
            class that is there. `zero`: 0. Those of `noise_mean` differ from sample to sample: see `scale`.

        Raises:
            ValueError: `noise_mean`; `mismatched_kl` without mismatched rewards; or a global batch of one sample, whose
                own mean says nothing.
        """
        import torch

        from kto_ray.objectives.ranks import sum_over_ranks

        if self.reference_point == "zero":
            return reward_B.new_zeros(())
        if self.reference_point == "noise_mean":
            raise ValueError("the reference points of noise_mean are those of `scale`, by noise level")
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

    def losses(self, outputs: Outputs, desirable_B: "Tensor", scale: Scale | None) -> Losses:
        """lambda_w * (1 - U(w * beta * (g - z))); with `mirror`, the margins that are told are those of plain g."""

        def margin_of(reward_B: "Tensor") -> "Tensor":
            return self.beta * reward_B if scale is None else scale.beta_B * (reward_B - scale.z_B)

        reward_B = self.reward(outputs)
        margin_B = margin_of(reward_B)
        if not self.mirror:
            return Losses(self.losses_of(margin_B, desirable_B), margin_B)
        mirrored_B = outputs.mirrored_reward_B / outputs.usual_B if self.relative else outputs.mirrored_reward_B
        return Losses(self.losses_of(margin_of(reward_B.where(desirable_B, mirrored_B)), desirable_B), margin_B)

    def losses_of(self, margin_B: "Tensor", desirable_B: "Tensor") -> "Tensor":
        """lambda_w * (1 - U(w * margin)) of each sample, (B,)."""
        sign_B = desirable_B.to(margin_B.dtype) * 2 - 1
        utility_B = UTILITIES[self.utility](sign_B * margin_B)
        weight_B = sign_B.new_full((), self.desirable_weight).where(
            desirable_B, sign_B.new_full((), self.undesirable_weight)
        )
        return weight_B * (1 - utility_B)

    def _by_noise(self, noise_range: tuple[float, float]) -> "NoiseMeans":
        from kto_ray.objectives.noise_means import NoiseMeans

        return NoiseMeans(self.noise_parts, self.memory, noise_range)

    def _medians(self, medians_2: "Tensor", distance_B: "Tensor") -> "Tensor":
        from kto_ray.objectives.ranks import median_over_ranks

        median = median_over_ranks(distance_B).cpu()
        if median == 0:
            return medians_2
        return self.margin_memory * medians_2 + (1 - self.margin_memory) * median.new_tensor([median.item(), 1.0])
