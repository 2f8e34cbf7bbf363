"""Pictures of a policy beside the base model's, from the same seeds, drawn in this process: no cluster is needed.

`cli_sample.py` asks for them. Base and policy are found and proven as for an export (`published.py`), and drawn as the
run's held-out images are.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from kto_ray.config import Device
from kto_ray.errors import UserError
from kto_ray.export.published import Published

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

GAP = 8
"""Pixels between two pictures."""


def drawn(
    found: Published, prompt: str, seeds: Sequence[int], device: Device = "auto"
) -> tuple["npt.NDArray[np.uint8]", "npt.NDArray[np.uint8]"]:
    """What base and policy draw for a prompt, both (B, H, W, 3), RGB, one a seed.

    Args:
        device: "auto" is a GPU, if there is one.

    Raises:
        UserError: an image has numbers that are not finite.
    """
    import torch

    from kto_ray.diffusion.loading import DTYPES, load_family, offload, pick_device, renew_offloaded
    from kto_ray.diffusion.policy import make_policy
    from kto_ray.diffusion.sampling import as_asked, draw
    from kto_ray.diffusion.texts import Texts

    config, settings = found.config, found.config.held_out
    where = pick_device(device, float(torch.cuda.is_available()))
    dtype = DTYPES[settings.dtype] if where.type == "cuda" else torch.float32
    at_first = where if settings.offload == "none" else torch.device("cpu")
    family = load_family(found.folder, found.model, at_first, dtype, settings.guidance_scale)
    texts = Texts(lambda: family)
    policy = make_policy(family, config.train.adapter)
    policy.module.requires_grad_(False).eval()
    offload(family.pipeline, settings.offload if where.type == "cuda" else "none", where)
    pictures = []
    for version, tensors in ((0, None), (found.policy.version, found.tensors)):
        policy.load(tensors)
        renew_offloaded(policy.module)
        _, pixels_BHWC, finite_B = draw(
            family, texts, as_asked(config, [prompt] * len(seeds), version), seeds, settings
        )
        if not finite_B.all():
            raise UserError(
                f"an image of policy {version} in {dtype} has numbers that are not finite; use another seed"
            )
        pictures.append(pixels_BHWC)
    return pictures[0], pictures[1]


def side_by_side(base_BHWC: "npt.NDArray[np.uint8]", policy_BHWC: "npt.NDArray[np.uint8]") -> Image.Image:
    """A row a seed: the base's on the left, the policy's on the right, each in its true size."""
    count, height, width, _ = base_BHWC.shape
    sheet = Image.new("RGB", (2 * width + GAP, count * (height + GAP) - GAP), "white")
    for column, pixels_BHWC in enumerate((base_BHWC, policy_BHWC)):
        for row, pixels_HWC in enumerate(pixels_BHWC):
            sheet.paste(Image.fromarray(pixels_HWC), (column * (width + GAP), row * (height + GAP)))
    return sheet
