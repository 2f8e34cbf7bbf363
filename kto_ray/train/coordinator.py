"""Where the loop and the long-lived train workers meet: the loop hands over rounds, the workers take them in turn.

An async Ray actor without a thread of its own, on the driver's node, that may die at any time. It knows nothing but
what calls that wait in it brought along: the loop waits with the round it wants trained, the workers wait for the next
one with the report of the last. Ray makes such calls again when it has started the actor anew, and so it knows
everything again.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


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
    figures: dict[str, Any]
    """As `training.json` keeps them; numbers, but for what each rank has spent."""
    draws: dict[str, int]
    left_out: list[str] = field(default_factory=list)
    """Samples that `train.on_nonfinite` left out."""
    reference: tuple[int, str] | None = None
    """Version and digest of the policy that the rewards were measured against; checkpoints of 0.1.0 do not say."""


@dataclass(frozen=True)
class Failure:
    """Of workers, which Ray Train starts again."""

    id: str
    why: str
    moved: bool = False
    """They did not fail: the node of one is taken away."""


@dataclass(frozen=True)
class GaveUp:
    """The workers have ended, and would end again: a sentence for the user."""

    why: str


class Coordinator:
    """See the module. `None` as a task means: there will be no more."""

    def __init__(self) -> None:
        self._tasks: dict[int, RoundTask] = {}
        self._reports: dict[int, TrainingReport] = {}
        self._gave_up: GaveUp | None = None
        self._told = self._closed = False
        self._working = False
        self._failure: Failure | None = None
        self._changed = asyncio.Condition()
        self._progress: tuple[int, int, int] = (0, 0, 0)

    # -- asked by the loop ----------------------------------------------------------------------------------------

    async def train(self, task: RoundTask) -> TrainingReport | GaveUp:
        """Hand over a round, and wait for what comes of it."""
        version = task.round_index + 1
        async with self._changed:
            self._tasks[task.round_index] = task
            self._changed.notify_all()
            await self._changed.wait_for(lambda: version in self._reports or self._gave_up)
            if report := self._reports.get(version):
                return report
            assert self._gave_up
            self._told = True
            self._changed.notify_all()
            return self._gave_up

    async def wait_workers(self) -> None:
        """Until the train workers have loaded their model and asked for a round, after their last failure, if any."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._working)

    async def wait_failure(self, after: str | None) -> Failure:
        """Until workers have failed, at work or on the way to it; `after` is the failure that is known already."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure and self._failure.id != after)
            assert self._failure
            return self._failure

    async def progress(self) -> tuple[int, int, int]:
        """(round, optimizer steps done, steps in all) of the round in work."""
        return self._progress

    async def close(self) -> None:
        """Let the workers end. Never returns: a call that is still there is what a restarted actor knows it by."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        await asyncio.Event().wait()

    # -- asked by the workers, and by Ray Train about them ----------------------------------------------------------

    async def next_round(self, version: int, report: TrainingReport | None = None) -> RoundTask | None:
        """The round for workers whose policy has this version; waits for it. Every rank gets the same answer.

        Args:
            report: of the round that led to this version, from the one rank that tells it.

        Raises:
            RuntimeError: the loop has moved beyond this version, so the workers' checkpoint is older than the run.
        """
        async with self._changed:
            if report:
                self._reports[report.version] = report
            self._working = True
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._closed or any(index >= version for index in self._tasks))
            if version in self._tasks:
                return self._tasks[version]
            if self._closed:
                return None
            raise RuntimeError(
                f"the train workers stand at policy {version}, the run at {min(self._tasks)}: "
                "the checkpoints of this run are missing or older than its policies"
            )

    async def wait_turn(self) -> bool:
        """Until a round is to be trained, and workers that share their cards may go there. False: there is none."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self.training)
            return self.training

    async def give_up(self, why: str) -> None:
        """Called by every worker that finds what a restart would find again; the first reason stands.

        Returns when the loop has been told, or will not ask any more.
        """
        async with self._changed:
            self._gave_up, self._working = self._gave_up or GaveUp(why), True
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._told or self._closed)

    async def set_progress(self, round_index: int, step: int, steps: int) -> None:
        self._progress = (round_index, step, steps)
        async with self._changed:
            self._working = True
            self._changed.notify_all()

    async def workers_failed(self, failure: Failure) -> None:
        """They are being started again."""
        async with self._changed:
            self._working, self._failure = False, failure
            self._changed.notify_all()

    # -- asked by generators that share their cards with the workers -----------------------------------------------

    async def is_training(self) -> bool:
        """Whether a round was handed over that there is no report of."""
        return self.training

    async def wait_others(self) -> None:
        """Until no round is being trained."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.training)

    @property
    def training(self) -> bool:
        return not self._gave_up and any(index + 1 not in self._reports for index in self._tasks)


def start_coordinator() -> Any:
    """The actor; it computes nothing, so it asks for no CPU.

    It lives and dies with the node of the driver: elsewhere it would keep a node that nobody needs, and go with it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Coordinator)
    return actor.options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000, scheduling_strategy=here
    ).remote()
