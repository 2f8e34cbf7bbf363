"""The built-in labeler: turns the scores of a whole round into verdicts, by the rule that the configuration names."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kto_ray.config import Labeling
from kto_ray.label.judging import BY_THRESHOLD, RoundVerdicts, judge_round
from kto_ray.label.protocol import Labeler
from kto_ray.records import Score, Verdict
from kto_ray.samples import Samples
from kto_ray.verdicts.rule import RuleFit

logger = logging.getLogger(__name__)


@dataclass
class _Scored:
    """Samples of a round that wait for its end: prompt ids and scores by sample id."""

    prompts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)


class ThresholdLabeler(Labeler):
    """Waits for the round's last score, since most thresholds need them all, and judges; see `Labeler`."""

    name = BY_THRESHOLD
    whole_rounds = True

    def __init__(self, config: Labeling) -> None:
        self.config = config
        self._rounds: dict[str, _Scored] = {}
        self._verdicts: asyncio.Queue[Sequence[Verdict]] = asyncio.Queue()
        self._last: RuleFit | None = None
        self._figures: dict[str, dict[str, float]] = {}

    async def start(self, memory: Mapping[str, Any]) -> None:
        self._last = RuleFit.from_json(memory["fit"]) if memory else None

    async def submit(self, samples: Samples) -> None:
        for sample in samples:
            self._rounds.setdefault(sample.stage, _Scored()).prompts[sample.id] = sample.prompt.id

    async def scored(self, stage: str, scores: Sequence[Score]) -> None:
        for score in scores:
            self._rounds[stage].scores.setdefault(score.sample_id, {})[score.scorer] = score

    async def finish(self, stage: str) -> None:
        judged = self.judge(stage)
        if judged is not None:
            self._verdicts.put_nowait(judged.verdicts)

    def judge(self, stage: str) -> RoundVerdicts | None:
        """Judge all samples of a round that were submitted; None: there are none.

        That happens when a crash came between the round's verdicts and its seal.
        """
        scored = self._rounds.pop(stage, None)
        if scored is None:
            return None
        # The order in which samples arrive is chance.
        prompts = {sample_id: scored.prompts[sample_id] for sample_id in sorted(scored.prompts)}
        judged = judge_round(self.config, scored.scores, prompts, self._last)
        self._last, self._figures[stage] = judged.fit, judged.figures
        return judged

    async def collect(self) -> Sequence[Verdict]:
        return await self._verdicts.get()

    def figures(self, stage: str) -> Mapping[str, float]:
        return self._figures.pop(stage, {})

    def memory(self) -> Mapping[str, Any]:
        return {"fit": self._last.to_json()} if self._last else {}
