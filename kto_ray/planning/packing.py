"""Which actors go on which nodes, as Ray would put them.

Ray gives an actor CPUs of one node, and either whole cards or a part of one. What asks for most is placed first, on a
node that is there before a new one comes, and what needs no card where there are none, if it can.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kto_ray.config import Resources, RunConfig
from kto_ray.errors import UserError
from kto_ray.planning.node_types import Fleet, NodeType

GRAIN = 10_000
"""Ray counts in parts of so many."""


@dataclass(frozen=True)
class Role:
    """Actors that do the same: at least so many, and at most."""

    name: str
    section: str
    """Of the configuration, which says what each may have."""
    resources: Resources
    least: int
    most: int

    @property
    def each(self) -> str:
        gpus = f" and {self.resources.num_gpus:g} GPU" if self.resources.num_gpus else ""
        return f"{self.resources.num_cpus:g} CPU{gpus}"


def roles_of(config: RunConfig) -> tuple[list[Role], Role]:
    """Those that make rounds, generators first, and the one that trains."""
    generate, train = config.generate, config.train
    making = [Role("generator", "generate", generate.resources, max(1, generate.min_replicas), generate.max_replicas)]
    making += [
        Role(f"scorer {name}", f"label.scorers.{name}", settings.resources, settings.min_actors, settings.max_actors)
        for name, settings in config.label.scorers.items()
    ]
    return making, Role("train worker", "train", train.resources, train.workers, train.workers)


class Node:
    """One node of a kind, and what of it is free, in grains."""

    def __init__(self, kind: NodeType) -> None:
        self.kind = kind
        self.cpus = kind.cpus * GRAIN
        self.cards = [GRAIN] * kind.gpus
        self.actors: dict[str, int] = {}
        """How many of each role."""

    def take(self, role: Role) -> bool:
        """Put an actor of a role here, if it fits."""
        cpus, gpus = round(role.resources.num_cpus * GRAIN), round(role.resources.num_gpus * GRAIN)
        if gpus > GRAIN:
            cards = [place for place, free in enumerate(self.cards) if free == GRAIN][: -(-gpus // GRAIN)]
            fits = len(cards) * GRAIN >= gpus
        else:
            # On the card with the least room for it, as Ray does, so that others stay whole.
            roomy = sorted((free, place) for place, free in enumerate(self.cards) if free >= gpus)
            cards = [place for _, place in roomy[:1]] if gpus else []
            fits = bool(cards) or not gpus
        if cpus > self.cpus or not fits:
            return False
        self.cpus -= cpus
        for place in cards:
            self.cards[place] -= min(gpus, GRAIN)
        self.actors[role.name] = self.actors.get(role.name, 0) + 1
        return True


@dataclass(frozen=True)
class Packed:
    """Nodes that are there at the same time, with who is on them."""

    nodes: Sequence[Node]

    def counts(self) -> dict[str, int]:
        """Nodes by kind."""
        found: dict[str, int] = {}
        for node in self.nodes:
            found[node.kind.name] = found.get(node.kind.name, 0) + 1
        return found

    def actors(self, role: str) -> int:
        return sum(node.actors.get(role, 0) for node in self.nodes)

    def places(self, role: str) -> list[str]:
        """Kinds of nodes that a role is on."""
        return sorted({node.kind.name for node in self.nodes if role in node.actors})


def pack(fleet: Fleet, roles: Sequence[Role]) -> tuple[Packed, Packed]:
    """The least that the roles need, and the most that they can use of the fleet.

    Raises:
        UserError: the least does not fit; has the numbers.
    """
    nodes = [Node(kind) for kind in fleet.types for _ in range(kind.least)]
    for role in sorted(roles, key=_size, reverse=True):
        for count in range(role.least):
            if not _place(fleet, nodes, role):
                raise UserError(_refusal(fleet, roles, role, count))
    least = Packed(_copied(nodes))
    wanted = {role.name: role.most - role.least for role in roles}
    growing = sorted(roles, key=_size, reverse=True)
    while growing:  # in turn, as demand would come
        growing = [role for role in growing if wanted[role.name] and _place(fleet, nodes, role)]
        for role in growing:
            wanted[role.name] -= 1
    return least, Packed(nodes)


def _size(role: Role) -> tuple[float, float]:
    return role.resources.num_gpus, role.resources.num_cpus


def _place(fleet: Fleet, nodes: list[Node], role: Role) -> bool:
    """On a node that is there, else on a new one of the smallest kind that has room for it."""
    needs_card = role.resources.num_gpus > 0
    for node in sorted(nodes, key=lambda node: (bool(node.kind.gpus) and not needs_card, -bool(node.actors))):
        if node.take(role):
            return True
    if len(nodes) >= fleet.most:
        return False
    for kind in sorted(fleet.types, key=lambda kind: (kind.gpus, kind.cpus)):
        new = Node(kind)
        if sum(node.kind == kind for node in nodes) < kind.most and new.take(role):
            nodes.append(new)
            return True
    return False


def _copied(nodes: Iterable[Node]) -> list[Node]:
    copies = []
    for node in nodes:
        copy = Node(node.kind)
        copy.actors = dict(node.actors)
        copies.append(copy)
    return copies


def _refusal(fleet: Fleet, roles: Sequence[Role], role: Role, placed: int) -> str:
    kinds = "; ".join(map(str, fleet.types))
    if not any(Node(kind).take(role) for kind in fleet.types):
        return (
            f"{role.section}.resources: a {role.name} asks for {role.each}, and no kind of node has that: {kinds}; ask "
            "for less, or plan with larger nodes"
        )
    wanted = ", ".join(f"{other.least} x {other.name} of {other.each}" for other in roles)
    return (
        f"the cluster is too small: at least {wanted} are there at the same time, and only {placed} of {role.least} x "
        f"{role.name} find a place on {kinds}, {fleet.most} nodes in all; ask for less, or allow more nodes"
    )


def most_of(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Nodes by kind where now these are there, now those."""
    found: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            found[name] = max(found.get(name, 0), count)
    return found
