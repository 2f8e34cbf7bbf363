"""The embedded world's scorer: looks at the pixels of a picture and says how well it shows what the prompt names.

A `Scorer` (see `kto_ray/score/scorers`) like any other. It finds the figure by its contrast to the border, then
multiplies three shares: border in the named background, figure in the named colour, figure in the named shape.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.records import Prompt
from kto_ray.shapes.world import BACKGROUNDS, COLORS, IMAGE_SIZE, SHAPES, Scene, covers

ASPECTS = ("background", "color", "shape")
PALETTE = {**COLORS, **BACKGROUNDS}
FIGURE_CONTRAST = 60.0  # RGB distance to the border colour from which a pixel belongs to the figure
COLOR_TOLERANCE = 70.0  # RGB distance up to which a pixel counts as a palette colour; palette colours lie further apart


class ShapesScorer:
    """How well a 64x64 picture shows "a <color> <shape> on <background>": 0 (not at all) to 1 (perfectly).

    Deterministic; 0.5 is the natural threshold: below it, one of the three words is not to be seen.

    Args:
        aspects: what of it is looked at; by default all of "background", "color", "shape".

    Raises:
        ValueError: no aspects, or another one.
    """

    name = "shapes"
    version = "1"

    def __init__(self, aspects: Sequence[str] = ASPECTS) -> None:
        if not aspects or set(aspects) - set(ASPECTS):
            raise ValueError(f"aspects {list(aspects)} must be some of {', '.join(ASPECTS)}")
        self.aspects = tuple(aspects)

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """Score pictures.

        Args:
            images_BHWC: uint8 array of shape (B, 64, 64, 3), RGB.
            prompts: B prompts with captions of this world.

        Returns:
            B floats in [0, 1].

        Raises:
            ValueError: pictures of another shape or dtype, or a prompt that is no caption of this world.
        """
        if images_BHWC.dtype != np.uint8 or images_BHWC.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise ValueError(
                f"the shapes scorer takes uint8 pictures of shape (B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), "
                f"not {images_BHWC.dtype} of shape {images_BHWC.shape}"
            )
        return [
            score_picture(image_HWC, Scene.parse(prompt.text), self.aspects)
            for image_HWC, prompt in zip(images_BHWC, prompts, strict=True)
        ]


def score_picture(image_HWC: npt.NDArray[np.uint8], scene: Scene, aspects: Sequence[str] = ASPECTS) -> float:
    """How well one uint8 (64, 64, 3) picture shows these aspects of `scene`, in [0, 1]."""
    pixels_HWC = image_HWC.astype(np.float32)
    border = np.concatenate([pixels_HWC[:3], pixels_HWC[-3:], pixels_HWC[:, :3], pixels_HWC[:, -3:]], axis=None)
    border = border.reshape(-1, 3)
    figure_HW = np.linalg.norm(pixels_HWC - np.median(border, axis=0), axis=-1) > FIGURE_CONTRAST
    if figure_HW.mean() < 0.03:
        return 0.0
    background = share_of_color(border, scene.background)
    # Edge pixels mix figure and background: ask the inside only.
    inside_HW = figure_HW.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inside_HW &= np.roll(figure_HW, step, axis)
    color = share_of_color(pixels_HWC[inside_HW], scene.color) if inside_HW.any() else 0.0
    shares = {"background": background, "color": color, "shape": shape_match(figure_HW, scene.shape)}
    return math.prod(shares[aspect] for aspect in aspects)


def share_of_color(pixels_N3: npt.NDArray[np.float32], name: str) -> float:
    """Share of the pixels whose nearest palette colour is `name`, and which come near to it."""
    distance_NP = np.linalg.norm(pixels_N3[:, None] - np.array(list(PALETTE.values()), np.float32), axis=-1)
    nearest_N = distance_NP.argmin(1) == list(PALETTE).index(name)
    return float((nearest_N & (distance_NP.min(1) < COLOR_TOLERANCE)).mean())


def shape_match(figure_HW: npt.NDArray[np.bool_], shape: str) -> float:
    """0 when another shape fits the figure better, else how far the overlap (IoU) lies between 0.6 and 0.9."""
    overlaps = {other: best_overlap(figure_HW, other) for other in SHAPES}
    if max(overlaps, key=lambda other: overlaps[other]) != shape:
        return 0.0
    return float(np.clip((overlaps[shape] - 0.6) / 0.3, 0, 1))


def best_overlap(figure_HW: npt.NDArray[np.bool_], shape: str) -> float:
    """Largest intersection over union of the figure and `shape`, over places and sizes near the figure's extent."""
    # Two pixels in a row or column make an extent; a single speck does not.
    columns, rows = np.flatnonzero(figure_HW.sum(0) >= 2), np.flatnonzero(figure_HW.sum(1) >= 2)
    if not len(columns) or not len(rows):
        return 0.0
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    unit = np.linspace(-1, 1, 81, dtype=np.float32)
    covered = covers(shape, unit[None, :], unit[:, None])
    half_width = float(np.abs(unit[covered.any(0)]).max())
    upper, lower = float(unit[covered.any(1)][0]), float(unit[covered.any(1)][-1])
    pixel = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    best = 0.0
    radius_by_width, radius_by_height = (right - left) / 2 / half_width, (bottom - top) / (lower - upper)
    for radius in {radius_by_width, radius_by_height, (radius_by_width + radius_by_height) / 2}:
        x, y = (left + right) / 2, (top + bottom) / 2 - radius * (upper + lower) / 2
        template_HW = covers(shape, (pixel[None, :] - x) / radius, (pixel[:, None] - y) / radius)
        best = max(best, (template_HW & figure_HW).sum() / (template_HW | figure_HW).sum())
    return best
