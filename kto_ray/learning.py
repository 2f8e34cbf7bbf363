"""The half of a run that learns: train -> publish -> evaluate, on one sealed round after the other, from wherever the
run stands.

`loop.py` makes the rounds out of what its policies draw, `offline/loop.py` out of a prepared set: both are `Rounds` to
`Learning`, which waits for the next one, has the train workers train on it, writes down what came of it, and says that
it is done.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.console import Console

from kto_ray import telemetry
from kto_ray.concurrency import together
from kto_ray.config import RunConfig
from kto_ray.evaluate.doubts import doubts_of
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.evaluate.hints import new_hints
from kto_ray.evaluate.summary import evaluation_row
from kto_ray.generate.client import Generators
from kto_ray.outbox import Row
from kto_ray.policies import PolicyStore
from kto_ray.retention import Retention
from kto_ray.rounds import Round
from kto_ray.score.pool import Scorers
from kto_ray.stage import Stage
from kto_ray.stopwatch import Stopwatch
from kto_ray.storage import Storage
from kto_ray.telling import LiveView, evaluation_sentence
from kto_ray.tracking import Metrics
from kto_ray.train.coordinator import RoundTask
from kto_ray.train.job import Training

logger = logging.getLogger(__name__)

NOT_FIGURES = ("format", "files", "parts", "stage", "labeler", "replayed_from", "drawing", "set")
"""What else a round's manifest holds."""


class Rounds(Protocol):
    """Whoever makes the rounds that are learned from."""

    async def sealed(self, index: int) -> Round:
        """The round, once it is sealed."""

    def worth_training(self, index: int, round_: Round) -> bool:
        """Whether it is trained on; what there is to say of it is said.

        Raises:
            UserError: it is not, and the run is to end therefore.
        """

    def nothing_trained(self, index: int, draws: Mapping[str, int]) -> str:
        """Why nothing of a round was trained on, in a sentence."""

    def sentence(self, facts: Mapping[str, Any]) -> str:
        """What came of a round."""

    async def walked(self, version: int, stopped: bool) -> None:
        """The run stands at this policy, which is evaluated where it is due; `stopped`: it ends there."""


def finished(config: RunConfig, run: Storage) -> dict[str, Any] | None:
    """What `summary.json` says of a run that has trained all of its rounds; None: there is something left to do."""
    if not run.exists("summary.json"):
        return None
    summary: dict[str, Any] = run.read_json("summary.json")
    if summary["policy_version"] < config.rounds:
        return None
    Metrics(config, run).close()  # a tracker that was away at the end has missed something
    return summary


