"""From scores to verdicts: thresholds and combinations, as parts of the configuration that know how to judge.

A threshold is *fitted* to the scores of a round, which gives its cuts, and judges by them. `VerdictRule` joins the
thresholds of one or several scorers into one verdict a sample; `threshold_labeler.py` judges rounds with it,
`relabel.py` old rounds anew, and `evaluate/` held-out images by the cuts fitted to the base policy's.

Each threshold and combination has a version, which goes up when the same parameters would judge otherwise than before;
it is written into every verdict with the parameters.

Shape suffixes: N samples; S scorers that vote.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from kto_ray.records import Label
from kto_ray.section import InnerShare, NonNegative, Section, Share

Floats = npt.NDArray[np.float64]
Cut = tuple[float, float]
"""Undesirable up to the first value, desirable from the second on, abstain between."""

EVERY = ""
"""In the place of a prompt id: every prompt."""
SUM = ""
"""In the place of a scorer's name: the weighted sum of all."""
NEVER: Cut = (-np.inf, np.inf)
NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True)
class Fit:
    """A threshold as it came out for one round: cuts by prompt id, and the figures that the next fit starts from."""

    cuts: Mapping[str, Cut]
    memory: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def to_all(cls, cut: Cut | None, memory: Mapping[str, float] = NOTHING) -> "Fit":
        """The same cut for every prompt; None: nothing can be judged."""
        return cls({EVERY: cut} if cut else {}, memory)

    def cut(self, prompt: str) -> Cut | None:
        """None: the prompt is not judged."""
        return self.cuts.get(prompt, self.cuts.get(EVERY))

    def votes(self, values_N: Floats, prompts_N: Sequence[str]) -> npt.NDArray[np.int64]:
        """1 for desirable, -1 for undesirable, 0 for neither, as for NaN."""
        low_N, high_N = np.array([self.cut(prompt) or NEVER for prompt in prompts_N]).reshape(-1, 2).T
        return np.where(values_N >= high_N, 1, np.where(values_N <= low_N, -1, 0))


def split(values_N: Floats, low: float, high: float) -> Cut | None:
    """The cut with nearest to a share `low` of the scores up to its first value and nearest to `high` below its second.

    Equal scores stay together, and at least one is left on either side; None when all are equal. NaN does not count.
    """
    scored_N = values_N[~np.isnan(values_N)]
    values, counts = np.unique(scored_N, return_counts=True)
    if len(values) < 2:
        return None
    below = counts.cumsum()[:-1]  # scores up to values[i], which are those below values[i + 1]
    # Rounded, since 1 - 0.7 is not quite 0.3.
    first, second = (int(np.abs(below - round(share * len(scored_N), 6)).argmin()) for share in (low, high))
    desirable = float(values[second + 1])
    return (float(values[first]) if first < second else desirable), desirable


def moments(values_N: Floats, before: Mapping[str, float] = NOTHING, decay: float = 0) -> Mapping[str, float]:
    """Mean and standard deviation ("mean", "std") of the scores; {} when there is none.

    With the moments of `before`, mean and variance are exponential moving averages: decay x before + (1 - decay) x now.
    """
    scored_N = values_N[~np.isnan(values_N)]
    if not len(scored_N):
        return before
    # The mean of equal scores is theirs to the last bit, so that their variance is 0 and not a rounding error.
    mean = float(np.clip(scored_N.mean(), scored_N.min(), scored_N.max()))
    variance = float(np.square(scored_N - mean).mean())
    if before:
        mean = decay * before["mean"] + (1 - decay) * mean
        variance = decay * before["std"] ** 2 + (1 - decay) * variance
    return {"mean": mean, "std": variance**0.5}


class _Versioned(Section):
    version: ClassVar[str] = "1"
    kind: str

    def __str__(self) -> str:
        parameters = ", ".join(
            f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}"
            for name, value in self
            if name != "kind"
        )
        return f"{self.kind}@{self.version}" + (f"({parameters})" if parameters else "")


class _Threshold(_Versioned):
    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        """Find the cuts for these scores (NaN for a failed one); `memory` is that of the last round's fit."""
        raise NotImplementedError


class Absolute(_Threshold):
    """Desirable from `value` on."""

    kind: Literal["absolute"] = "absolute"
    value: float
    dead_band: NonNegative = 0
    """Scores closer to `value` than this abstain."""

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        return Fit.to_all((self.value - self.dead_band, self.value + self.dead_band))


class _Quantile(_Threshold):
    quantile: InnerShare = 0.5
    """Share of the samples below the cut, as nearly as ties allow; there is always one below and one above."""
    dead_band: Annotated[float, Field(ge=0, lt=0.5)] = 0
    """So large a share of the samples abstains on either side of the cut."""

    def split(self, values_N: Floats) -> Cut | None:
        return split(values_N, self.quantile - self.dead_band, self.quantile + self.dead_band)


class RoundQuantile(_Quantile):
    """Desirable are the best of each round: as many every time, however good the policy has become.

    A round whose images all score the same is not judged.
    """

    kind: Literal["round_quantile"] = "round_quantile"

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        return Fit.to_all(self.split(values_N))


