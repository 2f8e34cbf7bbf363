"""What the implicit reward is measured against: settings that objectives with a reference share.

`train/following.py` lets the learner's reference follow; each round's `training.json` says which policy it was.
"""

from typing import Annotated

from pydantic import Field

from kto_ray.identity import Fixed
from kto_ray.objectives.protocol import ReferenceName
from kto_ray.section import InnerShare, Section


class Referring(Section):
    """A reference that stands still, or follows the policy from round to round; within a round it never moves."""

    reference: Fixed[ReferenceName] = "fixed"
    """What the implicit reward is measured against. "fixed" is the base model, as in the paper; "round" the policy that
    drew the round, so that every round asks anew for better than what there is (for a replayed round, which another
    run's policy drew: the policy that is about to be trained on it); "ema" a running average of the policies, which
    lies between the two."""
    reference_rate: Fixed[InnerShare] = 0.5
    """For "ema": share of the reference that stays from round to round; the rest becomes the newest policy."""
    reference_anchor: Fixed[Annotated[float, Field(ge=0, lt=1)]] = 0
    """For "ema": how far its weights are drawn back to the base model each round; 0 is not at all."""
