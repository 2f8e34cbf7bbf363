"""Running means of a figure by parts of the noise range: what is usual at each noise level.

How far policy and reference differ depends on the noise far more than on the verdict. With one reference point for all
levels, on which side of it a sample falls is decided by its noise level; with one for each part, by its verdict.

A step adds what it has seen of part k, over all ranks, to an exponentially weighted sum and count:

    sums_k   = memory * sums_k   + sum of the figure in k
    counts_k = memory * counts_k + samples in k
    mean_k   = sums_k / counts_k      (of all parts together, as long as nothing of k was seen)

so that a part with few samples in a step changes its mean by little. `diffusion_kto.py` keeps the sums and counts as
float64 tensors (2, K) in its memory.

Shape suffixes: B samples of one rank; K parts of the noise range, cleanest first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kto_ray.objectives.ranks import sum_over_ranks


@dataclass(frozen=True)
class NoiseMeans:
    """How they are taken.

    Args:
        parts: K, how many equal parts `noise_range` is divided into.
        memory: share that stays from step to step, in [0, 1).
    """

    parts: int
    memory: float
    noise_range: tuple[float, float] = (0.0, 1.0)

    def none(self) -> Tensor:
        """Sums and counts before the first step, (2, K)."""
        return torch.zeros(2, self.parts, dtype=torch.float64)

    def after(self, seen_2K: Tensor, figure_B: Tensor, noise_level_B: Tensor) -> Tensor:
        """Sums and counts after a step of which this rank has these samples; the other ranks call it with theirs."""
        part_B, figure_B = self._part(noise_level_B), figure_B.detach().double().cpu()
        new_2K = self.none()
        new_2K[0].index_add_(0, part_B, figure_B)
        new_2K[1].index_add_(0, part_B, torch.ones_like(figure_B))
        return self.memory * seen_2K + sum_over_ranks(new_2K)

    def at(self, seen_2K: Tensor, noise_level_B: Tensor) -> Tensor:
        """The mean at the noise level of each sample, float32 (B,)."""
        sums_K, counts_K = seen_2K
        overall = sums_K.sum() / counts_K.sum().clamp(min=1e-12)
        mean_K = torch.where(counts_K > 0, sums_K / counts_K.clamp(min=1e-12), overall)
        return mean_K[self._part(noise_level_B)].to(noise_level_B.device, torch.float32)

    def _part(self, noise_level_B: Tensor) -> Tensor:
        low, high = self.noise_range
        place_B = (noise_level_B.double().cpu() - low) / (high - low)
        part_B: Tensor = (place_B * self.parts).long().clamp(0, self.parts - 1)
        return part_B
