"""The rule by which the scores of one or several scorers become one verdict a sample.

`VerdictRule` joins the thresholds (`thresholds.py`) of all scorers that vote; `label/judging.py` judges rounds with it,
`relabel.py` old rounds anew, and `evaluate/` held-out images by the cuts fitted to the base policy's.

Shape suffixes: N samples; S scorers that vote.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from kto_ray.records import Label
from kto_ray.verdicts.thresholds import (
    EVERY,
    NOTHING,
    Agreement,
    BaseThreshold,
    Fit,
    Floats,
    Majority,
    WeightedSum,
    level,
    moments,
    split,
)

SUM = ""
"""In the place of a scorer's name: the weighted sum of all."""


@dataclass(frozen=True)
class Voter:
    """A scorer whose scores make verdicts: the name they are stored under, and its part in the combination."""

    name: str
    weight: float = 1
    mean: float = 0
    std: float = 1
    threshold: BaseThreshold | None = None


@dataclass(frozen=True)
class ScoreTable:
    """The scores that a rule judges: NaN for one that failed or is not there."""

    values_SN: Floats
    prompts_N: Sequence[str]


@dataclass(frozen=True)
class RuleFit:
    """A rule as fitted to a round: the moments that each scorer is calibrated by, and the fit of each threshold."""

    calibration: Mapping[str, Mapping[str, float]]
    fits: Mapping[str, Fit]
    widened: bool = False

    def judges(self, prompt: str) -> bool:
        return all(fit.cut(prompt) for fit in self.fits.values())

    @property
    def same_for_every_prompt(self) -> bool:
        return self.judges(EVERY)

    def scale(self, scorer: str) -> tuple[float, float]:
        """Mean and std; a std of 0, of scores that are all the same, does not divide."""
        found = self.calibration[scorer]
        return found.get("mean", 0.0), found.get("std") or 1.0

    def to_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = TypeAdapter(RuleFit).dump_python(self, mode="json")
        return tree

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "RuleFit":
        return TypeAdapter(RuleFit).validate_python(tree)


@dataclass(frozen=True)
class Judgement:
    """What a rule says of N samples: a label each, and the value it was found by (the sum, or the share of yes)."""

    labels: list[Label]
    values_N: Floats
    rules: list[str]


LABEL_OF: dict[int, Label] = {1: "desirable", -1: "undesirable", 0: "abstain"}


