"""The objectives that `train.objective` names, each in a file of its own with its formula and its source.

    diffusion_kto   verdicts as they are, one by one: the method of this project
    sft, csft       supervised fine-tuning: on the desirable alone, or with the verdict in the prompt
    dpo             pairs of one prompt
    nft             implicit positive and negative policies around the one that drew the round

Pure torch: they know neither Ray nor diffusers. `train/learner.py` feeds them. A new one is a file beside these and a
line below.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from kto_ray.objectives.csft import CSFT
from kto_ray.objectives.diffusion_kto import DiffusionKTO
from kto_ray.objectives.dpo import DPO
from kto_ray.objectives.nft import NFT
from kto_ray.objectives.sft import SFT

__all__ = ["CSFT", "DPO", "NFT", "SFT", "AnyObjective", "DiffusionKTO", "Objective", "as_objective"]

AnyObjective = Annotated[DiffusionKTO | SFT | CSFT | DPO | NFT, Field(discriminator="kind")]
"""One line each."""


def as_objective(value: Any) -> Any:
    """A bare word is a kind; a mapping without a kind is Diffusion-KTO's."""
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "diffusion_kto", **value} if isinstance(value, dict) else value


Objective = Annotated[AnyObjective, BeforeValidator(as_objective)]
"""A kind, or {kind: ..., settings}."""
