"""Making one round: draw -> score -> label -> seal, as a stream, from wherever a crash left it.

`loop.py` says when, and with which policy; replicas store what they draw, samples go to the labeler and the scorers as
they are drawn, scores to the labeler as they are found, and all of it is stored before the round is sealed.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from kto_ray import telemetry
from kto_ray.cluster import noisily
from kto_ray.concurrency import Gathering, cancelled, together
from kto_ray.config import RunConfig
from kto_ray.generate.client import Generators
from kto_ray.generate.drawn import failed_verdicts, require_drawn
from kto_ray.label.protocol import Labeler
from kto_ray.parts import write_part
from kto_ray.pictures import figures_of
from kto_ray.prompts import round_requests
from kto_ray.records import PolicyRef, Prompt, Sample, Score, Verdict
from kto_ray.rounds import Round, RoundStore
from kto_ray.samples import Samples
from kto_ray.score.pool import Scorers, require_scored
from kto_ray.stage import Stage
from kto_ray.stopwatch import Seconds, as_figures

SHOW_EVERY_S = 0.5
LACKING = "image", "score", "verdict"
"""What an image of a round may wait for, in their order."""


class Making:
    """Makes rounds out of prompts, with the run's generators, scorers and labeler.

    Args:
        stage: to be on for drawing and scoring, and to be left to others while people judge.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        rounds: RoundStore,
        generators: Generators,
        scorers: Scorers,
        labeler: Labeler,
        progress: Progress,
        stage: Stage | None = None,
    ) -> None:
        self.config, self.prompts, self.rounds = config, prompts, rounds
        self.generators, self.scorers, self.labeler, self.progress = generators, scorers, labeler, progress
        self.stage = stage or Stage()
        self._said: dict[str, Mapping[str, Seconds]] = {}  # what was spent when the last round was sealed, by role

    def memory(self) -> dict[str, Any]:
        """What the labeler kept with the last sealed round."""
        newest = next((round_ for round_ in reversed(self.rounds.rounds()) if round_.sealed), None)
        memory: dict[str, Any] = newest.manifest["labeler"] if newest else {}
        return memory

    async def make(self, index: int, round_: Round, policy: PolicyRef) -> None:
        """Draw, score, label and seal a round, from wherever a crash left it."""
        config = self.config
        images, deadline_s = config.generate.images_per_round, config.label.deadline_s
        requests = round_requests(
            self.prompts, config.seed, round_.stage, index, images, config.generate.images_per_prompt
        )
        stations = ("images", "scores", "verdicts")
        bars = [self.progress.add_task(f"round {index}: {what}", total=images) for what in stations]
        try:
            async with contextlib.AsyncExitStack() as turn, together() as group:
                await turn.enter_async_context(self.stage.turn("making"))
                began, before = time.monotonic(), (self.generators.busy_seconds, self.scorers.busy_seconds)
                scoring: list[asyncio.Task[None]] = []
                store_scores = Gathering(round_.store_scores)

                async def label(samples: Samples) -> None:
                    await self.labeler.submit(samples)
                    scoring.append(group.create_task(self._score(round_, samples, store_scores)))

                left = await self._left(round_)
                collecting = group.create_task(self._collect(round_, images))
                showing = group.create_task(self._show(index, round_, bars))
                # What a crash left; verdicts that are there already stay.
                while left:
                    await label(left.pop(0))
                drawing = self.generators.stream(round_.missing(requests), policy, round_.storage)
                async with contextlib.aclosing(drawing) as batches:
                    async for samples, failed in batches:
                        round_.know_samples(samples)
                        await self._store_failed(round_, failed)
                        if samples:
                            await label(samples)
                drawn = time.monotonic()
                if round_.sample_ids <= round_.judged_ids and not collecting.done():
                    # It waits for a last verdict, which a failed draw has made unnecessary.
                    await cancelled([collecting])
                    collecting = group.create_task(self._collect(round_, images))

                def awaited() -> str:
                    is_scored = all(task.done() for task in scoring)
                    return f"{self.labeler.status(round_.stage) if is_scored else 'scores'} on round {index}"

                async with noisily(awaited, config.cluster):
                    with contextlib.suppress(TimeoutError):  # then the scores that are there have to do
                        async with asyncio.timeout(deadline_s):
                            await asyncio.gather(*scoring)
                    await turn.aclose()
                    await turn.enter_async_context(self.stage.turn("judging"))
                    await self.labeler.finish(round_.stage)
                    enough = group.create_task(self.labeler.enough(round_.stage))
                    # Past the deadline there is still a moment for what the labeler can say at once.
                    left_s = deadline_s and max(1.0, drawn + deadline_s - time.monotonic())
                    await asyncio.wait({collecting, enough}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                    await cancelled([collecting, enough])
                    await store_scores.settle()
                    await self._add_verdicts(round_, await self.labeler.seal(round_.stage))
                    showing.cancel()
        finally:
            for bar in bars:
                self.progress.remove_task(bar)
            for lacks in LACKING:
                telemetry.WAITING.set(0, lacks=lacks)
        self.scorers.shrink()
        await self.seal(
            index,
            round_,
            {
                "drawing": self.generators.drawing,
                "seconds/generate": drawn - began,
                "seconds/label": time.monotonic() - drawn,  # what labeling took beyond the last image
                "busy/generate": self.generators.busy_seconds - before[0],
                "busy/label": self.scorers.busy_seconds - before[1],
                **self._spent("generators", self.generators.spent),
                **self._spent("scorers", self.scorers.spent),
            },
        )

    def _spent(self, role: str, spent: Mapping[str, Seconds]) -> dict[str, Any]:
        """What a role has spent since the last round was sealed."""
        before, self._said[role] = self._said.get(role, {}), spent
        return as_figures(role, spent, before)

    async def _left(self, round_: Round) -> list[Samples]:
        """What a crash left in a round, and has still to be labeled, in batches."""
        await asyncio.to_thread(round_.open)
        failed = [record for record in round_.records() if record.error is not None]
        require_drawn(self.config, round_.stage, len(failed), self.config.generate.images_per_round)
        await self._add_verdicts(round_, failed_verdicts(failed))
        all_again, judged = self.labeler.whole_rounds, round_.judged_ids
        left = [r for r in round_.records() if r.error is None and (all_again or r.id not in judged)]
        size = self.config.generate.batch_size
        return [Samples(left[start : start + size], round_.storage) for start in range(0, len(left), size)]

    async def _store_failed(self, round_: Round, failed: Sequence[Sample]) -> None:
        """Store what is no image, with its verdict.

        Failures past the limit are not stored: continued with another limit, or weights, the run draws them anew.
        """
        if failed:
            all_failed = {r.id for r in round_.records() if r.error is not None} | {sample.id for sample in failed}
            require_drawn(self.config, round_.stage, len(all_failed), self.config.generate.images_per_round)
            round_.know_samples(await asyncio.to_thread(write_part, round_.storage, failed))
            await self._add_verdicts(round_, failed_verdicts(failed))

    async def _add_verdicts(self, round_: Round, verdicts: Sequence[Verdict]) -> None:
        if new := round_.new_verdicts(verdicts):
            round_.know_verdicts(new)  # first: they are given once, and the wait for the rest may end at any moment
            for label, count in Counter(verdict.label for verdict in new).items():
                telemetry.VERDICTS.add(count, label=label)
            await asyncio.to_thread(round_.store_verdicts, new)

    async def _score(self, round_: Round, samples: Samples, store: Gathering[Score, Score]) -> None:
        """Score samples (again only what a crash left unscored), store the scores, and hand them to the labeler."""
        known = round_.known_scores(samples, self.config.label.scorers)
        await self.labeler.scored(round_.stage, known)
        async with contextlib.aclosing(self.scorers.score_each(samples, known)) as answers:
            async for scores in answers:
                round_.know_scores(await store(round_.new_scores(scores)))
                await self.labeler.scored(round_.stage, scores)
                images = self.config.generate.images_per_round
                require_scored(self.config.label, round_.stage, round_.failures, images)

    async def _collect(self, round_: Round, expected: int) -> None:
        """Store verdicts as they come, until every sample of the round has one."""
        while len(round_.judged_ids & round_.sample_ids) < expected:
            await self._add_verdicts(round_, await self.labeler.collect())

    async def _show(self, index: int, round_: Round, bars: Sequence[TaskID]) -> None:
        while True:
            there = self.config.generate.images_per_round
            for bar, ids, lacks in zip(
                bars, (round_.sample_ids, round_.scored_ids, round_.judged_ids), LACKING, strict=True
            ):
                done = len(ids & round_.sample_ids)
                self.progress.update(bar, completed=done)
                telemetry.WAITING.set(max(0, there - done), lacks=lacks)
                there = len(round_.sample_ids)  # what is not drawn waits for nothing else
            self.progress.update(bars[-1], description=f"round {index}: {self.labeler.status(round_.stage)}")
            await asyncio.sleep(SHOW_EVERY_S)

    async def seal(self, index: int, round_: Round, more: dict[str, Any]) -> None:
        """Close a round, with the figures of what is in it and `more`."""
        facts = await asyncio.to_thread(round_figures, index, round_)
        facts |= {**self.labeler.figures(round_.stage), **more, "labeler": dict(self.labeler.memory())}
        await asyncio.to_thread(round_.seal, **facts)


def round_figures(index: int, round_: Round) -> dict[str, Any]:
    """What a round's manifest says of it: policy, verdicts, scores, and what its pictures look like."""
    records = round_.records()
    looks = [record.look for record in records if record.error is None and record.look]
    failed = sum(record.error is not None for record in records)
    labels = Counter(verdict.label for verdict in round_.verdicts())
    return {
        "round": index,
        "policy_version": records[0].policy.version,
        "policy_lag_mean": sum(index - record.policy.version for record in records) / len(records),
        "desirable": labels["desirable"],
        "undesirable": labels["undesirable"],
        "abstained": labels["abstain"],
        "failed": labels["failed"],
        "pending": len(round_.sample_ids - round_.judged_ids),
        **score_figures(round_.scores()),
        **({"failed_draws": failed} if failed else {}),
        **(figures_of(looks) if looks else {}),
    }


def score_figures(scores: Sequence[Score]) -> dict[str, float]:
    """Mean and standard deviation of every scorer's scores, and how many it failed to give, if any."""
    figures: dict[str, float] = {}
    for name in sorted({score.scorer for score in scores}):
        values = [score.value for score in scores if score.scorer == name and score.value is not None]
        if values:
            figures |= {f"score/{name}": float(np.mean(values)), f"score_std/{name}": float(np.std(values))}
        if failed := sum(score.scorer == name and score.value is None for score in scores):
            figures[f"score_failed/{name}"] = failed
    return figures
