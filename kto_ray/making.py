"""Making one round: draw -> score -> label -> seal, as a stream, from wherever a crash left it.

`loop.py` says when, and with which policy; samples go to the labeler and the scorers as they are drawn, scores to the
labeler as they are found, and everything is stored before it counts.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from kto_ray.cluster import noisily
from kto_ray.concurrency import cancelled, together
from kto_ray.config import RunConfig
from kto_ray.evaluate.pictures import picture_figures
from kto_ray.generate.client import Generators
from kto_ray.generate.drawn import BY_DRAWING, failed_draws, failed_verdicts, require_drawn
from kto_ray.label.protocol import Labeler
from kto_ray.prompts import round_requests
from kto_ray.records import PolicyRef, Prompt, Sample, Score
from kto_ray.rounds import Round, RoundStore
from kto_ray.score.pool import Scorers, require_scored


class Making:
    """Makes rounds out of prompts, with the run's generators, scorers and labeler."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[Prompt],
        rounds: RoundStore,
        generators: Generators,
        scorers: Scorers,
        labeler: Labeler,
        progress: Progress,
    ) -> None:
        self.config, self.prompts, self.rounds = config, prompts, rounds
        self.generators, self.scorers, self.labeler, self.progress = generators, scorers, labeler, progress

    def memory(self) -> dict[str, Any]:
        """What the labeler kept with the last sealed round."""
        sealed = [round_ for round_ in self.rounds.rounds() if round_.sealed]
        memory: dict[str, Any] = sealed[-1].manifest["labeler"] if sealed else {}
        return memory

    async def make(self, index: int, round_: Round, policy: PolicyRef) -> None:
        """Draw, score, label and seal a round, from wherever a crash left it."""
        config = self.config
        images, deadline_s = config.generate.images_per_round, config.label.deadline_s
        requests = round_requests(
            self.prompts, config.seed, round_.stage, index, images, config.generate.images_per_prompt
        )
        began, before = time.monotonic(), (self.generators.busy_seconds, self.scorers.busy_seconds)
        stations = ("images", "scores", "verdicts")
        bars = [self.progress.add_task(f"round {index}: {what}", total=images) for what in stations]
        try:
            async with together() as group:
                collecting = group.create_task(self._collect(round_, images, bars))
                # What a crash left; verdicts that are there already stay.
                there = self._store(round_, round_.samples())
                left = [s for s in there if self.labeler.whole_rounds or s.id not in round_.judged_ids]
                await self.labeler.submit(left)
                size = config.generate.batch_size
                scoring = [
                    group.create_task(self._score(round_, left[start : start + size], bars))
                    for start in range(0, len(left), size)
                ]
                async with contextlib.aclosing(self.generators.stream(round_.missing(requests), policy)) as batches:
                    async for drawn_now in batches:
                        if samples := self._store(round_, drawn_now):
                            await self.labeler.submit(samples)
                            scoring.append(group.create_task(self._score(round_, samples, bars)))
                        self._show(round_, bars)
                drawn = time.monotonic()
                if round_.sample_ids <= round_.judged_ids and not collecting.done():
                    # It waits for a last verdict, which a failed draw has made unnecessary.
                    await cancelled([collecting])
                    collecting = group.create_task(self._collect(round_, images, bars))

                def awaited() -> str:
                    is_scored = all(task.done() for task in scoring)
                    return f"{self.labeler.status(round_.stage) if is_scored else 'scores'} on round {index}"

                async with noisily(awaited, config.cluster):
                    with contextlib.suppress(TimeoutError):  # then the scores that are there have to do
                        async with asyncio.timeout(deadline_s):
                            await asyncio.gather(*scoring)
                    await self.labeler.finish(round_.stage)
                    enough = group.create_task(self.labeler.enough(round_.stage))
                    showing = group.create_task(self._show_status(index, round_.stage, bars[-1]))
                    # Past the deadline there is still a moment for what the labeler can say at once.
                    left_s = deadline_s and max(1.0, drawn + deadline_s - time.monotonic())
                    await asyncio.wait({collecting, enough}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                    await cancelled([collecting, enough])
                    round_.add_verdicts(await self.labeler.seal(round_.stage))
                    showing.cancel()
        finally:
            for bar in bars:
                self.progress.remove_task(bar)
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
            },
        )

    def _store(self, round_: Round, samples: Sequence[Sample]) -> list[Sample]:
        """Store what was drawn, with a verdict on what is no image; gives the images.

        Failures past the limit are not stored: continued with another limit, or weights, the run draws them anew.
        """
        if failed := failed_draws(samples):
            before = {verdict.sample_id for verdict in round_.verdicts() if verdict.labeler == BY_DRAWING}
            all_failed, images = before | {sample.id for sample in failed}, self.config.generate.images_per_round
            round_.add_samples([sample for sample in samples if sample.error is None])
            require_drawn(self.config, round_.stage, len(all_failed), images)
        round_.add_samples(samples)
        round_.add_verdicts(failed_verdicts(failed))
        return [sample for sample in samples if sample.error is None]

    async def _score(self, round_: Round, samples: Sequence[Sample], bars: Sequence[TaskID]) -> None:
        """Score samples (again only what a crash left unscored), store the scores, and hand them to the labeler."""
        ids = {sample.id for sample in samples}
        stored = round_.scores() if ids & round_.scored_ids else []
        known = [score for score in stored if score.sample_id in ids and score.value is not None]
        await self.labeler.scored(round_.stage, known)
        async with contextlib.aclosing(self.scorers.score_each(samples, known)) as answers:
            async for scores in answers:
                round_.add_scores(scores)
                await self.labeler.scored(round_.stage, scores)
                self._show(round_, bars)
                images = self.config.generate.images_per_round
                require_scored(self.config.label, round_.stage, round_.failures, images)

    async def _collect(self, round_: Round, expected: int, bars: Sequence[TaskID]) -> None:
        """Store verdicts as they come, until every sample of the round has one."""
        while len(round_.judged_ids & round_.sample_ids) < expected:
            round_.add_verdicts(await self.labeler.collect())
            self._show(round_, bars)

    def _show(self, round_: Round, bars: Sequence[TaskID]) -> None:
        for bar, ids in zip(bars, (round_.sample_ids, round_.scored_ids, round_.judged_ids), strict=True):
            self.progress.update(bar, completed=len(ids & round_.sample_ids))

    async def _show_status(self, index: int, stage: str, bar: TaskID) -> None:
        while True:
            self.progress.update(bar, description=f"round {index}: {self.labeler.status(stage)}")
            await asyncio.sleep(1)

    async def seal(self, index: int, round_: Round, more: dict[str, Any]) -> None:
        """Close a round, with the figures of what is in it and `more`."""
        samples = round_.samples()
        pictures = [sample.pixels_HWC for sample in samples if sample.error is None]
        failed = len(samples) - len(pictures)
        labels = Counter(verdict.label for verdict in round_.verdicts())
        facts = {
            "round": index,
            "policy_version": samples[0].policy.version,
            "policy_lag_mean": sum(index - sample.policy.version for sample in samples) / len(samples),
            "desirable": labels["desirable"],
            "undesirable": labels["undesirable"],
            "abstained": labels["abstain"],
            "failed": labels["failed"],
            "pending": len(round_.sample_ids - round_.judged_ids),
            **score_figures(round_.scores()),
            **({"failed_draws": failed} if failed else {}),
            **(await asyncio.to_thread(picture_figures, np.stack(pictures)) if pictures else {}),
            **self.labeler.figures(round_.stage),
            **more,
        }
        round_.seal(**facts, labeler=dict(self.labeler.memory()))


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
