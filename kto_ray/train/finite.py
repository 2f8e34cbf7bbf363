"""Whether an optimizer step is made of finite numbers, found out on all ranks together before it is taken.

`learner.py` asks after the gradient and before the optimizer; every rank gets the same answer, so that none goes on
alone.

Shape suffixes: B a rank's share of the global batch G.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from kto_ray.diffusion.sharding import local
from kto_ray.objectives.ranks import sum_over_ranks


class NotFiniteError(ArithmeticError):
    """A step that would have ruined the policy and was not taken, or weights that are ruined.

    Args:
        what: is not finite.
        step: of the round, from 0; None: it was found between steps.
        samples: of the round that are to blame, by index; none: no single one is.
        drawn: the samples of that step.
    """

    def __init__(
        self, what: str, step: int | None = None, samples: Iterable[int] = (), drawn: Iterable[int] = ()
    ) -> None:
        super().__init__(what)
        self.what, self.step, self.samples, self.drawn = what, step, sorted(set(samples)), sorted(set(drawn))


def require_finite_step(error_B: Tensor, loss_B: Tensor, gradient_norm: Tensor, rank: int, ranks: int) -> None:
    """Raises NotFiniteError, on all ranks if on one; its `samples` are places of the global batch that are to blame.

    A sample is to blame when its own denoising error, or its implicit reward, which no other sample enters, is not
    finite.
    """
    share = len(error_B)
    wrong = torch.zeros(ranks * share + 2)
    wrong[rank * share : (rank + 1) * share] = (~error_B.isfinite()).float()
    wrong[-2], wrong[-1] = ~loss_B.isfinite().all(), ~gradient_norm.isfinite()
    *blamed_G, loss, gradient = sum_over_ranks(wrong).tolist()
    blamed = [place for place, times in enumerate(blamed_G) if times]
    if blamed or loss or gradient:
        what = "denoising error" if blamed else "loss" if loss else "gradient norm"
        raise NotFiniteError(what, samples=blamed)


def require_finite_weights(parameters: Iterable[Tensor]) -> None:
    """Raises NotFiniteError, on all ranks if on one."""
    wrong = torch.tensor([float(sum(not bool(local(weights).isfinite().all()) for weights in parameters))])
    if sum_over_ranks(wrong).item():
        raise NotFiniteError("weights")
