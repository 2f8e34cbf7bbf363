"""Image files as whoever labelled them saw them, in the model's size: decoded, upright, on a background, cut.

`listing.py` asks what a file is, without reading its pixels; `preparing.py` decodes it for the autoencoder. What cannot
be read is an `UnreadableError` with the reason, which is counted and listed, never a crash and never an image made up.

Shape suffixes: H, W height and width in pixels; C the 3 channels, RGB.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Resize = Literal["crop", "buckets"]
TRANSPOSING = (5, 6, 7, 8)
"""EXIF orientations in which height and width change places."""
ELONGATED = 2.0
"""Most that a bucket's longer side may be of its shorter one, as in SDXL's training."""
FTYP = slice(4, 8)
BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF"}
"""Of files in the ISO base media format, the brands that say so, where Pillow reads no such file."""


class UnreadableError(Exception):
    """Why a file is no image that can be read: half a sentence."""


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as it is shown, from its head alone.

    Raises:
        UnreadableError: it has none, or is larger than Pillow deems safe.
    """
    with _opened(data) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in TRANSPOSING
    return (width, height) if turned else (height, width)


def decode(data: bytes, height: int, width: int, background: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """An image file as uint8 (H, W, 3), RGB, of this size.

    Upright by its EXIF orientation; of an animation the first frame; 16 bits a channel become 8; what is transparent
    shows the background. It is scaled (Lanczos) until it covers the size, and what stands over is cut off on both sides
    alike.

    Args:
        background: RGB, 0 to 255.

    Raises:
        UnreadableError: it cannot be read to its end.
    """
    with _opened(data) as image:
        # A JPEG is decoded to a fraction of its size where that is still twice what is asked for.
        image.draft("RGB", (2 * max(height, width), 2 * max(height, width)))
        image.load()
        upright = ImageOps.exif_transpose(image)
        fitted = ImageOps.fit(_in_rgb(upright, background), (width, height), Image.Resampling.LANCZOS)
        return np.asarray(fitted)


def _in_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _in_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """One channel of 16 bits, or of as many in numbers of 32; Pillow would cut off what is over 255."""
    values_HW = np.asarray(image)
    if not np.isfinite(values_HW).all() or values_HW.min() < 0 or values_HW.max() >= 2**16:
        raise UnreadableError(f"its numbers (mode {image.mode}) are not those of 8 or 16 bits")
    wide = image.mode.startswith("I;16") or values_HW.max() > 255
    return Image.fromarray((values_HW / 257 if wide else values_HW).round().astype(np.uint8))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Raises UnreadableError for whatever Pillow says of the bytes, also of those read within the context."""
    if not data:
        raise UnreadableError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of metadata that is not as it should be
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except UnidentifiedImageError as error:
        kind = BRANDS.get(data[8:12]) if data[FTYP] == b"ftyp" else None
        what = f"is {kind}, which is not read here; save it as PNG or JPEG" if kind else "is no image that Pillow knows"
        raise UnreadableError(f"the file {what}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UnreadableError(f"the image has more than {limit:.0f} megapixels; scale it down first") from error
    # All that Pillow's readers raise for bytes that are not what they say.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, OverflowError) as error:
        raise UnreadableError(f"the file is damaged: {error or type(error).__name__}") from error


def buckets(height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes of about the same area: for every height the widest that is no larger in area, none longer than twice its
    width, or wider than twice its height; (height, width) itself is among them.

    Args:
        multiple: of which all sides are multiples; 64 where the model allows it and is that large.
    """
    step = 64 if 64 % multiple == 0 and min(height, width) >= 512 else multiple
    found = {(height, width)}
    for one in range(step, int(ELONGATED * max(height, width)) + 1, step):
        other = height * width // one // step * step
        if other and max(one, other) <= ELONGATED * min(one, other):
            found |= {(one, other), (other, one)}
    return sorted(found)


def bucket_of(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Of these sizes the one whose aspect is nearest, by its ratio; of several the largest."""
    aspect = np.log(height / width)
    return min(sizes, key=lambda size: (round(abs(np.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]))
