"""Which images of a round people are asked about; the scorers judge the rest. See `settings.Route`.

`RouteAll` and `RouteRandom` can say so for each image as it comes; the others look at the scores of the whole round.
"""

import math

from kto_ray.config.people import Human, RouteAll, RouteDisagreement, RouteNearThreshold, RouteRandom
from kto_ray.label.judging import RoundVerdicts
from kto_ray.records import derive_seed


def chance(*parts: object) -> float:
    """A number in [0, 1) that follows from its parts alone: placement and restarts change nothing."""
    return derive_seed(*parts) / 2**63


def goes_to_people(human: Human, sample_id: str) -> bool | None:
    """Whether people are asked about this image; None: the whole round's scores decide."""
    match human.route:
        case RouteAll():
            return True
        case RouteRandom(share=share):
            return chance("route", sample_id) < share
    return None


def needed(human: Human, sample_id: str) -> int:
    """How many people judge this image."""
    return human.overlap.labels if chance("overlap", sample_id) < human.overlap.share else 1


def undecided(human: Human, judged: RoundVerdicts) -> set[str]:
    """The samples of a round that people are asked about because scorers cannot tell; those that failed are not.

    Args:
        judged: by the scorers.
    """
    scored = {sample_id: margin for sample_id, margin in judged.margins.items() if not math.isnan(margin)}
    nearest_first = sorted(scored, key=lambda sample_id: (scored[sample_id], chance("route", sample_id)))
    match human.route:
        case RouteNearThreshold(share=share):
            return set(nearest_first[: math.ceil(share * len(judged.margins))])
        case RouteDisagreement(share=share):
            # Of votes, the margin is 0.5 where all say the same.
            disputed = [sample_id for sample_id in nearest_first if scored[sample_id] < 0.5]
            return set(disputed[: math.ceil(share * len(judged.margins))])
    return set()
