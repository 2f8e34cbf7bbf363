"""Who stands on which machines, and when: `cluster.placement`, compared with the cluster before a model is loaded.

    separate    all roles at once, each with what it asks for
    elastic     the same; `turns.py` lets generators go while nobody draws
    colocated   by turns: making rounds (generators and scorers), or training; whoever has no turn sleeps

`loop.py` asks `placed` once it has joined the cluster, and hands the parts what is to be booked for them. For roles
that sleep in between, Ray books shares of a card, such that on every card there is room for one train worker, for
everybody else, and for no second train worker, which NCCL would refuse.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kto_ray.cluster import joins
from kto_ray.config import Resources, RunConfig, ScorerSettings
from kto_ray.errors import UserError

logger = logging.getLogger(__name__)

Kind = Literal["separate", "colocated", "elastic"]

TRAIN_SHARE = 0.51
"""Of a card, booked for a train worker that shares it by turns: there is never room for two."""
GRAIN = 10_000
"""Ray counts in parts of so many."""
UNKNOWN = float("inf")


class Room(NamedTuple):
    """CPUs and GPUs."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"

    def lacks(self, need: "Room") -> str:
        """What of a need is not there, in words; "" where it fits."""
        pairs = (("CPU", self.cpus, need.cpus), ("GPU", self.gpus, need.gpus))
        return " and ".join(f"{need:g} {name} of {has:g}" for name, has, need in pairs if need > has + 1 / GRAIN)


@dataclass(frozen=True)
class Machines:
    """Of a cluster.

    Args:
        has: it has so much.
        most: it can come to have so much; infinite where nobody knows.
        largest: its largest node has, or can have, so much; infinite where nobody knows.
        cards: of its largest node that is known.
    """

    has: Room
    most: Room
    largest: Room
    cards: float = 1


@dataclass(frozen=True)
class Demand:
    """What a role asks for: at least so many actors with these resources."""

    role: str
    section: str
    resources: Resources
    count: int

    @property
    def room(self) -> Room:
        return Room(self.count * self.resources.num_cpus, self.count * self.resources.num_gpus)

    def __str__(self) -> str:
        one = self.resources
        gpus = f" and {one.num_gpus:g} GPU" if one.num_gpus else ""
        return f"{self.count} x {self.role} ({one.num_cpus:g} CPU{gpus})"


@dataclass(frozen=True)
class Placement:
    """What is booked for the actors of each role.

    Args:
        replicas: least and most of them.
    """

    kind: Kind
    generator: Resources
    replicas: tuple[int, int]
    train_worker: Resources
    scorers: Mapping[str, Resources] = field(default_factory=dict)
    most_actors: Mapping[str, int] = field(default_factory=dict)
    """Of each scorer."""
    per_node: int | None = None
    """Replicas, at most: more would find no card of their own. None: Ray's books say how many."""

    def scorer(self, name: str, settings: ScorerSettings) -> ScorerSettings:
        """A scorer's settings, with what is booked for it."""
        update = {"resources": self.scorers[name], "max_actors": self.most_actors[name]}
        return settings.model_copy(update=update)

    @property
    def by_turns(self) -> bool:
        """Whether roles sleep while others have their turn."""
        return self.kind == "colocated"


def demands_of(config: RunConfig) -> tuple[list[Demand], Demand]:
    """The least that a run asks for: to make rounds, and to train."""
    generate, train = config.generate, config.train
    making = [Demand("generator", "generate", generate.resources, max(1, generate.min_replicas))]
    making += [
        Demand(f"scorer {name}", f"label.scorers.{name}", settings.resources, settings.min_actors)
        for name, settings in config.label.scorers.items()
    ]
    return making, Demand("train worker", "train", train.resources, train.workers)


def as_configured(config: RunConfig, kind: Kind = "separate") -> Placement:
    """Everybody has what the configuration asks for."""
    scorers = config.label.scorers
    return Placement(
        kind,
        config.generate.resources,
        (config.generate.min_replicas, config.generate.max_replicas),
        config.train.resources,
        {name: settings.resources for name, settings in scorers.items()},
        {name: settings.max_actors for name, settings in scorers.items()},
    )


