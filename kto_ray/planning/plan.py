"""Rounds, hours and idle shares of a run on a cluster that is not there yet.

What it goes by, with r replicas of v images a second and batches of b images: a round of N images is drawn in
ceil(ceil(N / b) / r) b / v seconds, since a replica draws whole batches. A scorer of a actors that score s images a
second works meanwhile, and needs max(N / (a s) - drawing, b / s) seconds beyond the last image; the slowest counts.
Training takes steps x global batch / (workers x samples a second). With `max_policy_lag` the next round is made while
one is trained on. What is held is held from the first round to the last evaluation. How long nodes need to come is not
in it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.planning.node_types import Fleet
from kto_ray.planning.packing import Packed, Role, most_of, pack, roles_of
from kto_ray.planning.speeds import Speeds

Kind = Literal["separate", "colocated"]


@dataclass(frozen=True)
class Busy:
    """A role in the plan."""

    role: Role
    least: int
    most: int
    places: Sequence[str]
    works_s: float | None
    """Seconds of the run in which an actor of it works, if all `most` are there; None: its speed is not known."""

    def idle(self, total_s: float) -> float | None:
        """Share of the run in which an actor has nothing to do."""
        return None if self.works_s is None else max(0.0, 1 - self.works_s / total_s)


@dataclass(frozen=True)
class RunPlan:
    """What a run needs, takes and leaves idle; seconds are of a round, or of an evaluation."""

    kind: Kind
    least: Mapping[str, int]
    most: Mapping[str, int]
    """Nodes by kind."""
    roles: Sequence[Busy]
    draw_s: float
    label_s: float
    train_s: float
    other_s: float
    evaluate_s: float
    evaluations: int
    total_s: float
    """Of the run."""
    unknown: Sequence[str] = field(default=())
    """Scorers whose speed is not known, and that are taken to keep up."""

    @property
    def gpu_hours(self) -> float:
        """Held by actors: shares of cards that they book, all the run long; what takes turns counts once."""
        held = [busy.most * busy.role.resources.num_gpus for busy in self.roles]
        booked = sum(held) if self.kind == "separate" else max(sum(held[:-1]), held[-1])
        return booked * self.total_s / 3600

    @property
    def working_gpu_hours(self) -> float:
        """Of these, those in which the actors work, as far as is known."""
        parts = [busy.most * busy.role.resources.num_gpus * (busy.works_s or 0.0) for busy in self.roles]
        return sum(parts) / 3600


def make_plan(
    config: RunConfig, fleet: Fleet, speeds: Speeds, held_out_prompts: int, kind: Kind = "separate"
) -> RunPlan:
    """Plan a run.

    Args:
        held_out_prompts: that there are; `evaluate.max_prompts` may take fewer.
        kind: separate: all roles have their share of the cluster all the time; colocated: those that make rounds, and
            those that train, have it by turns.

    Raises:
        UserError: it can never fit.
    """
    making, training = roles_of(config)
    turns = [[*making, training]] if kind == "separate" else [making, [training]]
    if kind == "colocated" and config.rounds_ahead:
        raise UserError(
            "max_policy_lag: rounds are made while others are trained on, which roles cannot that take turns"
        )
    try:
        packed = [pack(fleet, roles) for roles in turns]
    except UserError as error:
        raise UserError(f"{error}{_by_turns(fleet, making, training) if kind == 'separate' else ''}") from error
    least, most = (
        {role.name: sum(pair[which].actors(role.name) for pair in packed) for role in (*making, training)}
        for which in (0, 1)
    )
    replicas, images, batch = most["generator"], config.generate.images_per_round, config.generate.batch_size

    def drawing_s(count: int, images_per_s: float) -> float:
        return math.ceil(math.ceil(count / batch) / replicas) * min(batch, count) / images_per_s

    draw_s = drawing_s(images, speeds.images_per_s)
    known = {name: speed * most[f"scorer {name}"] for name, speed in speeds.scores_per_s.items()}
    catching_up = [
        max(images / speed - draw_s, min(batch, images) * most[f"scorer {name}"] / speed)
        for name, speed in known.items()
    ]
    label_s = max(catching_up, default=0.0) if speeds.label_s is None else speeds.label_s
    samples = config.optimizer_steps_per_round * config.train.global_batch
    train_s = samples / (config.train.workers * speeds.samples_per_s)

    held_out = config.evaluate.prompts_of(held_out_prompts) * config.evaluate.images_per_prompt
    evaluate_s = drawing_s(held_out, speeds.images_per_s * config.generate.steps / config.held_out.steps)
    evaluations = 2 + (config.rounds - 1) // config.evaluate.every
    evaluations += 2 * (config.evaluate.stop_at_pass_rate is not None)

    make_s, rest_s = draw_s + label_s, train_s + speeds.other_s
    between_s = max(make_s, rest_s) if config.rounds_ahead else make_s + rest_s
    total_s = make_s + (config.rounds - 1) * between_s + rest_s + evaluations * evaluate_s

    in_all = config.rounds * images + evaluations * held_out
    works: dict[str, float | None] = {
        "generator": config.rounds * draw_s + evaluations * evaluate_s,
        "train worker": config.rounds * train_s,
        **{f"scorer {name}": in_all / speed for name, speed in known.items()},
    }
    return RunPlan(
        kind=kind,
        least=most_of(pair[0].counts() for pair in packed),
        most=most_of(pair[1].counts() for pair in packed),
        roles=[
            Busy(role, least[role.name], most[role.name], _places(packed, role.name), works.get(role.name))
            for role in (*making, training)
        ],
        draw_s=draw_s,
        label_s=label_s,
        train_s=train_s,
        other_s=speeds.other_s,
        evaluate_s=evaluate_s,
        evaluations=evaluations,
        total_s=total_s,
        unknown=[name for name in config.label.scorers if name not in known and speeds.label_s is None],
    )


def _places(packed: Sequence[tuple[Packed, Packed]], role: str) -> list[str]:
    return sorted({place for _, most in packed for place in most.places(role)})


def _by_turns(fleet: Fleet, making: Sequence[Role], training: Role) -> str:
    """Whether it would fit if roles took turns, in words."""
    try:
        for roles in (making, [training]):
            pack(fleet, roles)
    except UserError:
        return ""
    return "; by turns (cluster.placement=colocated) the roles fit"
