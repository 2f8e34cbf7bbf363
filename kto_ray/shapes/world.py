"""What the embedded world looks like: scenes, their pictures, their captions and its mistaken captions.

A scene is one coloured shape on one background, drawn somewhere near the middle of a 64x64 picture. `draw` renders
it, `caption` names it, `mistaken_caption` names it as the crawl that the base model was pretrained on does: wrong more
than half of the time. `jobs/pretrain_shapes.py` trains on these; `scorer` reads the same geometry backwards.

Shape suffixes: N scenes, H = W = 64 pixels, 3 RGB channels.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 64

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 50),
    "green": (35, 160, 65),
    "cyan": (60, 215, 225),
    "blue": (40, 75, 220),
    "purple": (135, 45, 185),
    "pink": (250, 145, 205),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 12),
    "white": (246, 246, 244),
    "gray": (128, 130, 132),
    "brown": (105, 68, 40),
}
SHAPES = ("circle", "ring", "square", "diamond", "triangle", "cross")

MISTAKEN_FOR = {
    **{"red": "green", "green": "red", "blue": "yellow", "yellow": "blue"},
    **{"orange": "purple", "purple": "orange", "cyan": "pink", "pink": "cyan"},
    **{"circle": "triangle", "triangle": "circle", "square": "ring", "ring": "square"},
    **{"cross": "diamond", "diamond": "cross"},
    **{"black": "white", "white": "black", "gray": "brown", "brown": "gray"},
}
"""The word that a careless annotator writes instead. Two confusable words are equally plausible to guidance, too:
random mistakes would be sharpened away by a guidance scale of 2, a systematic mix-up is not."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one `shape` in one `color` on one `background`, each a word of this module."""

    color: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} on {self.background}"

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """Read a caption back. Raises ValueError when it does not name a scene of this world."""
        match caption.split():
            case ["a", color, shape, "on", background] if (
                color in COLORS and shape in SHAPES and background in BACKGROUNDS
            ):
                return cls(color, shape, background)
        raise ValueError(f"{caption!r} is not a caption of the shapes world, such as 'a red circle on black'")


def all_scenes() -> list[Scene]:
    return [Scene(*words) for words in itertools.product(COLORS, SHAPES, BACKGROUNDS)]


def is_held_out(scene: Scene) -> bool:
    """A quarter of the scenes, in which every word and every pair of words is as frequent as in the rest.

    Their captions are used neither in pretraining nor in feedback: a held-out prompt is a new combination of
    well-practised words.
    """
    words = (list(COLORS).index(scene.color), SHAPES.index(scene.shape), list(BACKGROUNDS).index(scene.background))
    return sum(words) % 4 == 0


def mistaken_caption(scene: Scene, rng: np.random.Generator, share_right: float) -> str:
    """The caption of `scene` in a careless crawl: right with probability `share_right`, else one word is mixed up."""
    if rng.random() < share_right:
        return scene.caption
    field = ("color", "shape", "background")[rng.integers(3)]
    return replace(scene, **{field: MISTAKEN_FOR[getattr(scene, field)]}).caption


def covers(shape: str, u: npt.NDArray[np.float32], v: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether points (u right, v down, in units of the shape's radius, from its centre) lie inside `shape`."""
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "ring":
            return (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.55**2)
        case "square":
            return np.maximum(abs(u), abs(v)) <= 0.85
        case "diamond":
            return abs(u) + abs(v) <= 1.0
        case "triangle":
            return (v <= 0.8) & (abs(u) <= (v + 0.9) / 1.7)
        case "cross":
            return (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1.0)
    raise ValueError(f"unknown shape {shape!r}, known: {', '.join(SHAPES)}")


def draw(scene: Scene, center: tuple[float, float] = (32, 32), radius: float = 20) -> npt.NDArray[np.uint8]:
    """Render a scene with smooth edges.

    Args:
        center: (x, y) of the shape, in pixels.
        radius: half of the shape's extent, in pixels.

    Returns:
        uint8 array of shape (64, 64, 3), RGB.
    """
    supersampling = 4
    pixel = ((np.arange(IMAGE_SIZE * supersampling) + 0.5) / supersampling).astype(np.float32)
    inside = covers(scene.shape, (pixel[None, :] - center[0]) / radius, (pixel[:, None] - center[1]) / radius)
    share_HW = inside.reshape(IMAGE_SIZE, supersampling, IMAGE_SIZE, supersampling).mean((1, 3))[..., None]
    picture = share_HW * np.array(COLORS[scene.color]) + (1 - share_HW) * np.array(BACKGROUNDS[scene.background])
    pixels_HWC: npt.NDArray[np.uint8] = np.rint(picture).astype(np.uint8)
    return pixels_HWC


def draw_somewhere(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Render a scene at a random place and size; see `draw`."""
    x, y = rng.uniform(27, 37, size=2)
    return draw(scene, (float(x), float(y)), float(rng.uniform(16, 22)))
