"""Who takes part in the bake-off, and how each was tuned.

Every method has the same number of tuning runs, on the first task and on seeds that are not reported: each of its
settings on each of `TUNING_SEEDS`, at full length. `jobs/bake_off.py --tune` runs them, says which came best in the
mean, and puts all of them into `bake_off.json`; the best becomes `tuned`. `kto_follow` alone keeps the rate of
`shapes_demo`, which one image of 240 makes the second: it was reported with it before it was tuned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

TUNING_SEEDS = (1000,)


@dataclass(frozen=True)
class Method:
    """An objective with what goes with it.

    Args:
        ours: whether it is one of this project's, to be compared with the others.
        train: laid over the task's `train`.
        grid: what is tuned: values by dotted field of `train`; every combination is a tuning run.
        tuned: the combination that it is reported with, one of the grid.
        generate: laid over the task's `generate`.
    """

    name: str
    title: str
    ours: bool
    train: Mapping[str, Any]
    grid: Mapping[str, tuple[float, ...]]
    tuned: Mapping[str, float]
    generate: Mapping[str, Any] = field(default_factory=dict)

    def candidates(self) -> list[dict[str, float]]:
        """Every combination of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


def _kto(**options: Any) -> dict[str, Any]:
    return {"objective": {"kind": "diffusion_kto", **options}}


RATE = "learning_rate"
RATES: dict[str, tuple[float, ...]] = {RATE: (2e-3, 4e-3)}
"""Of the adapters. Beta made less of a difference, see docs/bake_off.md."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            *("kto", "Diffusion-KTO, as in the paper", False, _kto(beta=75)),
            grid=RATES,
            tuned={RATE: 4e-3},
        ),
        Method(
            *("kto_follow", "Diffusion-KTO, reference that follows, z by noise level, mirrored", True),
            train=_kto(beta=75, reference="round", reference_point="noise_mean", mirror=True),
            grid=RATES,
            tuned={RATE: 4e-3},
        ),
        Method(
            *("kto_relative", "Diffusion-KTO, the same in parts of each sample's error", True),
            train=_kto(beta=20, reference="round", reference_point="noise_mean", mirror=True, relative=True),
            grid=RATES,
            tuned={RATE: 2e-3},
        ),
        Method(
            *("sft", "Fine-tuning on the desirable", False, {"objective": "sft"}),
            grid=RATES,
            tuned={RATE: 2e-3},
        ),
        Method(
            *("csft", "Fine-tuning under the verdict", False),
            # One token each, all that the embedded world's captions leave room for.
            train={"objective": {"kind": "csft", "desirable_prefix": "on ", "undesirable_prefix": "a "}},
            grid=RATES,
            tuned={RATE: 2e-3},
        ),
        Method(
            *("dpo", "Online Diffusion-DPO", False, {"objective": {"kind": "dpo", "beta": 75}}),
            grid=RATES,
            tuned={RATE: 2e-3},
            generate={"images_per_prompt": 4},
        ),
        Method(
            *("nft", "DiffusionNFT, binary", False, {"objective": "nft"}),
            grid=RATES,
            tuned={RATE: 2e-3},
        ),
    )
}