class VerdictRule:
    """One verdict from the scores of one or several scorers.

    Args:
        voters: the scorers; in a `ScoreTable` their rows have this order.
        combine: how they become one.
        threshold: of the sum, or of every voter that has none of its own.
    """

    def __init__(
        self, voters: Sequence[Voter], combine: WeightedSum | Agreement | Majority, threshold: BaseThreshold
    ) -> None:
        self.voters, self.combine, self.threshold = list(voters), combine, threshold

    def _rows(self, table: ScoreTable, widened: bool = False) -> Iterator[tuple[Voter, Floats]]:
        """Scores by voter. What judges images by each other does not see differences that are only rounding."""
        calibrated = isinstance(self.combine, WeightedSum) and self.combine.calibration != "fixed"
        for voter, values_N in zip(self.voters, table.values_SN, strict=True):
            compares = (voter.threshold or self.threshold).compares
            judged_N = level(values_N) if compares != "nothing" or calibrated or widened else values_N
            yield voter, level(judged_N, table.prompts_N) if compares == "prompt" else judged_N

    def fit(self, table: ScoreTable, last: RuleFit | None = None) -> RuleFit:
        """Fit to a round, after `last`, the fit of the round before."""

        def fitted(name: str, threshold: BaseThreshold, values_N: Floats) -> Fit:
            return threshold.fit(values_N, table.prompts_N, last.fits[name].memory if last else NOTHING)

        calibration = {voter.name: self._moments(voter, values_N, last) for voter, values_N in self._rows(table)}
        if isinstance(self.combine, WeightedSum):
            sum_N = self._sum(table, RuleFit(calibration, {}))
            return RuleFit(calibration, {SUM: fitted(SUM, self.threshold, sum_N)})
        return RuleFit(
            calibration,
            {
                voter.name: fitted(voter.name, voter.threshold or self.threshold, values_N)
                for voter, values_N in self._rows(table)
            },
        )

    def _moments(self, voter: Voter, values_N: Floats, last: RuleFit | None) -> Mapping[str, float]:
        # Votes are not summed up, except to widen.
        how = self.combine if isinstance(self.combine, WeightedSum) else WeightedSum(calibration="round")
        if how.calibration == "fixed":
            return {"mean": voter.mean, "std": voter.std}
        before = last.calibration[voter.name] if last and how.calibration == "running" else NOTHING
        return moments(values_N, before, how.decay)

    def _sum(self, table: ScoreTable, fit: RuleFit) -> Floats:
        total_N = np.zeros(len(table.prompts_N))
        for voter, values_N in self._rows(table, fit.widened):
            mean, std = fit.scale(voter.name)
            total_N += voter.weight * (values_N - mean) / std
        return total_N

    def judge(self, table: ScoreTable, fit: RuleFit) -> Judgement:
        """Judge by the cuts of `fit`; a sample without every voter's score has failed."""
        failed_N = np.asarray(np.isnan(table.values_SN).any(axis=0))
        if SUM in fit.fits:
            values_N = self._sum(table, fit)
            votes_N = fit.fits[SUM].votes(values_N, table.prompts_N)
        else:
            votes_SN = np.stack(
                [fit.fits[voter.name].votes(values_N, table.prompts_N) for voter, values_N in self._rows(table)]
            )
            values_N = np.where(failed_N, np.nan, (votes_SN > 0).mean(axis=0))
            lead_N = votes_SN.sum(axis=0)
            needed = len(self.voters) if isinstance(self.combine, Agreement) else 1
            votes_N = np.where(np.abs(lead_N) >= needed, np.sign(lead_N), 0)
        labels: list[Label] = [
            "failed" if failed else LABEL_OF[int(vote)] for failed, vote in zip(failed_N, votes_N, strict=True)
        ]
        texts = {prompt: self.describe(fit, prompt) for prompt in set(table.prompts_N)}
        return Judgement(labels, values_N, [texts[prompt] for prompt in table.prompts_N])

    def margins(self, table: ScoreTable, fit: RuleFit) -> Floats:
        """How far each sample is from being judged otherwise: 0 on the fence; NaN for one that has failed.

        Of a sum, its distance to the middle of the cut; of votes, how far the share of yes is from one half.
        """
        values_N = self.judge(table, fit).values_N
        if SUM not in fit.fits:
            return np.abs(values_N - 0.5)
        cuts_N = [fit.fits[SUM].cut(prompt) for prompt in table.prompts_N]
        middles_N = np.array([np.nan if cut is None else sum(cut) / 2 for cut in cuts_N])
        distances_N: Floats = np.abs(values_N - middles_N)
        return distances_N

    def widened(self, table: ScoreTable, fit: RuleFit) -> RuleFit | None:
        """A stopgap with both classes: the median of the calibrated sum replaces whatever the thresholds say.

        None when even that finds one class only, because all samples score the same. The next round does not start
        from it, but from the rule's own fit.
        """
        widened = replace(fit, widened=True)
        cut = split(self._sum(table, widened), 0.5, 0.5)
        return replace(widened, fits={SUM: Fit.to_all(cut)}) if cut else None

    def flip_rate(self, table: ScoreTable, fit: RuleFit, last: RuleFit) -> float | None:
        """Share of the samples that the last round's cuts would have judged otherwise; None if they judge none."""
        now, then = self.judge(table, fit).labels, self.judge(table, last).labels
        flips = [
            a != b
            for a, b, prompt in zip(now, then, table.prompts_N, strict=True)
            if a != "failed" and last.judges(prompt)
        ]
        return sum(flips) / len(flips) if flips else None

    def describe(self, fit: RuleFit, prompt: str = EVERY) -> str:
        """The rule in words, with its version, parameters and cuts, as every verdict carries it."""

        def judged(threshold: object, what: str, name: str) -> str:
            cut = fit.fits[name].cut(prompt)
            if cut is None:
                return f"{threshold}: {what}: no cut"
            low, high = cut
            return f"{threshold}: {what} >= {high:.6g}" + (f", <= {low:.6g}" if low < high else "")

        if SUM in fit.fits:
            what = " + ".join(self._term(voter, fit) for voter in self.voters)
            text = judged("widened@1(to=median)" if fit.widened else self.threshold, what, SUM)
            plain = fit.widened or (len(self.voters) == 1 and self.combine == WeightedSum())
            return text if plain else f"{self.combine}[{text}]"
        votes = "; ".join(judged(voter.threshold or self.threshold, voter.name, voter.name) for voter in self.voters)
        return f"{self.combine}[{votes}]"

    def _term(self, voter: Voter, fit: RuleFit) -> str:
        mean, std = fit.scale(voter.name)
        weight = f"{voter.weight:g} " if voter.weight != 1 else ""
        return weight + (voter.name if (mean, std) == (0, 1) else f"({voter.name} - {mean:.6g}) / {std:.6g}")
