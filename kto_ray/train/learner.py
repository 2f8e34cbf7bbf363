"""Diffusion-KTO on one rank: a round's samples in, optimizer steps, health figures out.

Knows the objective, the model and `torch.distributed`, but not Ray: `worker.py` feeds it rounds, tests and benchmarks
call it directly. Noise, timesteps and dropped prompts of a step are drawn for the *global* batch from a seed and then
sliced by rank: two ranks train as one does.

Shape suffixes: N samples of the round; B a rank's share of an optimizer step, M a micro-batch; C, H, W latent
channels, height, width; T, D tokens and width of a text embedding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kto_ray.config import Train, steps_for
from kto_ray.diffusion.families import Family
from kto_ray.diffusion.policy import Policy
from kto_ray.objective import DiffusionKTO, Health, denoising_error
from kto_ray.records import derive_seed
from kto_ray.train.sampler import plan_round

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RoundData:
    """What a rank needs of a sealed round: only samples with a verdict, within the lag limit, in the store's order."""

    round_index: int
    latents_NCHW: npt.NDArray[np.float32]
    prompts: Sequence[str]
    desirable_N: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimizer step, on the device."""

    clean_BCHW: Tensor
    noise_BCHW: Tensor
    level_B: Tensor
    text_BTD: Tensor
    mismatched_text_BTD: Tensor
    desirable_B: Tensor

    def micro_batches(self, size: int) -> list["Batch"]:
        parts = [value.split(size) for value in vars(self).values()]
        return [Batch(*fields) for fields in zip(*parts, strict=True)]


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
        self.objective = DiffusionKTO(
            config.utility, config.reference_point, config.beta, config.desirable_weight, config.undesirable_weight
        )
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def train_round(
        self, data: RoundData, on_step: Callable[[int, int], None] = lambda step, steps: None
    ) -> tuple[dict[str, float], npt.NDArray[np.int64]]:
        """Take the optimizer steps of one round.

        Args:
            on_step: called after each step with (steps done, steps in all).

        Returns:
            Health figures (see `Health.summary`; empty when the round has no samples), and how often each of the N
            samples was drawn, by all ranks together.
        """
        config = self.config
        steps = steps_for(len(data.desirable_N), config)
        plan = plan_round(data.desirable_N, config.gamma, steps, config.global_batch, self.seed, data.round_index)
        texts = sorted(set(data.prompts))
        embeddings_PTD = self.family.encode_prompts(["", *texts])
        text_index_N = np.array([texts.index(prompt) + 1 for prompt in data.prompts], np.int64)
        health = Health()
        for step, picks_G in enumerate(plan):
            batch = self._batch(
                data, picks_G, text_index_N, embeddings_PTD, derive_seed(self.seed, data.round_index, step)
            )
            self._optimizer_step(batch, health)
            on_step(step + 1, steps)
        return health.summary(), np.bincount(plan.ravel(), minlength=len(data.desirable_N))

    def _batch(
        self,
        data: RoundData,
        picks_G: npt.NDArray[np.int64],
        text_index_N: npt.NDArray[np.int64],
        embeddings_PTD: Tensor,
        seed: int,
    ) -> Batch:
        """This rank's slice of the global batch G; everything random is drawn for all of it."""
        generator = torch.Generator().manual_seed(seed)
        clean_GCHW = torch.from_numpy(data.latents_NCHW[picks_G])
        noise_GCHW = torch.randn(clean_GCHW.shape, generator=generator)
        low, high = self.config.noise_range
        level_G = low + (high - low) * torch.rand(len(picks_G), generator=generator)
        dropped_G = torch.rand(len(picks_G), generator=generator) < self.config.prompt_dropout
        own_G = torch.from_numpy(text_index_N[picks_G])
        text_G = own_G.masked_fill(dropped_G, 0)
        # Each image with the nearest prompt before it that is not its own; in a batch of one prompt there is none.
        mismatched_G = own_G
        if self.objective.reference_point == "mismatched_kl":
            for places in range(1, len(own_G)):
                mismatched_G = torch.where(mismatched_G == own_G, own_G.roll(places), mismatched_G)
        mine = slice(self.rank * len(picks_G) // self.ranks, (self.rank + 1) * len(picks_G) // self.ranks)
        return Batch(
            clean_BCHW=clean_GCHW[mine].to(self.device),
            noise_BCHW=noise_GCHW[mine].to(self.device),
            level_B=level_G[mine].to(self.device),
            text_BTD=embeddings_PTD[text_G[mine].to(self.device)],
            mismatched_text_BTD=embeddings_PTD[mismatched_G[mine].to(self.device)],
            desirable_B=torch.from_numpy(data.desirable_N[picks_G])[mine].to(self.device),
        )

    def _errors(self, model: nn.Module, batch: Batch, text_BTD: Tensor) -> Tensor:
        """Denoising error of each sample, (B,) float32."""
        timesteps_B = self.family.noise.timesteps(batch.level_B)
        noisy_BCHW = self.family.noise.noisy(batch.clean_BCHW, batch.noise_BCHW, timesteps_B)
        target_BCHW = self.family.noise.target(batch.clean_BCHW, batch.noise_BCHW, timesteps_B)
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            prediction_BCHW = self.family.predict(model, noisy_BCHW, timesteps_B, text_BTD)
        return denoising_error(prediction_BCHW, target_BCHW)

    @torch.no_grad()
    def _reference_errors(self, micro_batches: list[Batch], mismatched: bool = False) -> list[Tensor]:
        with self.policy.reference() as reference:
            return [
                self._errors(reference, batch, batch.mismatched_text_BTD if mismatched else batch.text_BTD)
                for batch in micro_batches
            ]

    def _optimizer_step(self, batch: Batch, health: Health) -> None:
        """One step. The reference point is taken over the whole step before any gradient, whatever the micro-batches.

        With one micro-batch the policy's forward pass serves reference point and gradient both; with several, z must be
        known before the first backward pass, so the policy looks at them once more, without gradient.
        """
        micro_batches = batch.micro_batches(self.config.micro_batch)
        reference_errors = self._reference_errors(micro_batches)
        mismatched_reward_B = None
        if self.objective.reference_point == "mismatched_kl":
            references = self._reference_errors(micro_batches, mismatched=True)
            with torch.no_grad():
                mismatched_reward_B = torch.cat(
                    [
                        reference_M - self._errors(self.policy.module, part, part.mismatched_text_BTD)
                        for reference_M, part in zip(references, micro_batches, strict=True)
                    ]
                )
        z = None
        if len(micro_batches) > 1:
            with torch.no_grad():
                rewards = [
                    reference_M - self._errors(self.policy.module, part, part.text_BTD)
                    for reference_M, part in zip(reference_errors, micro_batches, strict=True)
                ]
            z = self.objective.find_reference_point(torch.cat(rewards), batch.desirable_B, mismatched_reward_B)

        self.optimizer.zero_grad(set_to_none=True)
        rewards_and_losses = []
        for last, part, reference_M in zip(
            [False] * (len(micro_batches) - 1) + [True], micro_batches, reference_errors, strict=True
        ):
            with self._gradient_sync(last):
                reward_M = reference_M - self._errors(self.model, part, part.text_BTD)
                if z is None:
                    z = self.objective.find_reference_point(reward_M, part.desirable_B, mismatched_reward_B)
                loss_M = self.objective.losses(reward_M, part.desirable_B, z)
                (loss_M.sum() / len(batch.desirable_B)).backward()  # type: ignore[no-untyped-call]
            rewards_and_losses.append((reward_M.detach(), loss_M.detach()))
        assert z is not None
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        reward_B, loss_B = (torch.cat(parts) for parts in zip(*rewards_and_losses, strict=True))
        health.add(self.objective, reward_B, batch.desirable_B, z, loss_B, batch.level_B, gradient_norm)

    @contextlib.contextmanager
    def _gradient_sync(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients once a step, with its last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            yield
        else:
            with self.model.no_sync():
                yield
