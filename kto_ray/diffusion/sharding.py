"""Full fine-tuning over many cards: every rank holds a share of weights, gradients and optimizer (FSDP2).

`train/worker.py` gives `policy.py` a `Sharding` (`train.strategy: fsdp`). From then on the parameters of policy and
reference are DTensors, and every forward pass, gradient norm and `Policy.tensors` is a collective: all ranks come to
it, or none goes on. `train/checkpointing.py` keeps the shards.

A module's blocks are sharded one by one, so that only the blocks in work are whole on any rank (Zhao et al.,
arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`).
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


class Sharding:
    """Spreads modules over all ranks of the default process group.

    Args:
        device: where the shards go; a module that is whole may lie on the CPU and never has to fit there.
        dtype: of the forward passes. Blocks are gathered in it; weights, gradients and their sums stay float32.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        # Inputs are not cast with the weights, autocast does: bfloat16 cannot tell timestep 999 from 1000.
        gathered = None if dtype == torch.float32 else dtype
        self._precision = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def __call__(self, module: nn.Module) -> None:
        """Shard a module in place."""
        for block in [*blocks_of(module), module]:
            # The outermost, too, is shards again after a pass that is not followed by a backward one.
            fully_shard(block, mesh=self._mesh, mp_policy=self._precision, reshard_after_forward=True)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers model says are not to be taken apart, inner ones first."""
    names = set(getattr(module, "_no_split_modules", None) or getattr(module, "_repeated_blocks", None) or ())
    inner_first = reversed(list(module.modules()))
    return [block for block in inner_first if type(block).__name__ in names and any(True for _ in block.parameters())]


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever it is; a collective for one that is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
