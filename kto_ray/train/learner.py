"""Training on one rank: a round's samples in, optimizer steps, health figures out.

Serves whatever objective `train.objective` is (`objectives/`): predictions of policy and reference on the same noisy
latents, and what it shares over a step. Knows the model and `torch.distributed`, but not Ray: `worker.py` feeds it
rounds, tests and benchmarks call it directly. Its batches come from `batches.py`, what is published of it from
`averaging.py`.

Shape suffixes: N samples of the round; B a rank's share of an optimizer step, M a micro-batch; C, H, W latent
channels, height, width.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from kto_ray.config import Train
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import DTYPES
from kto_ray.diffusion.policy import Policy
from kto_ray.diffusion.sharding import whole
from kto_ray.diffusion.texts import Texts
from kto_ray.objectives.health import Health
from kto_ray.objectives.protocol import Losses, Outputs, Rewards, Scale
from kto_ray.sleeping import Sleeper
from kto_ray.train.averaging import RunningReference, sampling_policy
from kto_ray.train.batches import Batch, Batches, TrainingData
from kto_ray.train.finite import NotFiniteError, require_finite_step, require_finite_weights
from kto_ray.train.optimizers import make_optimizer
from kto_ray.train.safeguard import Safeguard


class Learner:
    """Model, optimizer and their state, hot between rounds.

    Args:
        wrap: makes a module distributed (`ray.train.torch.prepare_model`); identity on a single process.
        rank, ranks: which slice of every global batch is this process's.
        total_steps: optimizer steps of the whole run, over which a decaying learning rate decays.
        texts: the family's prompts, encoded; None: by the family itself.
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
        texts: Texts | None = None,
    ) -> None:
        self.family, self.policy, self.config, self.seed, self.device = family, policy, config, seed, device
        self.rank, self.ranks = rank, ranks
        self.texts = texts or Texts(lambda: family)
        self.objective = config.objective
        self.memory = self.objective.begin(config.noise_range)
        self.sampling = sampling_policy(config.sampling_policy, policy)
        self.reference = RunningReference(policy.tensors() if self.objective.needs.reference == "ema" else {})
        if config.gradient_checkpointing:
            policy.module.enable_gradient_checkpointing()  # type: ignore[operator]
            policy.module.train()
        self.model = wrap(policy.module)
        self.optimizer = make_optimizer(config, policy.parameters())
        self.scheduler = get_scheduler(
            {"constant": "constant_with_warmup", "cosine": "cosine"}[config.decay],
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=total_steps,
        )
        self._sleeper = Sleeper(device, self._on_device)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restarted worker needs to go on as if nothing had happened."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self._optimizer_state(),
            "scheduler": self.scheduler.state_dict(),
            "objective": dict(self.memory),
            "sampling": self.sampling.state_dict(),
            "reference": self.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        if self.policy.sharded:
            set_optimizer_state_dict(self.policy.module, self.optimizer, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # The state has settings in it, too, which may have changed with a rewinding: the configuration's hold. What was
        # kept for another objective is of no use to this one; checkpoints of version 0.1.0 kept nothing.
        begun, kept = self.objective.begin(self.config.noise_range), state.get("objective", {})
        same = {name: value.shape for name, value in begun.items()} == {n: value.shape for n, value in kept.items()}
        self.memory = kept if same else begun
        self.sampling.load_state_dict(state.get("sampling", {}))
        self.reference.load_state_dict(state.get("reference", {}))
        rate = self.config.learning_rate
        self.scheduler.base_lrs = [rate]
        self.scheduler._last_lr = [rate * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)]
        for group in self.optimizer.param_groups:
            group |= {"initial_lr": rate, "weight_decay": self.config.weight_decay, "lr": self.scheduler._last_lr[0]}

    def _optimizer_state(self) -> dict[str, Any]:
        return (
            get_optimizer_state_dict(self.policy.module, self.optimizer)
            if self.policy.sharded
            else self.optimizer.state_dict()
        )

    def sleep(self) -> None:
        """Leave the device, with everything that is trained on and with; see `Sleeper`."""
        self.optimizer.zero_grad(set_to_none=True)  # the last step's, which nobody wants any more
        self._sleeper.sleep()

    def wake(self) -> None:
        """Be there again, to the last bit."""
        self._sleeper.wake()

    @property
    def asleep(self) -> bool:
        return self._sleeper.asleep

    def _on_device(self) -> list[Any]:
        return [*self.policy.on_device(), self.sampling.on_device(), self.optimizer.state, dict(self.memory)]

    def begin_from(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Become a published policy, without its optimizer's state; None: the base."""
        self.policy.load(tensors)
        self.sampling.begin()

    def train_round(
        self,
        data: TrainingData,
        on_step: Callable[[int, int], None] = lambda step, steps: None,
        on_left_out: Callable[[list[int]], None] = lambda samples: None,
    ) -> tuple[dict[str, float], npt.NDArray[np.int64]]:
        """Take the optimizer steps of one round, or of one interval of a stream.

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
        batches = data.batches(self.config, self.family, self.texts, self.seed, self.device, self.rank, self.ranks)
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
        self.sampling.after_round()
        return health.summary()

    def _predict(self, model: nn.Module, batch: Batch, text_B: Conditioning) -> tuple[Tensor, Tensor]:
        """What a model makes of the noisy latents, and what it should: (B, C, H, W) each."""
        timesteps_B = self.family.noise.timesteps(batch.level_B)
        noisy_BCHW = self.family.noise.noisy(batch.clean_BCHW, batch.noise_BCHW, timesteps_B)
        target_BCHW = self.family.noise.target(batch.clean_BCHW, batch.noise_BCHW, timesteps_B)
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.family.predict(model, noisy_BCHW, timesteps_B, text_B), target_BCHW

    @torch.no_grad()
    def _references(self, parts: list[Batch], mismatched: bool = False) -> list[Tensor | None]:
        """The reference's predictions, where the objective has one."""
        if not self.objective.needs.reference:
            return [None] * len(parts)
        with self.policy.reference() as reference:
            return [
                self._predict(reference, part, part.mismatched_text_B if mismatched else part.text_B)[0]
                for part in parts
            ]

    @torch.no_grad()
    def _rewards(self, parts: list[Batch], references: list[Tensor | None], mismatched: bool = False) -> Tensor:
        """The implicit rewards of this rank's share of a step, (B,), without gradient."""
        text_of = attrgetter("mismatched_text_B" if mismatched else "text_B")
        outputs = (
            Outputs(*self._predict(self.policy.module, part, text_of(part)), reference_BCHW=reference)
            for part, reference in zip(parts, references, strict=True)
        )
        return torch.cat([self.objective.reward(made) for made in outputs])

    def _optimizer_step(self, batch: Batch, health: Health) -> None:
        """One step, or NotFiniteError and none; its `samples` are places in the global batch then.

        What samples share is taken over the whole step before any gradient, whatever the micro-batches. With one
        micro-batch the policy's forward pass serves that and the gradient both; with several, it must be known before
        the first backward pass, so the policy looks at them once more, without gradient.
        """
        needs, parts = self.objective.needs, batch.micro_batches(self.config.micro_batch)
        references = self._references(parts)
        mismatched_reward_B = None
        if needs.mismatched:
            mismatched_reward_B = self._rewards(parts, self._references(parts, mismatched=True), mismatched=True)
        scale, memory = None, self.memory

        def share(reward_B: Tensor) -> tuple[Scale, Any]:
            rewards = Rewards(reward_B.detach(), batch.desirable_B, batch.level_B, mismatched_reward_B)
            return self.objective.scale(rewards, self.memory)

        if needs.whole_step and len(parts) > 1:
            scale, memory = share(self._rewards(parts, references))

        self.optimizer.zero_grad(set_to_none=True)
        safeguard = Safeguard(self.policy.parameters()) if needs.classes_apart else None
        # DDP would add up what the safeguard wants apart.
        model = self.policy.module if safeguard else self.model
        made: list[tuple[Outputs, Losses]] = []
        start = 0
        for part, reference in zip(parts, references, strict=True):
            end = start + len(part.desirable_B)
            with self._gradient_sync(last=end == len(batch.desirable_B)):
                outputs = Outputs(*self._predict(model, part, part.text_B), reference_BCHW=reference)
                if needs.whole_step and scale is None:
                    scale, memory = share(self.objective.reward(outputs))
                losses = self.objective.losses(outputs, part.desirable_B, scale and scale[start:end])
                loss_M = losses.loss_B / len(batch.desirable_B)
                if safeguard:
                    safeguard.add(loss_M, part.desirable_B)
                else:
                    loss_M.sum().backward()  # type: ignore[no-untyped-call]
            made.append((outputs, losses))
            start = end
        kept = safeguard.finish(self.ranks) if safeguard else None
        gradient_norm = whole(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm))
        losses = _joined([losses for _, losses in made])
        error_B = torch.cat([outputs.error_B.detach() for outputs, _ in made])
        reward_B = None
        if needs.reference:
            reward_B = torch.cat([self.objective.reward(outputs).detach() for outputs, _ in made])
        require_finite_step(
            error_B if reward_B is None else reward_B, losses.loss_B, gradient_norm, self.rank, self.ranks
        )
        self.optimizer.step()
        self.scheduler.step()
        self.memory = memory
        self.sampling.after_step()
        health.add(reward_B, batch.desirable_B, losses, scale, batch.level_B, gradient_norm, kept)

    @contextlib.contextmanager
    def _gradient_sync(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients once a step, with its last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            yield
        else:
            with self.model.no_sync():
                yield


def _joined(parts: list[Losses]) -> Losses:
    """Those of micro-batches, as those of one batch, without gradient."""
    margins = [part.margin_B.detach() for part in parts if part.margin_B is not None]
    return Losses(torch.cat([part.loss_B.detach() for part in parts]), torch.cat(margins) if margins else None)
