"""From scores to verdicts: thresholds and combinations, as parts of the configuration that know how to judge.

A threshold is *fitted* to the scores of a round, which gives its cuts, and judges by them. `VerdictRule` joins the
thresholds of one or several scorers into one verdict a sample; `threshold_labeler.py` judges rounds with it,
`relabel.py` old rounds anew, and `evaluate/` held-out images by the cuts fitted to the base policy's.

Each threshold and combination has a version, which goes up when the same parameters would judge otherwise than before;
it is written into every verdict with the parameters.

Shape suffixes: N samples; S scorers that vote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from kto_ray.identity import Fixed
from kto_ray.section import InnerShare, NonNegative, Section, Share

Floats = npt.NDArray[np.float64]
Cut = tuple[float, float]
"""Undesirable up to the first value, desirable from the second on, abstain between."""

EVERY = ""
"""In the place of a prompt id: every prompt."""
NEVER: Cut = (-np.inf, np.inf)
NOTHING: Mapping[str, float] = {}
LEAST_SPREAD = 1e-6
"""Scores that differ by less, as a share of the largest of them, are the same: float32 rounds at 1e-7, and a batch of
another size or order adds up in another order."""


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


def level(values_N: Floats, prompts_N: Sequence[str] | None = None) -> Floats:
    """The scores, without what is only rounding: where all (of a prompt) are the same, their middle stands for each.

    "The same" is by `LEAST_SPREAD`. Whatever else stays as it is, to the last bit, and so does NaN.
    """
    places: dict[str, list[int]] = {}
    for place in np.flatnonzero(~np.isnan(values_N)).tolist():
        places.setdefault(prompts_N[place] if prompts_N is not None else EVERY, []).append(place)
    levelled_N = values_N.copy()
    for group in places.values():
        low, high = values_N[group].min(), values_N[group].max()
        if high - low <= LEAST_SPREAD * max(abs(low), abs(high)):
            levelled_N[group] = low + (high - low) / 2
    return levelled_N


def moments(values_N: Floats, before: Mapping[str, float] = NOTHING, decay: float = 0) -> Mapping[str, float]:
    """Mean and standard deviation ("mean", "std") of the scores; {} when there is none.

    With the moments of `before`, mean and variance are exponential moving averages: decay x before + (1 - decay) x now.
    """
    scored_N = level(values_N[~np.isnan(values_N)])
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


class BaseThreshold(_Versioned):
    """What every kind of threshold is: parameters that can be fitted to scores."""

    compares: ClassVar[Literal["nothing", "round", "prompt"]] = "round"
    """Which samples it judges by each other, and must not tell apart by what is only rounding."""

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        """Find the cuts for these scores (NaN for a failed one); `memory` is that of the last round's fit."""
        raise NotImplementedError


class Absolute(BaseThreshold):
    """Desirable from `value` on."""

    compares = "nothing"
    kind: Literal["absolute"] = "absolute"
    value: Fixed[float]
    """The cut."""
    dead_band: Fixed[NonNegative] = 0
    """Scores closer to `value` than this abstain."""

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        return Fit.to_all((self.value - self.dead_band, self.value + self.dead_band))


class _Quantile(BaseThreshold):
    quantile: Fixed[InnerShare] = 0.5
    """Share of the samples below the cut, as nearly as ties allow; there is always one below and one above."""
    dead_band: Fixed[Annotated[float, Field(ge=0, lt=0.5)]] = 0
    """So large a share of the samples abstains on either side of the cut."""

    def split(self, values_N: Floats) -> Cut | None:
        return split(values_N, self.quantile - self.dead_band, self.quantile + self.dead_band)


class RoundQuantile(_Quantile):
    """Desirable are the best of each round: as many every time, however good the policy has become.

    A round whose images all score the same (but for rounding) is not judged.
    """

    version = "2"
    kind: Literal["round_quantile"] = "round_quantile"

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        return Fit.to_all(self.split(values_N))


class PromptQuantile(_Quantile):
    """Desirable are the best of each prompt, so that easy prompts do not take all the praise.

    Needs `generate.images_per_prompt` of 2 or more. A prompt whose images all score the same (but for rounding)
    is not judged.
    """

    version = "2"
    compares = "prompt"
    kind: Literal["prompt_quantile"] = "prompt_quantile"

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        by_prompt: dict[str, list[float]] = {}
        for prompt, value in zip(prompts_N, values_N, strict=True):
            by_prompt.setdefault(prompt, []).append(value)
        cuts = {prompt: self.split(np.array(values)) for prompt, values in by_prompt.items()}
        return Fit({prompt: cut for prompt, cut in cuts.items() if cut})


class TopBottom(BaseThreshold):
    """Desirable is the top of each round, undesirable its bottom; the middle abstains."""

    version = "2"
    kind: Literal["top_bottom"] = "top_bottom"
    top: Fixed[InnerShare] = 0.5
    """Share of a round that is desirable."""
    bottom: Fixed[InnerShare] = 0.5
    """Share of a round that is undesirable."""

    @model_validator(mode="after")
    def _shares_fit(self) -> "TopBottom":
        if self.top + self.bottom > 1:
            raise ValueError(f"top ({self.top:g}) and bottom ({self.bottom:g}) together must not be more than 1")
        return self

    def fit(self, values_N: Floats, prompts_N: Sequence[str], memory: Mapping[str, float] = NOTHING) -> Fit:
        return Fit.to_all(split(values_N, self.bottom, 1 - self.top))


class RunningMean(BaseThreshold):
    """Desirable is what lies `z` standard deviations above the running mean of the rounds so far.

    Mean and variance are exponential moving averages over rounds; the first round starts them.
    """

    version = "2"
    kind: Literal["running_mean"] = "running_mean"
    z: Fixed[float] = 0
    """Standard deviations above the mean where the cut lies."""
    decay: Fixed[Share] = 0.9
    """Weight of the past in the averages; 0 forgets it."""
    dead_band: Fixed[NonNegative] = 0
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

    version = "2"
    kind: Literal["weighted_sum"] = "weighted_sum"
    calibration: Fixed[Literal["fixed", "round", "running"]] = "fixed"
    """Where mean and std come from: each scorer's own `mean` and `std`, the round, or the rounds so far."""
    decay: Fixed[Share] = 0.9
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
