"""Sums and medians over the ranks of a training job; on a single process, those of its own numbers.

Every rank calls them at the same time, with numbers of its own, and gets the same answer to the last bit.
"""

import torch
import torch.distributed
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over the ranks of the default process group; the tensor itself when there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = _reducible(values)
        torch.distributed.all_reduce(total)
        return total.to(values.device)
    return values


def median_over_ranks(values_B: Tensor) -> Tensor:
    """Median of the numbers of all ranks, each of which has as many: a float64 scalar."""
    values_B = values_B.detach().double()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mine_B = _reducible(values_B)
        all_RB = [torch.empty_like(mine_B) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(all_RB, mine_B)
        values_B = torch.cat(all_RB).to(values_B.device)
    return values_B.quantile(0.5)


def _reducible(values: Tensor) -> Tensor:
    """A copy on a device that the process group reduces on: NCCL takes only what lies on a GPU."""
    device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else values.device
    return values.to(device, copy=True)
