"""Images as PNG files: across the border of a Python environment, to people's browsers, and into reports."""

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image


def to_png(images_BHWC: npt.NDArray[np.uint8]) -> list[bytes]:
    """Images as PNG files; lossless, and compressed only as far as costs little time."""
    files = []
    for image_HWC in images_BHWC:
        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, "png", compress_level=1)
        files.append(buffer.getvalue())
    return files


def from_png(pngs: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """The inverse of `to_png`: read-only uint8 of shape (B, H, W, 3)."""
    images_BHWC = np.stack([np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in pngs])
    images_BHWC.flags.writeable = False  # as arrays are that come from the object store
    return images_BHWC