def by_turns(config: RunConfig, room: Room, cards: float = 1) -> Placement:
    """Shares by which everybody finds a place at once, and as many replicas as there is room for in a turn.

    Args:
        room: of the cluster.
        cards: of a node.

    Raises:
        UserError: a role wants more than a card to itself.
    """
    making, training = demands_of(config)
    for demand in (*making, training):
        if demand.resources.num_gpus > 1:
            raise UserError(
                f"{demand.section}.resources.num_gpus: {demand.resources.num_gpus:g}, but where roles share cards by "
                "turns (cluster.placement: colocated) each actor has one, or a part of one; give at most 1"
            )
    generators, *scorers = making
    replicas = config.generate.max_replicas
    while replicas > generators.count and room.lacks(_sum([replace(generators, count=replicas), *scorers])):
        replicas -= 1
    making = [replace(generators, count=replicas), *scorers]
    # With their CPUs roles share as with their cards: together they book what the larger turn asks for.
    turn, together = max(_sum(making).cpus, training.room.cpus), _sum([*making, training]).cpus
    cpus = turn / together if together > room.cpus else 1.0
    sharing = sum(demand.count for demand in making if demand.resources.num_gpus)
    share = _down((1 - TRAIN_SHARE) / sharing) if sharing else 0.0

    def booked(demand: Demand, gpus: float) -> Resources:
        update = {
            "num_cpus": _down(cpus * demand.resources.num_cpus),
            "num_gpus": gpus if demand.resources.num_gpus else 0,
        }
        return demand.resources.model_copy(update=update)

    shares = [booked(demand, share) for demand in making]
    names = list(config.label.scorers)
    return Placement(
        "colocated",
        shares[0],
        (replicas, replicas),
        booked(training, TRAIN_SHARE),
        dict(zip(names, shares[1:], strict=True)),
        {name: config.label.scorers[name].min_actors for name in names},
        max(1, int(cards) * int(1 / generators.resources.num_gpus)) if generators.resources.num_gpus else None,
    )


def choose(config: RunConfig, machines: Machines) -> Placement:
    """What `cluster.placement` says, or what fits; see there.

    Raises:
        UserError: what a run needs at least can never be there.
    """
    making, training = demands_of(config)
    for demand in (*making, training):
        one = Demand(demand.role, demand.section, demand.resources, 1)
        if lack := machines.largest.lacks(one.room):
            raise UserError(
                f"{demand.section}.resources: a {demand.role} asks for {lack} that the largest node of this cluster "
                "has, or can have; ask for less, or give the cluster larger nodes"
            )
    asked, together = config.cluster.placement, _sum([*making, training])
    turn = Room(*(max(both) for both in zip(_sum(making), training.room, strict=True)))
    known = UNKNOWN not in machines.most
    reach = machines.most if known else machines.has
    if asked is None:
        asked = "colocated" if reach.lacks(together) and not reach.lacks(turn) else "separate"
        if asked == "colocated":
            logger.warning(
                "cluster.placement: colocated, for all roles at once would take %s, and the cluster %s %s: they share "
                "it by turns",
                *(together, "can have at most" if known else "has", reach),
            )
    need = turn if asked == "colocated" else together
    if lack := machines.most.lacks(need):
        more = ""
        if asked != "colocated":
            fits = "does not fit" if machines.most.lacks(turn) else "fits"
            more = f"; by turns (cluster.placement=colocated) they need {turn}, which {fits}"
        raise UserError(
            f"cluster.placement: {asked} takes at least {need} ({_said([*making, training])}), and this cluster can "
            f"have at most {machines.most}: {lack} are asked for{more}"
        )
    if lack := machines.has.lacks(need):
        logger.warning(
            "the cluster has %s, and the run takes at least %s: it waits until what is missing comes",
            *(machines.has, need),
        )
    return by_turns(config, reach, machines.cards) if asked == "colocated" else as_configured(config, asked)


