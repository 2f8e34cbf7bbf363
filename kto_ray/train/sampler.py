"""Which samples each optimizer step of a round trains on: with probability gamma a desirable one.

A pure function of (seed, round, verdicts): every rank computes the same plan and takes its slice, and a restarted
worker finds the same plan again, at any step.

Shape suffixes: S optimizer steps, B global batch, N samples of the round.
"""

import numpy as np
import numpy.typing as npt

from kto_ray.records import derive_seed


def plan_round(
    desirable_N: npt.NDArray[np.bool_], gamma: float, steps: int, global_batch: int, seed: int, round_index: int
) -> npt.NDArray[np.int64]:
    """Indices of the samples of every step, (S, B).

    The class of each place is drawn with probability `gamma` for desirable (Section 4 of the paper); within a class,
    samples come in shuffled passes, so that none is drawn a second time before all were drawn once. A round of one
    class fills all places from it.

    Args:
        desirable_N: the verdicts of the samples that may be trained on; at least one, unless `steps` is 0.
        gamma: in (0, 1).
    """
    rng = np.random.default_rng(derive_seed(seed, "train", round_index))
    places = steps * global_batch
    wants_desirable = rng.random(places) < gamma
    if desirable_N.all() or not desirable_N.any():
        wants_desirable[:] = desirable_N.any()
    plan = np.empty(places, np.int64)
    for desirable in (True, False):
        chosen = np.flatnonzero(wants_desirable == desirable)
        members = np.flatnonzero(desirable_N == desirable)
        passes = [rng.permutation(members) for _ in range(-(-len(chosen) // max(1, len(members))))]
        plan[chosen] = np.concatenate([*passes, members[:0]])[: len(chosen)]
    return plan.reshape(steps, global_batch)
