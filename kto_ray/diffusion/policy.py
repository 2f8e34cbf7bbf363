"""The policy inside a denoiser: what is trained, what is published, and where the frozen reference is.

Two kinds: LoRA adapters (peft), whose reference is the same module with the adapter switched off; and full fine-tuning,
whose reference is a frozen copy. The reference is the base model unless it is told to be another policy (`refer_to`,
for a `train.objective.reference` that follows). Both give their weights as named tensors (`policies.py` stores them as
safetensors) and take them back; `proves` compares what really sits in the module with what was published. The weights
of full fine-tuning may be spread over the ranks of a training job (`sharding.py`).

A LoRA policy's names follow diffusers, so that `pipe.load_lora_weights(policy_folder)` works on a published one.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from kto_ray.config import Adapter
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.sharding import whole
from kto_ray.errors import UserError

ADAPTER = "policy"


class Policy(Protocol):
    """The trainable part of a denoiser."""

    module: nn.Module
    sharded: bool
    """Whether its weights are spread over the ranks."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""

    def tensors(self) -> dict[str, Tensor]:
        """What is published: float32 on the CPU, keyed by name. All ranks ask together where weights are sharded."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: this rank's shards where weights are sharded, else `tensors`."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state_dict` gave."""

    def metadata(self) -> dict[str, str]:
        """What stands in the header of the published safetensors file."""

    def load(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Become these weights; None: become the base model."""

    def proves(self, tensors: Mapping[str, Tensor] | None) -> bool:
        """Whether the module, as it would be used now, holds exactly these weights (in its own precision)."""

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The frozen reference as a module, for as long as the context lasts; to be asked without gradients."""

    def refer_to(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Let the reference be these weights, as `tensors` gives them; None: the base model."""

    def on_device(self) -> list[Any]:
        """The modules and tensors that lie there, for a `Sleeper`."""


class LoraPolicy:
    """Low-rank adapters on a frozen denoiser.

    Args:
        component: the denoiser's name in its pipeline, which diffusers puts before the names of the weights.
        targets: modules that are adapted where the run does not say.

    Raises:
        UserError: no module of the denoiser matches `target_modules`.
    """

    def __init__(self, denoiser: Any, adapter: Adapter, component: str, targets: Sequence[str]) -> None:
        self.module: nn.Module = denoiser
        self.sharded = False
        targets = list(adapter.target_modules or targets)
        self._prefix = f"{component}."
        self.config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha or adapter.rank,
            target_modules=targets,
            init_lora_weights="gaussian",
        )
        try:
            denoiser.add_adapter(self.config, adapter_name=ADAPTER)
        except ValueError as error:
            raise UserError(f"train.adapter.target_modules: {targets}: {error}") from error
        self._switched_on = True
        self._reference: list[Tensor] | None = None  # in the place of the parameters; None: the base
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.module.named_parameters() if f".{ADAPTER}." in name]

    def tensors(self) -> dict[str, Tensor]:
        state = get_peft_model_state_dict(self.module, adapter_name=ADAPTER)
        return {self._prefix + name: _published(tensor) for name, tensor in sorted(state.items())}

    def metadata(self) -> dict[str, str]:
        config = self.config.to_dict()
        config["target_modules"] = sorted(config["target_modules"])
        described = {
            self._prefix + key: value for key, value in config.items() if isinstance(value, str | int | float | list)
        }
        return {"format": "pt", "lora_adapter_metadata": json.dumps(described, sort_keys=True)}

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.load(state)

    def load(self, tensors: Mapping[str, Tensor] | None) -> None:
        if tensors is None:
            self.module.disable_adapters()  # type: ignore[operator]
            self._switched_on = False
            return
        state = {name.removeprefix(self._prefix): tensor for name, tensor in tensors.items()}
        outcome = set_peft_model_state_dict(self.module, state, adapter_name=ADAPTER)
        if outcome.unexpected_keys:
            raise UserError(f"these adapter weights do not fit the model: unexpected {outcome.unexpected_keys[:3]}")
        self.module.enable_adapters()  # type: ignore[operator]
        self._switched_on = True

    def proves(self, tensors: Mapping[str, Tensor] | None) -> bool:
        if tensors is None:
            return _layers_in_use(self.module) == {False}
        return _layers_in_use(self.module) == {True} and _equal(self.tensors(), tensors)

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        if self._reference is not None:
            with holding(self, self._reference):
                yield self.module
            return
        self.module.disable_adapters()  # type: ignore[operator]
        try:
            yield self.module
        finally:
            if self._switched_on:
                self.module.enable_adapters()  # type: ignore[operator]

    def refer_to(self, tensors: Mapping[str, Tensor] | None) -> None:
        self._reference = None
        if tensors is not None:
            with holding(self, [parameter.detach().clone() for parameter in self.parameters()]):
                self.load(tensors)
                self._reference = [parameter.detach().clone() for parameter in self.parameters()]

    def on_device(self) -> list[Any]:
        return [self.module, self._reference or []]


class FullPolicy:
    """Every weight of the denoiser is trained; the reference is a frozen copy.

    Args:
        shard: spreads a module's weights over the ranks, in place; None: every rank holds all of them.
    """

    def __init__(self, denoiser: nn.Module, shard: Callable[[nn.Module], None] | None = None) -> None:
        self.module, self.sharded = denoiser, shard is not None
        self._frozen = copy.deepcopy(denoiser).requires_grad_(False).eval()
        self._base: dict[str, Tensor] | None = None  # set aside while the frozen copy is another reference
        denoiser.requires_grad_(True)
        if shard is not None:
            shard(self._frozen)
            shard(self.module)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def tensors(self) -> dict[str, Tensor]:
        return {name: _published(tensor) for name, tensor in sorted(self.module.state_dict().items())}

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict() if self.sharded else self.tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(dict(state))

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def load(self, tensors: Mapping[str, Tensor] | None) -> None:
        if tensors is None:
            self.module.load_state_dict(self._of_base())
        else:
            self._fill(self.module, tensors)

    def proves(self, tensors: Mapping[str, Tensor] | None) -> bool:
        return _equal(self.module.state_dict(), self._of_base() if tensors is None else tensors)

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        yield self._frozen

    def refer_to(self, tensors: Mapping[str, Tensor] | None) -> None:
        if tensors is None:
            self._frozen.load_state_dict(self._of_base())
            self._base = None
            return
        if self._base is None:
            self._base = {name: tensor.clone() for name, tensor in self._frozen.state_dict().items()}
        self._fill(self._frozen, tensors)

    def on_device(self) -> list[Any]:
        return [self.module, self._frozen, self._base or {}]

    def _of_base(self) -> dict[str, Tensor]:
        return self._frozen.state_dict() if self._base is None else self._base

    def _fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        if self.sharded:  # each rank takes its own part
            set_model_state_dict(module, dict(tensors), options=StateDictOptions(full_state_dict=True))
        else:
            module.load_state_dict(dict(tensors))


@contextlib.contextmanager
@torch.no_grad()
def holding(policy: Policy, weights: Sequence[Tensor]) -> Iterator[None]:
    """The policy has these weights for a while, in the place of its parameters; then its own again."""
    own = [parameter.detach().clone() for parameter in policy.parameters()]
    try:
        _copy(weights, policy.parameters())
        yield
    finally:
        _copy(own, policy.parameters())


@torch.no_grad()
def _copy(weights: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)


def make_policy(family: Family, adapter: Adapter, shard: Callable[[nn.Module], None] | None = None) -> Policy:
    """The policy that `train.adapter` asks for, set up on the denoiser of a freshly loaded family.

    Args:
        shard: see `FullPolicy`; adapters are not sharded.
    """
    if adapter.kind == "lora":
        return LoraPolicy(family.denoiser, adapter, family.part, family.target_modules(family.denoiser.config))  # type: ignore[arg-type]
    return FullPolicy(family.denoiser, shard)


def _published(tensor: Tensor) -> Tensor:
    # A copy even where nothing is to be cast: what was published must not follow the training.
    return whole(tensor.detach()).to("cpu", torch.float32, copy=True).contiguous()


def _equal(live: Mapping[str, Tensor], published: Mapping[str, Tensor]) -> bool:
    """Bit equality after casting the published weights to the precision that the live ones have."""
    return live.keys() == published.keys() and all(
        torch.equal(live[name], published[name].to(live[name].device, live[name].dtype)) for name in live
    )


def _layers_in_use(module: nn.Module) -> set[bool]:
    """Whether the adapter takes part in the forward pass, over all layers: {True}, {False} or, half applied, both."""
    from peft.tuners.lora import LoraLayer

    return {
        ADAPTER in layer.active_adapters and not layer.disable_adapters
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
    }