def require_one_a_card(config: RunConfig) -> None:
    """Raises UserError where two train workers could come to share a card."""
    train = config.train
    if train.workers > 1 and not train.on_cpu and 0 < train.resources.num_gpus <= 0.5:
        raise UserError(
            f"train.resources.num_gpus: {train.resources.num_gpus:g} with train.workers {train.workers}: two workers "
            "could get the same card, over which NCCL does not connect them; give 1, or more than 0.5, and share cards "
            "with other roles by cluster.placement=colocated"
        )


def placed(config: RunConfig) -> Placement:
    """The placement of a run on the cluster that this process has joined. See `choose`."""
    return choose(config, machines(config))


def machines(config: RunConfig) -> Machines:
    """Of the cluster that this process has joined."""
    import ray

    cluster: Any = ray
    alive = [node["Resources"] for node in cluster.nodes() if node["Alive"]]
    nodes = [_room(resources) for resources in alive]
    has, unknown = _total(nodes), Room(UNKNOWN, UNKNOWN)
    if not joins(config.cluster):
        return Machines(has, has, _largest(nodes), _largest(nodes).gpus)  # its own, which nothing is added to
    if (scaling := autoscaling()) is None:
        return Machines(has, unknown, unknown, _largest(nodes).gpus)
    head = [_room(resources) for resources in alive if "node:__internal_head__" in resources]
    kinds = [_room(kind.get("resources", {})) for kind in scaling["available_node_types"].values()]
    counts = [kind.get("max_workers", 0) for kind in scaling["available_node_types"].values()]
    grown = Room(*(_most(sizes, counts, scaling["max_workers"]) for sizes in zip(*kinds, strict=True)))
    most = Room(*(max(both) for both in zip(has, _total([*head, grown]), strict=True)))
    there_can_be = [kind for kind, count in zip(kinds, counts, strict=True) if count]
    largest = _largest([*nodes, *there_can_be])
    return Machines(has, most, largest, largest.gpus)


def autoscaling() -> dict[str, Any] | None:
    """The configuration of the cluster's autoscaler; None: it has none, or nobody can tell.

    Ray 2.60 tells a driver nothing of it. It is the file that its process on the head was started with, as by `ray up`.
    That of KubeRay runs in a container of its own, and cannot be seen.
    """
    import ray

    context = ray.get_runtime_context()
    reading: Any = ray.remote(_read_autoscaling)
    on_head = reading.options(num_cpus=0, resources={"node:__internal_head__": 0.001})
    found: dict[str, Any] | None = ray.get(on_head.remote(context.gcs_address))
    return found


def _read_autoscaling(gcs: str) -> dict[str, Any] | None:
    """Of the autoscaler on this machine that belongs to the Ray at this address."""
    import yaml

    port = gcs.rpartition(":")[2]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_text(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        named = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if "--autoscaling-config" in named and named.get("--gcs-address", "").endswith(f":{port}"):
            text = Path(named["--autoscaling-config"]).expanduser().read_text(encoding="utf-8")
            scaling: dict[str, Any] = yaml.safe_load(text)
            return {"max_workers": UNKNOWN, **scaling}
    return None


def _most(sizes: Sequence[float], counts: Sequence[int], at_most: float) -> float:
    """Of one resource, over nodes of these sizes, of each kind up to so many, and up to so many in all."""
    found = 0.0
    for size, count in sorted(zip(sizes, counts, strict=True), reverse=True):
        taken = min(count, at_most)
        found, at_most = found + taken * size, at_most - taken
    return found


def _room(resources: Mapping[str, float]) -> Room:
    return Room(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))


def _total(rooms: Iterable[Room]) -> Room:
    return Room(*(sum(parts) for parts in zip(Room(0, 0), *rooms, strict=True)))


def _largest(rooms: Iterable[Room]) -> Room:
    """In each resource."""
    return Room(*(max(parts) for parts in zip(Room(0, 0), *rooms, strict=True)))


def _sum(demands: Iterable[Demand]) -> Room:
    return _total(demand.room for demand in demands)


def _said(demands: Iterable[Demand]) -> str:
    return ", ".join(map(str, demands))


def _down(share: float) -> float:
    """To what Ray can count."""
    return math.floor(share * GRAIN) / GRAIN
