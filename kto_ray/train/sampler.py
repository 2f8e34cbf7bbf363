"""Which samples each optimizer step of a round trains on: with probability gamma a desirable one, or pairs.

A pure function of (seed, round, verdicts): every rank computes the same plan and takes its slice, and a restarted
worker finds the same plan again, at any step.

Shape suffixes: S optimizer steps, B global batch, N samples of the round.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import numpy.typing as npt

from kto_ray.config import Train, steps_for
from kto_ray.records import derive_seed


def plan_round(
    desirable_N: npt.NDArray[np.bool_],
    gamma: float | None,
    steps: int,
    global_batch: int,
    seed: int,
    round_index: int,
    max_draws: int | None = None,
) -> npt.NDArray[np.int64]:
    """Indices of the samples of every step, (S, B).

    The class of each place is drawn with probability `gamma` for desirable (Section 4 of the paper); within a class,
    samples come in shuffled passes, so that none is drawn a second time before all were drawn once. A round of one
    class fills all places from it. Where the samples of one class would be drawn more than `max_draws` times, places
    go to the other class instead, as far as that has room.

    Args:
        desirable_N: the verdicts of the samples that may be trained on; at least one, unless `steps` is 0.
        gamma: in (0, 1). None: shuffled passes over all samples, whatever their class.
    """
    rng = np.random.default_rng(derive_seed(seed, "train", round_index))
    places = steps * global_batch
    if gamma is None:
        return _passes(rng, np.arange(len(desirable_N)), places).reshape(steps, global_batch)
    wants_desirable = rng.random(places) < gamma
    if desirable_N.all() or not desirable_N.any():
        wants_desirable[:] = desirable_N.any()
    elif max_draws is not None:
        _hold(wants_desirable, desirable_N, max_draws, rng)
    plan = np.empty(places, np.int64)
    for desirable in (True, False):
        chosen = np.flatnonzero(wants_desirable == desirable)
        members = np.flatnonzero(desirable_N == desirable)
        plan[chosen] = _passes(rng, members, len(chosen))
    return plan.reshape(steps, global_batch)


def _passes(rng: np.random.Generator, members: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """So many of them in shuffled passes; none comes a second time before all came once."""
    passes = [rng.permutation(members) for _ in range(-(-count // max(1, len(members))))]
    return np.concatenate([*passes, members[:0]])[:count]


def pairs_of(value_N: npt.NDArray[np.float64], prompts: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """By prompt, every pair (better, worse) of its samples; prompts whose samples are all alike have none."""
    members: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(n)
    pairs = {
        prompt: [pair for pair in permutations(those, 2) if value_N[pair[0]] > value_N[pair[1]]]
        for prompt, those in members.items()
    }
    return {prompt: those for prompt, those in pairs.items() if those}


def plan_pairs(
    value_N: npt.NDArray[np.float64],
    prompts: Sequence[str],
    steps: int,
    global_batch: int,
    seed: int,
    round_index: int,
) -> npt.NDArray[np.int64]:
    """Indices of the samples of every step, (S, B): the better of a pair at each even place, after it the other one of
    the same prompt. No steps where no prompt has pairs.

    Prompts with pairs come in shuffled passes, and so do the pairs of each, so that a prompt with many pairs teaches no
    more than one with few.

    Args:
        value_N: what samples are compared by, the higher the better; NaN is neither better nor worse than anything.
    """
    rng = np.random.default_rng(derive_seed(seed, "pairs", round_index))
    pairs = pairs_of(value_N, prompts)
    if not pairs:
        return np.empty((0, global_batch), np.int64)
    names, count = sorted(pairs), steps * global_batch // 2
    order = _passes(rng, np.arange(len(names)), count)
    plan = np.empty((count, 2), np.int64)
    for place, name in enumerate(names):
        chosen = np.flatnonzero(order == place)
        plan[chosen] = np.array(pairs[name])[_passes(rng, np.arange(len(pairs[name])), len(chosen))]
    return plan.reshape(steps, global_batch)


def _hold(
    wants_desirable: npt.NDArray[np.bool_], desirable_N: npt.NDArray[np.bool_], max_draws: int, rng: np.random.Generator
) -> None:
    """Give places of the class that has too many to the other one, by chance; leaves alone what is within the limit."""
    for desirable in (True, False):
        chosen = np.flatnonzero(wants_desirable == desirable)
        too_many = len(chosen) - max_draws * int((desirable_N == desirable).sum())
        room = max_draws * int((desirable_N != desirable).sum()) - (len(wants_desirable) - len(chosen))
        if too_many > 0 and room > 0:
            wants_desirable[rng.choice(chosen, min(too_many, room), replace=False)] = not desirable
            return


def imbalance(desirable: int, undesirable: int, train: Train) -> str | None:
    """Says so when the few samples of one class would be drawn more than `train.max_draws` times; else None."""
    if train.gamma is None or train.objective.needs.pairs or not train.objective.needs.undesirable:
        return None
    places = steps_for(desirable + undesirable, train) * train.global_batch
    for name, count, others, share in (
        ("desirable", desirable, undesirable, train.gamma),
        ("undesirable", undesirable, desirable, 1 - train.gamma),
    ):
        if count and others and (draws := share * places / count) > train.max_draws:
            return (
                f"only {count} of {count + others} verdicts are {name}: by train.gamma ({train.gamma:g}) each such "
                f"image would be drawn about {draws:.0f} times; train.max_draws holds it at {train.max_draws}, and the "
                "other class is drawn instead. A label.threshold that leaves more of both classes teaches more"
            )
    return None
