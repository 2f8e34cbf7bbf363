"""DiffusionNFT with binary verdicts: an implicit positive and an implicit negative policy (arXiv 2509.16117).

Around the policy that drew the round, with prediction p_old, the trained one's p spans two others (Equation 5):

    p+ = (1 - beta) p_old + beta p           what explains desirable images
    p- = (1 + beta) p_old - beta p           what explains undesirable ones
    loss = mean of  r |p+ - target|^2 + (1 - r) |p- - target|^2 ,     r = 1 for desirable, 0 for undesirable images

and moving p+ towards the desirable moves p where moving p- towards the undesirable does: away from these. Written for
velocities of flow models; predictions of noise or of v are linear in them at a given timestep, so that the two implicit
policies are the same ones.

`normalise` is the paper's self-normalised regression in the space of the prediction: each squared error is divided by
the sample's own mean absolute error (no gradient), which takes the place of a weight by timestep.
"""

from typing import TYPE_CHECKING, Literal

from kto_ray.identity import Fixed
from kto_ray.objectives.protocol import SMALLEST, Losses, Needs, ObjectiveSection, Outputs, Scale, denoising_error
from kto_ray.section import Positive

if TYPE_CHECKING:
    from torch import Tensor


class NFT(ObjectiveSection):
    """Explain desirable images by p+, undesirable ones by p-."""

    kind: Literal["nft"] = "nft"
    beta: Fixed[Positive] = 1
    """How far the implicit policies lie from the one that drew the round: the smaller, the bolder; the paper's 0.1 to
    1."""
    normalise: Fixed[bool] = True
    """Weigh each sample by its own error, as the paper does; False: all alike."""

    @property
    def needs(self) -> Needs:
        return Needs(reference="round", own_rounds=True)

    def losses(self, outputs: Outputs, desirable_B: "Tensor", scale: Scale | None) -> Losses:
        if outputs.reference_BCHW is None:
            raise ValueError("nft needs the predictions of the policy that drew the round")
        drawn_BCHW, target_BCHW = outputs.reference_BCHW.float(), outputs.target_BCHW.float()
        sign_B = desirable_B.to(drawn_BCHW.dtype) * 2 - 1
        step_B = (self.beta * sign_B).view(-1, *[1] * (drawn_BCHW.dim() - 1))
        implicit_BCHW = drawn_BCHW + step_B * (outputs.prediction_BCHW.float() - drawn_BCHW)
        loss_B = denoising_error(implicit_BCHW, target_BCHW)
        if self.normalise:
            usual_B = (implicit_BCHW.detach() - target_BCHW).abs().flatten(1).mean(1)
            loss_B = loss_B / usual_B.clamp(min=SMALLEST)
        return Losses(loss_B)
