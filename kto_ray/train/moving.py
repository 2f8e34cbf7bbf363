"""Train workers whose node is taken away: they commit what they can, and begin again elsewhere before it goes.

    Ray's drained nodes --the first rank asks, for all--> the round ends in time: train on, commit, and leave
                                                          it does not, or there is none: leave now
                                                            |
                                                            +--TakenAway--> Ray Train, which starts all ranks elsewhere

`worker.py` asks between rounds and, `LOOKS` times, within one. By its kind of error Ray Train tells workers that were
taken away, also by a node that went with them, from such that failed. Its own watcher of drained nodes is not used
(`cluster.py`): that is an actor on any node, which then cannot be given back, and it restarts workers at the deadline.
"""

import time
from typing import Any

import ray
import ray.train.collective
import torch.distributed
from ray.exceptions import RayActorError

from kto_ray.draining import draining_nodes, seconds_left
from kto_ray.train.coordinator import RoundTask, TrainingReport

LOOKS = 32
"""About how often in a round at most; every time costs a question to Ray."""
LOOK_S = 2.0
"""Between two looks while there is nothing to train on."""
COMMIT_S = 5.0
"""That a commit takes, beyond the steps."""


class TakenAway(RayActorError):  # noqa: N818  it is no error of anybody
    """What Ray Train takes for workers that a node took along.

    Args:
        why: for the user.
    """

    def __init__(self, why: str) -> None:
        super().__init__(None, why, False, True)  # type: ignore[arg-type]
        self.args = (why,)  # it is pickled on its way


class Moving:
    """Whether the workers have to leave. Every rank asks the same questions, and all get the first one's answers."""

    def __init__(self, rank: int, ranks: int, coordinator: Any) -> None:
        self.rank, self.ranks, self.coordinator = rank, ranks, coordinator
        self._nodes: list[Any] = [ray.get_runtime_context().get_node_id()] * ranks  # by rank
        if ranks > 1:
            torch.distributed.all_gather_object(self._nodes, self._nodes[0])

    def look(self, needed_s: float | None = None) -> None:
        """Raises TakenAway when the node of a worker goes before so many more seconds have passed; None: at any time.

        The first rank's seconds count.
        """
        if why := self._agreed(self._why(needed_s) if self.rank == 0 else ""):
            raise TakenAway(why)

    def _why(self, needed_s: float | None) -> str:
        """They have to leave; "": they need not."""
        for node, left_s in draining_nodes().items():
            if node in self._nodes and (needed_s is None or (left_s is not None and left_s < needed_s + COMMIT_S)):
                return f"the node of rank {self._nodes.index(node)} is taken away {seconds_left(left_s)} ({node})"
        return ""

    def _agreed(self, value: Any) -> Any:
        return ray.train.collective.broadcast_from_rank_zero(value) if self.ranks > 1 else value

    def next_round(self, version: int, report: TrainingReport | None) -> RoundTask | None:
        """See `Coordinator.next_round`; raises TakenAway meanwhile."""
        asked = self.coordinator.next_round.remote(version, report if self.rank == 0 else None)
        while True:
            answered, _ = ray.wait([asked], timeout=LOOK_S)
            self.look()
            if self._agreed(bool(answered)):
                task: RoundTask | None = ray.get(asked)
                return task

    def within_round(self) -> "Looks":
        """To be told of the steps of a round, by every rank."""
        return Looks(self)


class Looks:
    """Looks now and then within one round, after the same steps on every rank."""

    def __init__(self, moving: Moving) -> None:
        self._moving, self._began = moving, time.monotonic()

    def after_step(self, step: int, steps: int) -> None:
        """Raises TakenAway when the other steps take longer than the node is there."""
        if step < steps and step % max(1, steps // LOOKS) == 0:
            self._moving.look((time.monotonic() - self._began) / step * (steps - step))
