"""Images as PNG files: to people's browsers, to servers, and into reports."""

import io

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
