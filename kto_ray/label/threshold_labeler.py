"""The built-in labeler: turns the scores of a whole round into verdicts, by the rule that the configuration names."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kto_ray.config import Label
from kto_ray.label.protocol import Labeler
from kto_ray.label.thresholds import EVERY, SUM, RuleFit, ScoreTable, VerdictRule, Voter
from kto_ray.records import Label as VerdictLabel
from kto_ray.records import Sample, Score, Verdict

logger = logging.getLogger(__name__)


@dataclass
class _Scored:
    """Samples of a round that wait for its end: prompt ids and voters' scores by sample id."""

    prompts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundVerdicts:
    """A judged round: its verdicts in the order of the samples, its fit, and what to log of it."""

    verdicts: list[Verdict]
    margins: dict[str, float]
    """How far each sample is from another verdict, by its id; see `VerdictRule.margins`."""
    fit: RuleFit
    figures: dict[str, float]


def rule_of(config: Label) -> VerdictRule:
    """The rule of `label.scorers` (those not held out), `label.combine` and `label.threshold`."""
    voters = [Voter(name, s.weight, s.mean, s.std, s.threshold) for name, s in config.voting.items()]
    return VerdictRule(voters, config.combine, config.threshold)


def table_of(rule: VerdictRule, scores: Mapping[str, Mapping[str, Score]], prompts: Mapping[str, str]) -> ScoreTable:
    """The table of the samples in `prompts` (sample id -> prompt id), in that order."""

    def value(sample_id: str, scorer: str) -> float:
        score = scores.get(sample_id, {}).get(scorer)
        return np.nan if score is None or score.value is None else score.value

    values_SN = np.array([[value(sample_id, voter.name) for sample_id in prompts] for voter in rule.voters], np.float64)
    return ScoreTable(values_SN.reshape(len(rule.voters), len(prompts)), list(prompts.values()))


def judge_round(
    config: Label, scores: Mapping[str, Mapping[str, Score]], prompts: Mapping[str, str], last: RuleFit | None
) -> RoundVerdicts:
    """Fit the rule to a round's scores and judge each sample; widens where the configuration says so.

    Args:
        scores: by sample id and scorer; a missing or failed score makes its sample "failed".
        prompts: prompt id by sample id.
        last: the fit of the round before.
    """
    rule = rule_of(config)
    table = table_of(rule, scores, prompts)
    fit = rule.fit(table, last)
    judged = rule.judge(table, fit)
    figures = {f"threshold/{name or 'sum'}": f.cuts[EVERY][1] for name, f in fit.fits.items() if EVERY in f.cuts}
    if config.on_one_class == "widen" and one_sided(config, Counter(judged.labels)):
        widened = rule.widened(table, fit)
        if widened is not None:
            judged = rule.judge(table, widened)
            figures["threshold/widened"] = widened.fits[SUM].cuts[EVERY][1]
    if not np.isnan(judged.values_N).all():
        figures["score_mean"] = float(np.nanmean(judged.values_N))
    if last is not None and (flipped := rule.flip_rate(table, fit, last)) is not None:
        figures["flip_rate"] = flipped
    verdicts = [
        Verdict(
            *(sample_id, label, ThresholdLabeler.name),
            rule=_failures(rule, scores.get(sample_id, {})) if label == "failed" else text,
        )
        for sample_id, label, text in zip(prompts, judged.labels, judged.rules, strict=True)
    ]
    margins = dict(zip(prompts, rule.margins(table, fit).tolist(), strict=True))
    return RoundVerdicts(verdicts, margins, fit, figures)


def _failures(rule: VerdictRule, scores: Mapping[str, Score]) -> str:
    """Whose scores are missing, and why."""
    missing = {voter.name: scores.get(voter.name) for voter in rule.voters}
    return "; ".join(
        f"no score of {name}: {score.error if score else 'not scored'}"
        for name, score in missing.items()
        if score is None or score.value is None
    )


def one_sided(config: Label, labels: Mapping[VerdictLabel, int]) -> bool:
    """Whether there are yes or no only, or fewer of both together than `label.min_verdicts`."""
    yes, no = labels.get("desirable", 0), labels.get("undesirable", 0)
    return not yes or not no or yes + no < config.min_verdicts


class ThresholdLabeler(Labeler):
    """Waits for the round's last score, since most thresholds need them all, and judges; see `Labeler`."""

    name = "threshold"
    whole_rounds = True

    def __init__(self, config: Label) -> None:
        self.config = config
        self._rounds: dict[str, _Scored] = {}
        self._verdicts: asyncio.Queue[Sequence[Verdict]] = asyncio.Queue()
        self._last: RuleFit | None = None
        self._figures: dict[str, dict[str, float]] = {}

    async def start(self, memory: Mapping[str, Any]) -> None:
        self._last = RuleFit.from_json(memory["fit"]) if memory else None

    async def submit(self, samples: Sequence[Sample], scores: Sequence[Score] = ()) -> None:
        for sample in samples:
            self._rounds.setdefault(sample.stage, _Scored()).prompts[sample.id] = sample.prompt.id
        stage_of = {sample.id: sample.stage for sample in samples}
        for score in scores:
            self._rounds[stage_of[score.sample_id]].scores.setdefault(score.sample_id, {})[score.scorer] = score

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
