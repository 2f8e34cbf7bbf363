"""What the configuration says of scorers and labelers: `label`. `score/` and `label/` go by it."""
# ruff: noqa: RUF012  pydantic copies mutable defaults

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kto_ray.config.feedback import Feedback
from kto_ray.config.machines import Resources
from kto_ray.config.people import Human, RouteAll, RouteDisagreement
from kto_ray.config.watching import HackingWatch, as_watch
from kto_ray.identity import Fixed, Free, Noted
from kto_ray.section import Count, Positive, Section, Share
from kto_ray.verdicts.thresholds import Absolute, Combination, Threshold, WeightedSum


class ScorerPoolSettings(Section):
    """A scorer, and the pool of actors that run it."""

    scorer: Fixed[str | None] = None
    """A built-in scorer, or the dotted path `package.module:Name` of a `Scorer` or a function; None: the key under
    which these settings stand, which is also the name that the scores are stored under."""
    args: Fixed[dict[str, Any]] = {}
    """Keyword arguments it is built with: checkpoint, device, dtype, ..."""
    env: Noted[str | None] = None
    """Environment it runs in: a name of `kto-ray env list`, or the path of a Python; None: the job's own."""
    min_actors: Free[Count] = 1
    """So many actors are always there."""
    max_actors: Free[Count] = 2
    """The pool grows while samples wait and shrinks when it idles."""
    resources: Resources = Resources(num_cpus=0.25, threads=1)
    max_retries: Free[Annotated[int, Field(ge=0)]] = 2
    """How often a batch is handed to another actor when its own died or did not answer in time."""
    timeout_s: Free[Positive] = 600
    """An actor that holds a batch for so long is killed and replaced."""

    @model_validator(mode="after")
    def _actors_are_a_range(self) -> "ScorerPoolSettings":
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) must be at least min_actors ({self.min_actors})")
        return self


class ScorerSettings(ScorerPoolSettings):
    """One scorer, its part in verdicts, and the pool of actors that run it."""

    held_out: Fixed[bool] = False
    """Never used for verdicts, always reported: a second opinion on whether images get better."""
    weight: Fixed[Positive] = 1
    """In a weighted sum."""
    mean: Fixed[float] = 0
    """Of its scores, see `std`."""
    std: Fixed[Positive] = 1
    """A weighted sum with calibration "fixed" takes (score - mean) / std."""
    threshold: Fixed[Threshold | None] = None
    """Of this scorer's vote, when scorers vote; None: `label.threshold`."""


class Filter(ScorerPoolSettings):
    """A scorer by which images are left out, and the scores that stay."""

    at_least: Fixed[float | None] = None
    """Images with lower scores are left out."""
    at_most: Fixed[float | None] = None
    """Images with higher scores are left out."""

    @model_validator(mode="after")
    def _something_is_left_out(self) -> "Filter":
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most, or both: by which scores are images left out?")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least ({self.at_least:g}) is above at_most ({self.at_most:g}): no image would stay")
        return self


def as_scorers(value: Any) -> Any:
    """A name, or a list of names, stands for scorers without settings; the last part of a dotted path is its key."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        scorers = {name.rpartition(":")[2]: {"scorer": name} if ":" in name else {} for name in value}
        if len(scorers) < len(value):
            raise ValueError("two scorers of one name; write a mapping of names of your choice to {scorer: ...}")
        return scorers
    if isinstance(value, dict):
        return {name: {} if settings is None else settings for name, settings in value.items()}
    return value


class Labeling(Section):
    """Who says yes or no. A scorer and a threshold by default."""

    labeler: Fixed[str] = "threshold"
    """"threshold", "human" (people, on a page), "feedback" (an application's votes), or the dotted path
    `package.module:Name` of a `Labeler`."""
    labeler_args: Fixed[dict[str, Any]] = {}
    """Keyword arguments that a `Labeler` of one's own is built with."""
    human: Human = Human()
    feedback: Feedback = Feedback()
    scorers: Fixed[Annotated[dict[str, ScorerSettings], BeforeValidator(as_scorers)]] = {"shapes": ScorerSettings()}
    """Scorers by the name their scores are stored under. They run at the same time, each in its own pool."""
    combine: Fixed[Combination] = WeightedSum()
    """How several scorers come to one verdict."""
    threshold: Fixed[Threshold] = Absolute(value=0.5)
    """From scores to verdicts; a number is an absolute threshold."""
    max_failed_fraction: Free[Share] = 0.1
    """A round in which more samples fail stops the run, with the scorer's own error."""
    deadline_s: Noted[Positive | None] = None
    """How long after its last image a round waits for verdicts before it is sealed without them; None: for ever."""
    min_verdicts: Noted[Count] = 2
    """A round with fewer yes and no in all is treated like a round of one class."""
    on_one_class: Noted[Literal["stop", "skip", "train", "widen"]] = "stop"
    """What to do with a round that has yes or no only, or too few of both: stop the run, skip its training, train on
    what is there, or widen: let the round's median decide instead of the threshold (where all score the same, skip)."""
    watch: Annotated[HackingWatch, BeforeValidator(as_watch)] = HackingWatch()
    """Whether images get better for the scorers that vote only."""

    @model_validator(mode="after")
    def _scorers_have_a_say(self) -> "Labeling":
        if self.labeler == "threshold" and not self.voting:
            raise ValueError("scorers must have at least one that is not held_out: verdicts come from it")
        own = [name for name, settings in self.voting.items() if settings.threshold]
        if own and isinstance(self.combine, WeightedSum):
            raise ValueError(
                f"scorers.{own[0]}.threshold would not be used: a weighted_sum has one threshold for all; "
                "give it as label.threshold, or let the scorers vote with combine=agreement or =majority"
            )
        return self

    @model_validator(mode="after")
    def _people_can_be_helped(self) -> "Labeling":
        if self.people is None:
            return self
        if not self.voting and self.human.on_deadline == "scorer":
            raise ValueError("human.on_deadline: scorer needs a scorer that is not held_out; name one in scorers")
        if not self.voting and not isinstance(self.human.route, RouteAll):
            raise ValueError(
                f"human.route: {self.human.route.kind} leaves the rest to scorers and needs one that is not held_out"
            )
        if isinstance(self.human.route, RouteDisagreement) and (
            isinstance(self.combine, WeightedSum) or len(self.voting) < 2
        ):
            raise ValueError(
                "human.route: disagreement needs scorers that vote: two that are not held_out, and combine=agreement "
                "or =majority"
            )
        return self

    @model_validator(mode="after")
    def _applications_have_no_page(self) -> "Labeling":
        if self.labeler == "feedback" and self.human.gold.file:
            raise ValueError("human.gold.file is for people who judge on the page; an application shows its own images")
        if self.labeler == "feedback" and self.human.labelers not in ((), Human().labelers):
            raise ValueError(
                f"human.labelers: {list(self.human.labelers)} would be given no page to judge on, with "
                "labeler: feedback whoever uses the application votes; leave it out"
            )
        return self

    @property
    def people(self) -> Human | None:
        """Settings of the queue and its server, where people judge, be it on our page or in an application."""
        return self.human if self.labeler in ("human", "feedback") else None

    @property
    def voting(self) -> dict[str, ScorerSettings]:
        return {name: settings for name, settings in self.scorers.items() if not settings.held_out}

    @property
    def held_out(self) -> list[str]:
        return [name for name, settings in self.scorers.items() if settings.held_out]
