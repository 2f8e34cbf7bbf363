"""Conditional supervised fine-tuning: the verdict is told to the model as a prefix of the prompt.

    loss = mean of  error_policy, with  prompt = prefix of the verdict + prompt

A baseline of the paper (arXiv 2404.04465, Section 5; the conditioning is that of Lee et al., arXiv 2302.12192, and of
"quality tokens" before it). Once trained, images are drawn with the desirable prefix; the base model, which has never
seen one, draws without.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from kto_ray.identity import Fixed
from kto_ray.objectives.protocol import Losses, Needs, ObjectiveSection, Outputs, Scale

if TYPE_CHECKING:
    from torch import Tensor

Prefix = Annotated[str, Field(min_length=1)]


class CSFT(ObjectiveSection):
    """Denoise all images, each under its verdict."""

    kind: Literal["csft"] = "csft"
    desirable_prefix: Fixed[Prefix] = "good image, "
    """Goes before the prompts of desirable images, and before all that are drawn once the model has learned it."""
    undesirable_prefix: Fixed[Prefix] = "bad image, "
    """Goes before the prompts of undesirable images."""

    @model_validator(mode="after")
    def _verdicts_differ(self) -> "CSFT":
        if self.desirable_prefix == self.undesirable_prefix:
            raise ValueError(
                f"desirable_prefix and undesirable_prefix are both {self.desirable_prefix!r}: they tell the verdict, "
                "and must differ"
            )
        return self

    @property
    def needs(self) -> Needs:
        return Needs(prefixes=(self.desirable_prefix, self.undesirable_prefix))

    def losses(self, outputs: Outputs, desirable_B: "Tensor", scale: Scale | None) -> Losses:
        return Losses(outputs.error_B)
