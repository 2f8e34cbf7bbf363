"""The built-in labeler: a scorer's pool and a threshold."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kto_ray.config import Label
from kto_ray.label.pool import ScorerPool
from kto_ray.label.protocol import LABELERS, Judgement, Labeler, load_plugin
from kto_ray.records import Sample, Score, Verdict


@dataclass(frozen=True)
class Threshold:
    """Desirable from `value` on; no verdict within `margin` of it."""

    value: float
    margin: float = 0.0

    def verdict(self, score: Score, labeler: str) -> Verdict | None:
        """None for a failed score: a failure is never a verdict."""
        if score.value is None:
            return None
        rule = f"{score.scorer}@{score.scorer_version} >= {self.value:g}"
        if self.margin:
            rule += f" +- {self.margin:g}"
        if abs(score.value - self.value) < self.margin:
            return Verdict(score.sample_id, "abstain", labeler, rule)
        return Verdict(score.sample_id, "desirable" if score.value >= self.value else "undesirable", labeler, rule)


class ScorerLabeler:
    """Scores every batch of samples as it comes and judges it by a threshold; see `Labeler`."""

    name = "scorer"

    def __init__(self, config: Label, pool: ScorerPool) -> None:
        self.threshold = Threshold(config.threshold, config.abstain_below_margin)
        self.pool = pool
        self._answers: asyncio.Queue[Sequence[Judgement] | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """The pool is started by whoever shares it."""

    async def submit(self, samples: Sequence[Sample]) -> None:
        task = asyncio.create_task(self._judge(samples))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, samples: Sequence[Sample]) -> None:
        try:
            scores = await self.pool.score(samples)
        except Exception as error:  # noqa: BLE001  handed to whoever collects
            self._answers.put_nowait(error)
            return
        self._answers.put_nowait(
            [Judgement(score.sample_id, (score,), self.threshold.verdict(score, self.name)) for score in scores]
        )

    async def finish(self, stage: str) -> None:
        self.pool.shrink()

    async def collect(self) -> Sequence[Judgement]:
        answer = await self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()


def make_labeler(config: Label, pool: ScorerPool) -> Labeler:
    """The labeler that `label.labeler` names: the scorer's, or a class of the user's with `label.labeler_args`."""
    if config.labeler == "scorer":
        return ScorerLabeler(config, pool)
    labeler: Labeler = load_plugin("label.labeler", config.labeler, LABELERS)(**config.labeler_args)
    return labeler
