"""What one needs to debug an objective: figures over the steps of a round, reduced over the ranks.

`train/learner.py` adds each optimizer step, `evaluate/` draws and watches what comes of it (`objective/...` in
`metrics.jsonl`).
"""

import torch
from torch import Tensor

from kto_ray.objectives.protocol import Losses, Scale
from kto_ray.objectives.ranks import sum_over_ranks

SATURATED = 4.0  # |margin| beyond which the sigmoid's slope is under about 7 % of its largest: nearly mute

COLUMNS = ("reward", "desirable", "margin", "loss", "noise_level")


class Health:
    """Collects steps; `summary` reduces them.

    Args:
        noise_bins: number of equal parts of the noise range for which g is told apart.
    """

    def __init__(self, noise_bins: int = 4) -> None:
        self.noise_bins = noise_bins
        self._samples: list[Tensor] = []  # one (B, 5) float64 tensor a step; COLUMNS; NaN for what there is not
        self._steps: list[Tensor] = []  # one (4,) float64 tensor a step: z, beta, gradient norm, safeguard

    @torch.no_grad()
    def add(
        self,
        reward_B: Tensor | None,
        desirable_B: Tensor,
        losses: Losses,
        scale: Scale | None,
        noise_level_B: Tensor,
        gradient_norm: Tensor,
        safeguard: float | None = None,
    ) -> None:
        """Take in one optimizer step. `noise_level_B` in [0, 1): 0 is clean, 1 is pure noise; `safeguard`: what the
        gradient of undesirable samples was scaled by."""
        nothing_B = torch.full_like(losses.loss_B, torch.nan)
        margin_B = nothing_B if losses.margin_B is None else losses.margin_B
        columns = (nothing_B if reward_B is None else reward_B, desirable_B, margin_B, losses.loss_B, noise_level_B)
        self._samples.append(torch.stack([column.detach().double().cpu() for column in columns], dim=1))
        shared = (torch.nan, torch.nan) if scale is None else (scale.z_B.double().mean(), scale.beta_B.double().mean())
        scaled = torch.nan if safeguard is None else safeguard
        self._steps.append(torch.tensor([*map(float, (*shared, gradient_norm, scaled))], dtype=torch.float64))

    def summary(self) -> dict[str, float]:
        """Means over the round and all ranks; a figure without samples is left out, never made up.

        `g_desirable`, `g_undesirable`, `z`, `beta`; `saturated` (|margin| > 4) and `accuracy` (sign of the margin
        agrees with the verdict) as shares of samples; `margin` (mean |margin|); `loss`; `gradient_norm`; `safeguard`;
        `g_noise_K` for the K-th part of the noise range, cleanest first, `g_desirable_noise_K`,
        `g_undesirable_noise_K`, and what these differ by, `gap_noise_K`.
        """
        samples = torch.cat(self._samples) if self._samples else torch.zeros((0, len(COLUMNS)), dtype=torch.float64)
        steps = torch.stack(self._steps) if self._steps else torch.zeros((0, 4), dtype=torch.float64)
        reward_B, desirable_B, margin_B, loss_B, noise_level_B = samples.unbind(1)
        desirable_B = desirable_B > 0.5
        bin_B = (noise_level_B * self.noise_bins).long().clamp(max=self.noise_bins - 1)
        bins = range(self.noise_bins)
        has_margin_B = ~margin_B.isnan()
        figures = {
            "loss": loss_B,
            "accuracy": ((margin_B > 0) == desirable_B).double()[has_margin_B],
            "saturated": (margin_B.abs() > SATURATED).double()[has_margin_B],
            "margin": margin_B.abs(),
            "g_desirable": reward_B[desirable_B],
            "g_undesirable": reward_B[~desirable_B],
            **{f"g_noise_{part}": reward_B[bin_B == part] for part in bins},
            **{f"g_desirable_noise_{part}": reward_B[desirable_B & (bin_B == part)] for part in bins},
            **{f"g_undesirable_noise_{part}": reward_B[~desirable_B & (bin_B == part)] for part in bins},
            "z": steps[:, 0],
            "beta": steps[:, 1],
            "gradient_norm": steps[:, 2],
            "safeguard": steps[:, 3],
        }
        known = {name: values[~values.isnan()] for name, values in figures.items()}
        sums_and_counts = torch.stack([values.new_tensor([values.sum(), len(values)]) for values in known.values()])
        totals = sum_over_ranks(sums_and_counts).tolist()
        found = {name: total / count for name, (total, count) in zip(figures, totals, strict=True) if count}
        for part in bins:
            yes, no = (found.get(f"g_{label}_noise_{part}") for label in ("desirable", "undesirable"))
            if yes is not None and no is not None:
                found[f"gap_noise_{part}"] = yes - no
        return found
