"""What the configuration says of the watches: `label.watch` and `train.watch`. `evaluate/doubts.py` goes by it.

A watch looks at the figures of the rounds so far, after each of them. `train.watch: stop` is short for
`train.watch: {action: stop}`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from kto_ray.identity import Free
from kto_ray.section import InnerShare, NonNegative, Positive, Section


class Watch(Section):
    """What every watch has."""

    action: Free[Literal["warn", "stop", "off"]] = "warn"
    """In doubt: say so; say so and end the run; or do not look at all."""
    rounds: Free[Annotated[int, Field(ge=3)]] = 5
    """Trends are taken over so many rounds."""


def as_watch(value: Any) -> Any:
    """A word stands for a watch with that action."""
    return {"action": value} if isinstance(value, str) else value


class HackingWatch(Watch):
    """The watch for reward hacking: scores that verdicts come from rise while those of held-out scorers fall."""

    least_slope: Free[NonNegative] = 0.05
    """Slopes up to this are chance: in standard deviations of the first round's scores, a round."""


class CollapseWatch(Watch):
    """The watch for collapse: training takes the policy apart instead of teaching it.

    Its trend, the pass rate's, is taken from the third round on.
    """

    worse: Free[Positive] = 1
    """A round is doubtful when the mean of beta x g is below minus this, for desirable and undesirable images, ..."""
    saturated: Free[InnerShare] = 0.4
    """... when more than this share of its samples lies where the utility is flat, ..."""
    diversity: Free[InnerShare] = 0.5
    """... when its images differ from each other by less than this share of what those of the first round did, ..."""
    falls: Free[NonNegative] = 0.02
    """... or when the pass rate of trained prompts has come to fall by more than this a round, and more than chance."""
