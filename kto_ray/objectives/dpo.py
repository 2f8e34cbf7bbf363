"""Online Diffusion-DPO: pairs of one prompt, made from the verdicts or scores of a round (Wallace et al., arXiv
2311.12908).

For a pair of a better image, with implicit reward g_w, and a worse one, with g_l, that share prompt, noise and timestep
(Equation 14; its weights T and omega(lambda_t) are in beta):

    loss = mean over the pairs of  -log sigmoid(beta * (g_w - g_l))
"""

from typing import TYPE_CHECKING, Literal

from kto_ray.identity import Fixed
from kto_ray.objectives.protocol import Losses, Needs, ObjectiveSection, Outputs, Scale
from kto_ray.objectives.reference import Referring
from kto_ray.section import Positive

if TYPE_CHECKING:
    from torch import Tensor


class DPO(Referring, ObjectiveSection):
    """Prefer the better image of a pair. Needs several images of a prompt: `generate.images_per_prompt`."""

    kind: Literal["dpo"] = "dpo"
    beta: Fixed[Positive] = 5000
    """Scale of the implicit reward; the paper's is 2000 to 5000 for Stable Diffusion."""

    pairs: Fixed[Literal["verdicts", "scores"]] = "verdicts"
    """What makes a pair: a desirable and an undesirable image of one prompt; or any two of one prompt whose scores
    differ, by what `label` compares images by, whatever their verdicts are."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.reference, pairs=self.pairs)

    def check_batch(self, global_batch: int, micro_batch: int) -> None:
        if micro_batch % 2:
            raise ValueError(
                f"objective dpo trains on pairs: micro_batch, or a worker's share of global_batch, is {micro_batch}, "
                "and must be even"
            )

    def losses(self, outputs: Outputs, desirable_B: "Tensor", scale: Scale | None) -> Losses:
        """Each of a pair has the pair's loss, and the pair's margin with the sign of its own verdict."""
        import torch
        from torch.nn import functional

        desirable_P, undesirable_P = outputs.reward_B[0::2], outputs.reward_B[1::2]
        margin_P = self.beta * (desirable_P - undesirable_P)
        loss_B = -functional.logsigmoid(margin_P).repeat_interleave(2)
        return Losses(loss_B, torch.stack([margin_P, -margin_P], dim=1).flatten())
