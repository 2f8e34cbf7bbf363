"""What Ray Train's controller calls when workers fail; `job.py` gives it, the coordinator is told.

Of this project's code the controller's process imports this module alone: neither torch nor diffusers, which would
take it as long as a train worker takes to start.
"""

import uuid
from typing import Any

from ray.train import UserCallback

from kto_ray.lost import last_words, taken_away
from kto_ray.train.coordinator import Failure


class Watching(UserCallback):
    """Tells the coordinator of workers that failed; Ray Train calls it where it decides what to do about them.

    Of workers that are taken away it is told again and again, until all of them have ended.
    """

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self._moved = ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        found = sorted(worker_exceptions.items(), key=lambda item: item[0])
        moved = [last_words(error) for _, error in found if taken_away(getattr(error, "health_check_failure", error))]
        if moved and moved[0] == self._moved:
            return
        self._moved = moved[0] if moved else ""
        rank, error = found[0]
        why = self._moved or f"rank {rank}: {last_words(error)}"
        self.coordinator.workers_failed.remote(Failure(uuid.uuid4().hex, why, bool(moved)))
