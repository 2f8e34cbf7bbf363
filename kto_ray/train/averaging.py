"""Running averages of a policy that is being trained: what draws, and what it is measured against.

Which weights draw the next round's images is `train.sampling_policy`: the trained ones, or their average. What
`learner.py` publishes is these weights, with a digest of their own; the trained ones are in its checkpoints. An
average draws more steadily than the weights of one step (Karras et al., arXiv 2312.02696); taken once a round it is the
soft update of the sampling policy in DiffusionNFT (arXiv 2509.16117, Section 3.3).

    average = decay * average + (1 - decay) * trained

`RunningReference` is the average over rounds for `train.objective.reference: ema`; `following.py` takes it.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from kto_ray.config import SamplingPolicy
from kto_ray.diffusion.policy import Policy, holding


class Sampling(Protocol):
    """What is published of a policy that is being trained."""

    def tensors(self) -> dict[str, Tensor]:
        """As `Policy.tensors`."""

    def held(self) -> AbstractContextManager[None]:
        """The policy has these weights for a while, as a replica would that draws with them."""

    def after_step(self) -> None:
        """The policy has taken an optimizer step."""

    def after_round(self) -> None:
        """The policy has been trained on a round."""

    def begin(self) -> None:
        """The policy has become another one, without a past."""

    def on_device(self) -> list[Tensor]:
        """What lies there besides the policy, for a `Sleeper`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; anew from the policy as it is, where another kind was saved."""


class Copy:
    """The trained weights."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def tensors(self) -> dict[str, Tensor]:
        return self.policy.tensors()

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_step(self) -> None:
        """Nothing is kept."""

    def after_round(self) -> None:
        """Nothing is kept."""

    def begin(self) -> None:
        """Nothing is kept."""

    def on_device(self) -> list[Tensor]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


class Average:
    """A running average of the trained weights, which it begins with. Kept in float32 beside them."""

    def __init__(self, policy: Policy, decay: float, every: str) -> None:
        self.policy, self.decay, self.every = policy, decay, every
        self.begin()

    def begin(self) -> None:
        self.weights = [parameter.detach().clone() for parameter in self.policy.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        with self.held():
            return self.policy.tensors()

    def held(self) -> AbstractContextManager[None]:
        return holding(self.policy, self.weights)

    def after_step(self) -> None:
        if self.every == "step":
            self._follow()

    def after_round(self) -> None:
        if self.every == "round":
            self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        torch._foreach_lerp_(self.weights, [p.detach() for p in self.policy.parameters()], 1 - self.decay)

    def on_device(self) -> list[Tensor]:
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        return {"weights": list(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begin()
        for weight, saved in zip(self.weights, state.get("weights", ()), strict="weights" in state):
            weight.copy_(saved)


def sampling_policy(settings: SamplingPolicy, policy: Policy) -> Sampling:
    """What `train.sampling_policy` asks for."""
    if settings.kind == "copy":
        return Copy(policy)
    return Average(policy, settings.decay, settings.every)


class RunningReference:
    """R, and the version that it has come to.

    Args:
        base: B, as `Policy.tensors` gives them; of an adapter: as it begins, without effect.
    """

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self.base, self.version, self.tensors = base, 0, dict(base)

    def follow(self, policy: Mapping[str, Tensor], rate: float, anchor: float) -> None:
        """Take in the next policy."""
        for name, base in self.base.items():
            average = self.tensors[name].lerp(policy[name], 1 - rate)
            self.tensors[name] = average.lerp(base, anchor)
        self.version += 1

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "tensors": self.tensors} if self.version else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version, self.tensors = state.get("version", 0), dict(state.get("tensors", self.base))