@dataclass
class Learning:
    """See the module."""

    config: RunConfig
    console: Console
    policies: PolicyStore
    training: Training
    generators: Generators
    scorers: Scorers
    evaluation: Evaluation
    fresh: Evaluation | None
    retention: Retention
    metrics: Metrics
    stage: Stage
    watch: Stopwatch
    progress: LiveView

    settled: int = field(init=False)
    """How many rounds an earlier process has trained on and written down."""

    def __post_init__(self) -> None:
        rows = {row["step"] for row in self.metrics.of("round")}
        self.settled = next(index for index in range(len(rows) + 1) if index not in rows)

    async def learn(self, rounds: Rounds) -> None:
        """All rounds, or as many as it takes."""
        self.progress.walked(self.settled)
        await self.evaluate(0)
        for index in range(self.config.rounds):
            if index >= self.settled:
                await self._walk(rounds, index)
                self.progress.walked(index + 1)
            version = index + 1
            stopped, last = False, version == self.config.rounds
            if version % self.config.evaluate.every == 0 and not last:
                row = await self.evaluate(version)
                goal = self.config.evaluate.stop_at_pass_rate
                # Not the rate itself: of the rates of many policies, one is high by chance.
                if goal is not None and row.get("pass_rate_low", 0) >= goal:
                    stopped = last = True
            if self._doubtful(index) and not last:
                stopped = last = True
            self.retention.published(version)
            telemetry.POLICY.set(version)
            await rounds.walked(version, stopped)
            if last:
                await self.evaluate(version)
                if self.fresh:
                    await self.evaluate(0, self.fresh)
                    await self.evaluate(version, self.fresh)
                return

    async def _walk(self, rounds: Rounds, index: int) -> None:
        """Train on a round, as soon as it is sealed, and write down its row."""
        began = time.monotonic()
        round_ = await rounds.sealed(index)
        if not await asyncio.to_thread(lambda: round_.trained):
            await self._train(rounds, index, round_)
        facts = {name: value for name, value in round_.manifest.items() if name not in NOT_FIGURES}
        facts |= (await asyncio.to_thread(round_.storage.read_json, "training.json"))["figures"]
        facts |= {"seconds/seal": round_.seal_seconds} if round_.seal_seconds is not None else {}
        passes = self.evaluation.pass_rate(round_.prompt_ids(), round_.scores()) if round_.sample_ids else None
        facts |= {"pass_rate": passes} if passes is not None else {}
        await asyncio.to_thread(self.metrics.log, "round", index, facts | {"seconds/round": time.monotonic() - began})
        self.console.print(rounds.sentence(facts))

    async def _train(self, rounds: Rounds, index: int, round_: Round) -> None:
        train = rounds.worth_training(index, round_)
        bar = self.progress.add_task(f"round {index}: train", total=None)

        async def show() -> None:
            while True:
                current, step, steps = await self.training.coordinator.progress.remote()
                if current == index and steps:
                    self.progress.update(bar, completed=step, total=steps)
                await asyncio.sleep(1)

        try:
            async with self.stage.turn("training"), together() as group:
                showing = group.create_task(show())
                report = await self.training.train(RoundTask(index, train))
                showing.cancel()
        finally:
            self.progress.remove_task(bar)
        if train and not any(report.draws.values()):
            logger.warning(rounds.nothing_trained(index, report.draws))
        if report.left_out:
            logger.warning("round %d: %d samples whose error is not finite were left out", index, len(report.left_out))
        policy = await asyncio.to_thread(self.policies.resolve, report.version)
        facts = {"policy_version": policy.version, "policy_digest": policy.digest, "figures": report.figures}
        facts |= {"left_out": report.left_out} if report.left_out else {}
        facts |= {"reference": report.reference} if report.reference else {}
        await asyncio.to_thread(round_.record_training, report.draws, facts)

    async def evaluate(self, version: int, evaluation: Evaluation | None = None) -> Row:
        evaluation = evaluation or self.evaluation
        if version and (row := self.metrics.row(evaluation.stage, version)):  # what the base drew is everybody's bar
            return row
        async with self.stage.turn("evaluating"):
            with self.watch.measure("evaluate"):
                policy = await asyncio.to_thread(self.policies.resolve, version)
                summary = await evaluation.run_for(policy, self.generators, self.scorers)
        picture = await asyncio.to_thread(evaluation.picture, version) if self.metrics.outboxes else None
        self.retention.evaluated(evaluation, version)
        row = evaluation_row(summary)
        await asyncio.to_thread(self.metrics.log, evaluation.stage, version, row, picture)
        self.console.print(evaluation_sentence(version, summary, evaluation.fresh))
        return row

    def _doubtful(self, index: int) -> bool:
        """Say what there is to doubt, see `evaluate/doubts.py`; whether the run has to end therefore."""
        # A continued run has rows of later rounds, too, and must stop where it would have stopped.
        rows = [row for row in self.metrics.of("round") if row["step"] <= index]
        for doubt in (doubts := doubts_of(self.config, rows)):
            self.console.print(doubt.text, style="yellow", markup=False, highlight=False)
        for hint in new_hints(self.config, rows):
            self.console.print(hint, markup=False, highlight=False)
        return any(doubt.stop for doubt in doubts)
