"""Models without their weights: built with none, for a checkpoint to fill, or filled at random.

`image_reward.py` and `hpsv2.py` build the models of their packages so. Random weights are for `kto-ray env check`,
tests and benchmarks, where no checkpoint can be had.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLING = {
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_),  # these reach the mode before what they call
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),
}
STRIDE = 997  # between the windows


class Unfilled(TorchFunctionMode):
    """Modules that are built under it keep random numbers out: making a billion takes longer than reading them.

    Constants (ones, zeros, masks) are filled in. Weights must be loaded before use: they hold whatever memory held.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def random_weights(module: nn.Module) -> dict[str, Tensor]:
    """Random values for all weights of a module, of a size that keeps signals alive through its layers.

    The larger ones are windows on a few shared blocks: each has other values, but a billion take some MB in a file.
    """
    generator = torch.Generator().manual_seed(0)
    own = module.state_dict()
    sizes: dict[int, int] = {}  # a block for each number of inputs that a row of weights has
    for value in own.values():
        if value.ndim > 1:
            sizes[value[0].numel()] = max(sizes.get(value[0].numel(), 0), value.numel())
    blocks = {
        inputs: torch.randn(size + STRIDE * len(own), generator=generator) / inputs**0.5
        for inputs, size in sizes.items()
    }
    weights: dict[str, Tensor] = {}
    for place, (name, value) in enumerate(own.items()):
        if not value.is_floating_point():
            weights[name] = value
        elif value.ndim > 1:
            block = blocks[value[0].numel()]
            weights[name] = block[STRIDE * place :][: value.numel()].view(value.shape)
        else:
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            weights[name] = 1 + noise if name.endswith("weight") else noise
    return weights
