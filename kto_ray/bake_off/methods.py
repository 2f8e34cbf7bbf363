"""Who takes part in the bake-off, and how each was tuned.

Every method has the same number of tuning runs (`TUNED`), on the first task and on a seed that is not reported;
`jobs/bake_off.py --tune` runs them, says which came best, and puts all of them into `bake_off.json`. They were not run
yet: `tuned` is what `shapes_demo` had for all of them, and is to become what comes best.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

TUNING_SEED = 1000
RATES = (1e-3, 2e-3, 4e-3)
"""Learning rates of the adapters, which every method may choose from."""


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


BETA, RATE = "objective.beta", "learning_rate"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            *("kto", "Diffusion-KTO, as in the paper", False, _kto()),
            grid={BETA: (25, 75, 225), RATE: RATES},
            tuned={BETA: 75, RATE: 2e-3},
        ),
        Method(
            *("kto_follow", "Diffusion-KTO, reference that follows, z by noise level", True),
            train=_kto(reference="round", reference_point="noise_mean"),
            grid={BETA: (25, 75, 225), RATE: RATES},
            tuned={BETA: 75, RATE: 2e-3},
        ),
        Method(
            *("sft", "Fine-tuning on the desirable", False, {"objective": "sft"}),
            grid={RATE: (2.5e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 8e-3)},
            tuned={RATE: 2e-3},
        ),
        Method(
            *("csft", "Fine-tuning under the verdict", False),
            # One token each, all that the embedded world's captions leave room for.
            train={"objective": {"kind": "csft", "desirable_prefix": "on ", "undesirable_prefix": "a "}},
            grid={RATE: RATES, "gamma": (0.5, 0.65, 0.8)},
            tuned={RATE: 2e-3, "gamma": 0.65},
        ),
        Method(
            *("dpo", "Online Diffusion-DPO", False, {"objective": {"kind": "dpo"}}),
            grid={BETA: (25, 75, 225), RATE: RATES},
            tuned={BETA: 75, RATE: 2e-3},
            generate={"images_per_prompt": 4},
        ),
        Method(
            *("nft", "DiffusionNFT, binary", False, {"objective": "nft"}),
            grid={BETA: (0.3, 1.0, 3.0), RATE: RATES},
            tuned={BETA: 1.0, RATE: 2e-3},
        ),
    )
}

TUNED = 9
"""Tuning runs of every method."""
