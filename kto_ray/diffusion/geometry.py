"""Sizes that follow from a model's configuration: of its latents, and of the images that it can draw.

A family reads its own (`family.py`); `checks.py`, `sampling.py` and `preflight.py` go by them.
"""

import math
from dataclasses import dataclass

from kto_ray.config import Generate
from kto_ray.errors import UserError

PIPELINES_WANT = 8
"""Pixels: diffusers' pipelines take multiples of it only, whatever the autoencoder."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model."""

    channels: int
    """Of a latent, as the denoiser is trained on it."""
    shrink: int
    """Pixels of an image to one of a latent, in height and in width."""
    pixels: tuple[int, int] | None
    """(height, width) of the images that the model was trained on; None: it does not say."""
    patch: int = 1
    """Pixels of a latent to one token of the denoiser, in height and in width."""

    @property
    def multiple(self) -> int:
        """Of which the height and width of an image must be multiples, in pixels."""
        return math.lcm(PIPELINES_WANT, self.shrink * self.patch)


def image_size(settings: Generate, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the images in pixels. Raises UserError when they are not known, or cannot be."""
    sides = {"height": settings.height, "width": settings.width}
    given = {name: side for name, side in sides.items() if side is not None}
    if len(given) == 1:
        ((name, side),) = given.items()
        own = f" ({geometry.pixels[0]} x {geometry.pixels[1]})" if geometry.pixels else ""
        raise UserError(
            f"generate.{name}: {side} without the other side; give generate.height and generate.width, or neither of "
            f"them for what the model was trained on{own}"
        )
    if not given and geometry.pixels is None:
        raise UserError(
            "generate.height: the model does not say how large its images are; give generate.height and generate.width"
        )
    for name, side in given.items():
        if side % geometry.multiple:
            below = side // geometry.multiple * geometry.multiple
            near = f"{below} or {below + geometry.multiple}" if below else f"{geometry.multiple}"
            raise UserError(
                f"generate.{name}: {side} is no multiple of {geometry.multiple}, as this model needs; take {near}"
            )
    return geometry.pixels if geometry.pixels and not given else (given["height"], given["width"])
