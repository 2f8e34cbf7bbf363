"""Diffusion-KTO on one rank: a round's samples in, optimizer steps, health figures out.

Knows the objective, the model and `torch.distributed`, but not Ray: `worker.py` feeds it rounds, tests and benchmarks
call it directly. Its batches come from `batches.py`.

Shape suffixes: N samples of the round; B a rank's share of an optimizer step, M a micro-batch; C, H, W latent
channels, height, width.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kto_ray.config import Train
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.families import DTYPES, Family
from kto_ray.diffusion.policy import Policy
from kto_ray.objectives.diffusion_kto import Health, NoiseMeans, denoising_error, make_objective
from kto_ray.train.batches import Batch, Batches, RoundBatches, RoundData
from kto_ray.train.finite import NotFiniteError, require_finite_step, require_finite_weights


class Learner:
    """Model, optimizer and their state, hot between rounds.

    Args:
        wrap: makes a module distributed (`ray.train.torch.prepare_model`); identity on a single process.
        rank, ranks: which slice of every global batch is this process's.
        total_steps: optimizer steps of the whole run, over which a decaying learning rate decays.
    """

    def __init__(
        self,
        family: Family,
        policy: Policy,
        config: Train,
        seed: int,
        device: torch.device,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        rank: int = 0,
        ranks: int = 1,
        total_steps: int = 1,
    ) -> None:
        self.family, self.policy, self.config, self.seed, self.device = family, policy, config, seed, device
        self.rank, self.ranks = rank, ranks
        self.objective = make_objective(**config.objective.model_dump())
        self.noise_means = NoiseMeans.none(self.objective.noise_parts, self.objective.memory, config.noise_range)
        if config.gradient_checkpointing:
            policy.module.enable_gradient_checkpointing()  # type: ignore[operator]
            policy.module.train()
        self.model = wrap(policy.module)
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = get_scheduler(
            {"constant": "constant_with_warmup", "cosine": "cosine"}[config.decay],
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=total_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restarted worker needs to go on as if nothing had happened."""
        return {
            "policy": self.policy.tensors(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "noise_means": {"sums": self.noise_means.sums_K, "counts": self.noise_means.counts_K},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if means := state.get("noise_means"):  # checkpoints of version 0.1.0 have none
            self.noise_means = replace(self.noise_means, sums_K=means["sums"], counts_K=means["counts"])
        # The state has settings in it, too, which may have changed with a rewinding: the configuration's hold.
        rate = self.config.learning_rate
        self.scheduler.base_lrs = [rate]
        self.scheduler._last_lr = [rate * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)]
        for group in self.optimizer.param_groups:
            group |= {"initial_lr": rate, "weight_decay": self.config.weight_decay, "lr": self.scheduler._last_lr[0]}

    def train_round(
        self,
        data: RoundData,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        on_left_out: Callable[[list[int]], None] = lambda samples: None,
    ) -> tuple[dict[str, float], npt.NDArray[np.int64]]:
        """Take the optimizer steps of one round.

        Args:
            on_step: called after each step with (steps done, steps in all).
            on_left_out: called at the end with those of the N samples, by index, that `train.on_nonfinite` left out.

        Returns:
            Health figures (see `Health.summary`; empty when the round has no samples), and how often each of the N
            samples was drawn, by all ranks together.

        Raises:
            NotFiniteError: a step would have ruined the policy, and nobody is left out for it; it was not taken. Or
                the weights are ruined.
        """
        batches = RoundBatches(
            data,
            self.config,
            self.family,
            self.seed,
            self.device,
            self.objective.needs.mismatched,
            self.rank,
            self.ranks,
        )
        figures = self.train(batches, on_step)
        if batches.left_out:
            on_left_out(sorted(batches.left_out))
            figures["left_out"] = float(len(batches.left_out))
        return figures, batches.draws_N

    def train(
        self, batches: Batches, on_step: Callable[[int, int], None] = lambda step, steps: None
    ) -> dict[str, float]:
        """Take an optimizer step for each batch; `on_step`, errors and what is returned are as in `train_round`."""
        health, step = Health(), 0
        require_finite_weights(self.policy.parameters())
        for batch in batches:
            try:
                self._optimizer_step(batch, health)
            except NotFiniteError as error:
                batches.leave_out(error)
            else:
                step += 1
                on_step(step, len(batches))
        require_finite_weights(self.policy.parameters())
        return health.summary()

    def _errors(self, model: nn.Module, batch: Batch, text_B: Conditioning) -> Tensor:
        """Denoising error of each sample, (B,) float32."""
        timesteps_B = self.family.noise.timesteps(batch.level_B)
        noisy_BCHW = self.family.noise.noisy(batch.clean_BCHW, batch.noise_BCHW, timesteps_B)
        target_BCHW = self.family.noise.target(batch.clean_BCHW, batch.noise_BCHW, timesteps_B)
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            prediction_BCHW = self.family.predict(model, noisy_BCHW, timesteps_B, text_B)
        return denoising_error(prediction_BCHW, target_BCHW)

    @torch.no_grad()
    def _reference_errors(self, micro_batches: list[Batch], mismatched: bool = False) -> list[Tensor]:
        with self.policy.reference() as reference:
            return [
                self._errors(reference, batch, batch.mismatched_text_B if mismatched else batch.text_B)
                for batch in micro_batches
            ]

    def _optimizer_step(self, batch: Batch, health: Health) -> None:
        """One step, or NotFiniteError and none; its `samples` are places in the global batch then.

        The reference point is taken over the whole step before any gradient, whatever the micro-batches.

        With one micro-batch the policy's forward pass serves reference point and gradient both; with several, z must be
        known before the first backward pass, so the policy looks at them once more, without gradient.
        """
        micro_batches = batch.micro_batches(self.config.micro_batch)
        reference_errors = self._reference_errors(micro_batches)
        mismatched_reward_B = None
        if self.objective.needs.mismatched:
            references = self._reference_errors(micro_batches, mismatched=True)
            with torch.no_grad():
                mismatched_reward_B = torch.cat(
                    [
                        reference_M - self._errors(self.policy.module, part, part.mismatched_text_B)
                        for reference_M, part in zip(references, micro_batches, strict=True)
                    ]
                )
        noise_means = self.noise_means

        def reference_points(reward_B: Tensor) -> Tensor:
            nonlocal noise_means
            if self.objective.needs.noise_means:
                noise_means = self.noise_means.after(reward_B, batch.level_B)
                return noise_means.at(batch.level_B)
            z = self.objective.find_reference_point(reward_B, batch.desirable_B, mismatched_reward_B)
            return z.expand(len(batch.desirable_B))

        z_B = None
        if len(micro_batches) > 1 and self.objective.needs.whole_step:
            with torch.no_grad():
                rewards = [
                    reference_M - self._errors(self.policy.module, part, part.text_B)
                    for reference_M, part in zip(reference_errors, micro_batches, strict=True)
                ]
            z_B = reference_points(torch.cat(rewards))

        self.optimizer.zero_grad(set_to_none=True)
        rewards_and_losses = []
        start = 0
        for part, reference_M in zip(micro_batches, reference_errors, strict=True):
            end = start + len(part.desirable_B)
            with self._gradient_sync(last=end == len(batch.desirable_B)):
                reward_M = reference_M - self._errors(self.model, part, part.text_B)
                if z_B is None:
                    z_B = reference_points(reward_M)
                loss_M = self.objective.losses(reward_M, part.desirable_B, z_B[start:end])
                (loss_M.sum() / len(batch.desirable_B)).backward()  # type: ignore[no-untyped-call]
            rewards_and_losses.append((reward_M.detach(), loss_M.detach()))
            start = end
        assert z_B is not None
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        reward_B, loss_B = (torch.cat(parts) for parts in zip(*rewards_and_losses, strict=True))
        require_finite_step(reward_B, loss_B, gradient_norm, self.rank, self.ranks)
        self.optimizer.step()
        self.scheduler.step()
        self.noise_means = noise_means
        health.add(self.objective, reward_B, batch.desirable_B, z_B, loss_B, batch.level_B, gradient_norm)

    @contextlib.contextmanager
    def _gradient_sync(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients once a step, with its last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            yield
        else:
            with self.model.no_sync():
                yield
