"""What pictures look like, in five numbers that no scorer is asked for: a look at what training does to a policy.

A policy that found a trick shows it here first: all pictures alike, blank, noisy or garish. The loop logs these figures
for each round. Pure numpy, one image at a time, so that a round of large images fits in memory.

Shape suffixes: N images; H, W height and width; D a thumbnail's numbers.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

NAMES = ("edge_density", "color_entropy", "brightness", "saturation")
THUMBNAIL = 8  # 8 x 8 cells: layout and colours, no detail
THUMBNAIL_MAX = 2**16 - 1
EDGE = 0.1  # step in luma, of 1, between neighbouring pixels from which it counts as an edge
# Rec. 601. As whole numbers, so that lumas of uint8 pixels are exact in float32: 1000 * 255 < 2**24.
LUMA = np.array([299, 587, 114], np.float32)


def picture_figures(pixels_NHWC: Image) -> dict[str, float]:
    """Figures of a set of images, the means over images of:

    - "pictures/edge_density": share of the pixels whose luma differs from that of the pixel to the right or below by
      more than `EDGE`; in [0, 1]. Those in the last row and column have one such neighbour, or none.
    - "pictures/color_entropy": Shannon entropy of the histogram of 4 x 4 x 4 equal RGB bins, in bits; in [0, 6].
    - "pictures/brightness": Rec. 601 luma; in [0, 1].
    - "pictures/saturation": saturation of HSV, (max - min) / max, and 0 for black; in [0, 1].

    and of the set as a whole, if it is more than one image:

    - "pictures/diversity": mean distance of two images, over all pairs; in [0, 1]. The distance is the root mean square
      difference of their thumbnails: the mean RGB, of 1, of 8 x 8 cells (of whole pixels, so they may differ by one).
      0: all alike; 1: one black, one white.

    Args:
        pixels_NHWC: uint8 RGB of shape (N, H, W, 3), N of 1 or more, H and W of 8 or more.

    Raises:
        ValueError: any other array.
    """
    pixels = np.asarray(pixels_NHWC)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
        raise ValueError(f"need uint8 images of shape (N, H, W, 3), at least one, not {pixels.dtype} {pixels.shape}")
    if min(pixels.shape[1:3]) < THUMBNAIL:
        raise ValueError(f"need images of {THUMBNAIL}x{THUMBNAIL} pixels or more, not {pixels.shape[1:3]}")
    return figures_of([look(image_HWC) for image_HWC in pixels])


def look(image_HWC: Image) -> bytes:
    """All that `figures_of` asks of one image, in 416 bytes: taken where the pixels are, added up where they are not.

    Args:
        image_HWC: uint8 RGB of shape (H, W, 3), H and W of 8 or more; empty where it is smaller.
    """
    if min(image_HWC.shape[:2]) < THUMBNAIL:
        return b""
    thumbnail = np.rint(_thumbnail(image_HWC) * THUMBNAIL_MAX).astype("<u2")
    return np.array(_figures(image_HWC), "<f8").tobytes() + thumbnail.tobytes()


def figures_of(looks: Sequence[bytes]) -> dict[str, float]:
    """The figures of `picture_figures` from what `look` gave of each image, at least one."""
    figures_NF = np.array([np.frombuffer(one, "<f8", len(NAMES)) for one in looks])
    means = np.mean(figures_NF, axis=0).tolist()
    figures = {f"pictures/{name}": float(mean) for name, mean in zip(NAMES, means, strict=True)}
    if len(looks) > 1:
        thumbnails_ND = np.stack([np.frombuffer(one, "<u2", offset=8 * len(NAMES)) for one in looks])
        thumbnails_ND = thumbnails_ND.astype(np.float32) / np.float32(THUMBNAIL_MAX)
        figures["pictures/diversity"] = _diversity(thumbnails_ND)
    return figures


def _figures(image_HWC: Image) -> tuple[float, float, float, float]:
    """Edge density, colour entropy, brightness and saturation of one image."""
    luma_HW = image_HWC.astype(np.float32) @ LUMA
    step = EDGE * 255 * float(LUMA.sum())
    edge_HW = np.zeros(luma_HW.shape, np.bool_)
    edge_HW[:, :-1] = np.abs(np.diff(luma_HW, axis=1)) > step
    edge_HW[:-1] |= np.abs(np.diff(luma_HW, axis=0)) > step

    red, green, blue = np.moveaxis(image_HWC, -1, 0)
    bin_HW = (red >> 6 << 4) | (green >> 6 << 2) | (blue >> 6)
    share = np.bincount(bin_HW.ravel(), minlength=64) / bin_HW.size
    share = share[share > 0]

    highest_HW = np.maximum(np.maximum(red, green), blue)
    spread_HW = highest_HW - np.minimum(np.minimum(red, green), blue)
    saturation_HW = spread_HW / np.maximum(highest_HW, 1).astype(np.float32)
    return (
        float(edge_HW.mean()),
        float((share * np.log2(1 / share)).sum()),
        float(luma_HW.mean(dtype=np.float64)) / (255 * float(LUMA.sum())),
        float(saturation_HW.mean(dtype=np.float64)),
    )


def _thumbnail(image_HWC: Image) -> npt.NDArray[np.float32]:
    """Mean colours of 8 x 8 cells, in [0, 1], as one float32 row of 192 numbers."""
    height, width = image_HWC.shape[:2]
    tops, lefts = np.arange(THUMBNAIL) * height // THUMBNAIL, np.arange(THUMBNAIL) * width // THUMBNAIL
    sums = np.add.reduceat(np.add.reduceat(image_HWC, tops, axis=0, dtype=np.uint32), lefts, axis=1, dtype=np.uint64)
    sizes = np.diff(tops, append=height)[:, None] * np.diff(lefts, append=width)
    colors: npt.NDArray[np.float32] = (sums / (255 * sizes[:, :, None])).astype(np.float32)
    return colors.ravel()


def _diversity(thumbnails_ND: npt.NDArray[np.float32]) -> float:
    """Mean root mean square difference over all pairs of rows; one row against the rest at a time."""
    count = len(thumbnails_ND)
    total = sum(
        float(np.sqrt(np.square(thumbnails_ND[i + 1 :] - thumbnails_ND[i]).mean(axis=1)).sum()) for i in range(count)
    )
    return total / (count * (count - 1) / 2)
