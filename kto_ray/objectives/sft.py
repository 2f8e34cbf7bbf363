"""Supervised fine-tuning on the desirable images alone: the baseline of the paper (arXiv 2404.04465, Section 5).

    loss = mean of  error_policy

The diffusion model's own training objective on what people liked; what they disliked is not looked at.
"""

from typing import TYPE_CHECKING, Literal

from kto_ray.objectives.protocol import Losses, Needs, ObjectiveSection, Outputs, Scale

if TYPE_CHECKING:
    from torch import Tensor


class SFT(ObjectiveSection):
    """Denoise the desirable images."""

    kind: Literal["sft"] = "sft"

    @property
    def needs(self) -> Needs:
        return Needs(undesirable=False)

    def losses(self, outputs: Outputs, desirable_B: "Tensor", scale: Scale | None) -> Losses:
        return Losses(outputs.error_B)
