"""Who takes part in the bake-off, and how each was tuned.

Every method has the same number of tuning runs, on the first task and on seeds that are not reported: each of its
`SETTINGS` on the first of `TUNING_SEEDS`, and the best `FINALISTS` of them on the second, too. The best mean of these
becomes `tuned`. `jobs/bake_off.py --tune` runs them, says which came best, and puts all of them into `bake_off.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

TUNING_SEEDS = (1000, 1001)
TUNING_ROUNDS = 6
"""Half of the task's images; the learning rate falls to 0 over them as it does over all rounds of a reported run."""
RATES = (2e-3, 4e-3)
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
            grid={BETA: (25, 75), RATE: RATES},
            tuned={BETA: 75, RATE: 2e-3},
        ),
        Method(
            *("kto_follow", "Diffusion-KTO, reference that follows, z by noise level", True),
            train=_kto(reference="round", reference_point="noise_mean"),
            grid={BETA: (25, 75), RATE: RATES},
            tuned={BETA: 75, RATE: 2e-3},
        ),
        Method(
            *("sft", "Fine-tuning on the desirable", False, {"objective": "sft"}),
            grid={RATE: (1e-3, *RATES, 8e-3)},
            tuned={RATE: 2e-3},
        ),
        Method(
            *("csft", "Fine-tuning under the verdict", False),
            # One token each, all that the embedded world's captions leave room for.
            train={"objective": {"kind": "csft", "desirable_prefix": "on ", "undesirable_prefix": "a "}},
            grid={RATE: RATES, "gamma": (0.5, 0.8)},
            tuned={RATE: 2e-3, "gamma": 0.8},
        ),
        Method(
            *("dpo", "Online Diffusion-DPO", False, {"objective": {"kind": "dpo"}}),
            grid={BETA: (25, 75), RATE: RATES},
            tuned={BETA: 75, RATE: 2e-3},
            generate={"images_per_prompt": 4},
        ),
        Method(
            *("nft", "DiffusionNFT, binary", False, {"objective": "nft"}),
            grid={BETA: (0.3, 1.0), RATE: RATES},
            tuned={BETA: 1.0, RATE: 2e-3},
        ),
    )
}

SETTINGS, FINALISTS = 4, 2
