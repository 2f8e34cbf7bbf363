"""Train workers whose node is taken away: they commit what they can, and begin again elsewhere before it goes.

    Ray's drained nodes --Ray Train's watcher--> `get_preemption_info`, on every rank
                                                   |
                              the round ends in time: train on, commit, and leave
                              it does not, or there is none: leave now   --TakenAway--> Ray Train, which restarts them

`worker.py` asks between rounds and, `LOOKS` times, within one. Ray Train restarts workers that were taken away where
there is room, without counting it as a failure, at the latest when the deadline has passed: also those that did not
leave by themselves.
"""

import time
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.exceptions import RayActorError

from kto_ray.draining import seconds_left
from kto_ray.train.coordinator import RoundTask, TrainingReport

LOOKS = 32
"""About how often in a round at most; every time costs two calls of an actor."""
LOOK_S = 2.0
"""Between two looks while there is nothing to train on."""
COMMIT_S = 5.0
"""That a commit takes, beyond the steps."""


class TakenAway(RayActorError):  # noqa: N818  it is no error of anybody
    """What Ray Train takes for workers that a node took along: by this it tells them from such that failed.

    Args:
        why: for the user.
    """

    def __init__(self, why: str) -> None:
        super().__init__(None, why, False, True)  # type: ignore[arg-type]
        self.args = (why,)  # it is pickled on its way


class Moving:
    """Whether the workers have to leave. Every rank asks the same questions, and all get the first one's answers."""

    def __init__(self, rank: int, coordinator: Any) -> None:
        self.rank, self.coordinator = rank, coordinator

    def look(self, needed_s: float | None = None) -> None:
        """Raises TakenAway when the node of a worker goes before so many more seconds have passed; None: at any time.

        The first rank's seconds count.
        """
        info = ray.train.get_preemption_info()
        if info is None:
            return
        left_s = info.deadline_ms / 1000 - time.time() if info.deadline_ms else None
        stays = needed_s is not None and (left_s is None or needed_s + COMMIT_S < left_s)
        if not ray.train.collective.broadcast_from_rank_zero(stays):
            ranks, nodes = (", ".join(map(str, those)) for those in (info.preempted_ranks, info.preempted_node_ids))
            raise TakenAway(f"the node of rank {ranks} is taken away {seconds_left(left_s)}: {nodes}")

    def next_round(self, version: int, report: TrainingReport | None) -> RoundTask | None:
        """See `Coordinator.next_round`; raises TakenAway meanwhile."""
        asked = self.coordinator.next_round.remote(version, report if self.rank == 0 else None)
        while True:
            answered, _ = ray.wait([asked], timeout=LOOK_S)
            self.look()
            if ray.train.collective.broadcast_from_rank_zero(bool(answered)):
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
