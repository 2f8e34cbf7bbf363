"""Where the loop and the long-lived train workers meet: the loop offers rounds, the workers take them in turn.

An async Ray actor without a thread of its own. The worker at policy version v asks for the round that leads to v + 1
and waits here; the loop waits here for the report. Both sides ask by version, so an answer may be asked for again
after a crash.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray


@dataclass(frozen=True)
class RoundTask:
    """Train policy version `round_index` on this sealed round to version `round_index + 1`."""

    round_index: int
    train: bool = True
    """False: publish the same weights again (a round that is skipped)."""


@dataclass(frozen=True)
class TrainingReport:
    """What came of a round: the version it made, figures, and how often each sample was drawn."""

    version: int
    figures: dict[str, float]
    draws: dict[str, int]
    left_out: list[str] = field(default_factory=list)
    """Samples that `train.on_nonfinite` left out."""


@dataclass(frozen=True)
class GaveUp:
    """The workers have ended, and would end again: a sentence for the user."""

    why: str


class Coordinator:
    """See the module. `None` as a task means: there will be no more."""

    def __init__(self) -> None:
        self._tasks: dict[int, RoundTask] = {}
        self._reports: dict[int, TrainingReport] = {}
        self._closed = False
        self._gave_up: GaveUp | None = None
        self._workers_came = asyncio.Event()
        self._changed = asyncio.Condition()
        self._progress: tuple[int, int, int] = (0, 0, 0)

    async def offer(self, task: RoundTask) -> None:
        async with self._changed:
            self._tasks[task.round_index] = task
            self._changed.notify_all()

    async def next_round(self, version: int) -> RoundTask | None:
        """The round for workers whose policy has this version; waits for it. Every rank gets the same answer.

        Raises:
            RuntimeError: the loop has moved beyond this version, so the workers' checkpoint is older than the run.
        """
        self._workers_came.set()
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or any(index >= version for index in self._tasks))
            if version in self._tasks:
                return self._tasks[version]
            if self._closed:
                return None
            raise RuntimeError(
                f"the train workers stand at policy {version}, the run at {min(self._tasks)}: "
                "the checkpoints of this run are missing or older than its policies"
            )

    async def wait_workers(self) -> None:
        """Until the train workers have loaded their model and asked for a round."""
        await self._workers_came.wait()

    async def report(self, report: TrainingReport) -> None:
        async with self._changed:
            self._reports[report.version] = report
            self._changed.notify_all()

    async def give_up(self, why: str) -> None:
        """Called by every worker that finds what a restart would find again; the first reason stands."""
        self._workers_came.set()
        async with self._changed:
            self._gave_up = self._gave_up or GaveUp(why)
            self._changed.notify_all()

    async def wait_trained(self, version: int) -> TrainingReport | GaveUp:
        async with self._changed:
            await self._changed.wait_for(lambda: version in self._reports or self._gave_up)
            return self._reports.get(version) or self._gave_up  # type: ignore[return-value]

    async def set_progress(self, round_index: int, step: int, steps: int) -> None:
        self._progress = (round_index, step, steps)

    async def progress(self) -> tuple[int, int, int]:
        """(round, optimizer steps done, steps in all) of the round in work."""
        return self._progress

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()


def start_coordinator() -> Any:
    """The actor; it computes nothing, so it asks for no CPU."""
    actor: Any = ray.remote(Coordinator)
    return actor.options(num_cpus=0, max_concurrency=1000).remote()