class PromptQuantile(_Quantile):
    """Desirable are the best of each prompt, so that easy prompts do not take all the praise.

    Needs `generate.images_per_prompt` of 2 or more. A prompt whose images all score the same is not judged.
    """

    kind: Literal["prompt_quantile"] = "prompt_quantile"

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        by_prompt: dict[str, list[float]] = {}
        for prompt, value in zip(prompts_N, values_N, strict=True):
            by_prompt.setdefault(prompt, []).append(value)
        cuts = {prompt: self.split(np.array(values)) for prompt, values in by_prompt.items()}
        return Fit({prompt: cut for prompt, cut in cuts.items() if cut})


class TopBottom(_Threshold):
    """Desirable is the top of each round, undesirable its bottom; the middle abstains."""

    kind: Literal["top_bottom"] = "top_bottom"
    top: InnerShare = 0.5
    bottom: InnerShare = 0.5

    @model_validator(mode="after")
    def _shares_fit(self) -> "TopBottom":
        if self.top + self.bottom > 1:
            raise ValueError(f"top ({self.top:g}) and bottom ({self.bottom:g}) together must not be more than 1")
        return self

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        return Fit.to_all(split(values_N, self.bottom, 1 - self.top))


class RunningMean(_Threshold):
    """Desirable is what lies `z` standard deviations above the running mean of the rounds so far.

    Mean and variance are exponential moving averages over rounds; the first round starts them.
    """

    kind: Literal["running_mean"] = "running_mean"
    z: float = 0
    decay: Share = 0.9
    """Weight of the past in the averages; 0 forgets it."""
    dead_band: NonNegative = 0
    """In standard deviations around `z`."""

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        now = moments(values_N, memory, self.decay)
        if not now:
            return Fit({})
        low, high = (now["mean"] + z * now["std"] for z in (self.z - self.dead_band, self.z + self.dead_band))
        return Fit.to_all((low, high), now)


def as_threshold(value: Any) -> Any:
    """A bare number is an absolute threshold, as is a mapping that names no kind; a bare word is a kind."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"kind": "absolute", "value": value}
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "absolute", **value} if isinstance(value, dict) else value


Threshold = Annotated[
    Annotated[Absolute | RoundQuantile | PromptQuantile | TopBottom | RunningMean, Field(discriminator="kind")],
    BeforeValidator(as_threshold),
]
"""A number, a kind, or {kind: absolute | round_quantile | prompt_quantile | top_bottom | running_mean, ...}."""


class WeightedSum(_Versioned):
    """One score, sum of weight x (score - mean) / std over the scorers, under `label.threshold`."""

    kind: Literal["weighted_sum"] = "weighted_sum"
    calibration: Literal["fixed", "round", "running"] = "fixed"
    """Where mean and std come from: each scorer's own `mean` and `std`, the round, or the rounds so far."""
    decay: Share = 0.9
    """Of running averages."""


class Agreement(_Versioned):
    """Every scorer votes by its own threshold (else `label.threshold`); without unanimity a sample abstains."""

    kind: Literal["agreement"] = "agreement"


class Majority(_Versioned):
    """Every scorer votes by its own threshold (else `label.threshold`); a tie abstains. Abstentions do not count."""

    kind: Literal["majority"] = "majority"


def as_combination(value: Any) -> Any:
    """A bare word is a kind; a mapping that names none is a weighted sum."""
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "weighted_sum", **value} if isinstance(value, dict) else value


Combination = Annotated[
    Annotated[WeightedSum | Agreement | Majority, Field(discriminator="kind")],
    BeforeValidator(as_combination),
]
"""A kind, or {kind: weighted_sum | agreement | majority, ...}."""


@dataclass(frozen=True)
class Voter:
    """A scorer whose scores make verdicts: the name they are stored under, and its part in the combination."""

    name: str
    weight: float = 1
    mean: float = 0
    std: float = 1
    threshold: _Threshold | None = None


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
class Judged:
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
        self, voters: Sequence[Voter], combine: WeightedSum | Agreement | Majority, threshold: _Threshold
    ) -> None:
        self.voters, self.combine, self.threshold = list(voters), combine, threshold

    def _rows(self, table: ScoreTable) -> Iterator[tuple[Voter, Floats]]:
        return zip(self.voters, table.values_SN, strict=True)

    def fit(self, table: ScoreTable, last: RuleFit | None = None) -> RuleFit:
        """Fit to a round, after `last`, the fit of the round before."""

        def fitted(name: str, threshold: _Threshold, values_N: Floats) -> Fit:
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
        for voter, values_N in self._rows(table):
            mean, std = fit.scale(voter.name)
            total_N += voter.weight * (values_N - mean) / std
        return total_N

    def judge(self, table: ScoreTable, fit: RuleFit) -> Judged:
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
        return Judged(labels, values_N, [texts[prompt] for prompt in table.prompts_N])

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
        cut = split(self._sum(table, fit), 0.5, 0.5)
        return replace(fit, fits={SUM: Fit.to_all(cut)}, widened=True) if cut else None

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
