"""The safeguard of `train.objective.safeguard`: undesirable samples must not undo what desirable ones teach.

A step goes along the gradient D of the desirable samples' losses plus the gradient U of the undesirable ones'. To first
order it changes the desirable samples' loss, and so the denoising errors that it weighs, by -(D . (D + s U)) times the
learning rate, where s scales U. So that it does not rise:

    s = 1                            where D . U >= 0
    s = min(1, |D|^2 / -(D . U))     else

The closed form is that of arXiv 2511.03317, which takes the inner products of a pair's outputs; samples without pairs
have no outputs to compare, so that they are taken over the weights here: it costs a second backward pass. As there,
what the optimizer makes of the gradient (Adam's step sizes) is left out of the derivation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kto_ray.objectives.ranks import sum_over_ranks


class Safeguard:
    """Collects both gradients of a step over its micro-batches, and leaves the safe sum in the parameters' `grad`."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._gradients = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]  # desirable, undesirable

    def add(self, loss_M: Tensor, desirable_M: Tensor) -> None:
        """Take in a micro-batch: the parts of the step's loss that its samples are."""
        for place, chosen_M in enumerate((desirable_M, ~desirable_M)):
            gradients = torch.autograd.grad(
                *(loss_M[chosen_M].sum(), self.parameters), retain_graph=not place, materialize_grads=True
            )
            torch._foreach_add_(self._gradients[place], gradients)

    def finish(self, ranks: int) -> float:
        """Average both gradients over the ranks and set the safe sum; returns s, equal on every rank."""
        if ranks > 1:
            for gradients in self._gradients:
                for gradient in gradients:
                    gradient.copy_(sum_over_ranks(gradient) / ranks)
        desirable, undesirable = self._gradients
        scale = safe_scale(_dot(desirable, desirable), _dot(desirable, undesirable))
        for parameter, ours, theirs in zip(self.parameters, desirable, undesirable, strict=True):
            parameter.grad = ours.add_(theirs, alpha=scale)
        return scale


def safe_scale(desirable_squared: float, inner: float) -> float:
    """s, of |D|^2 and D . U."""
    return 1.0 if inner >= 0 else min(1.0, desirable_squared / -inner)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))
