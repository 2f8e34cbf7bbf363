"""Gold for people who judge the embedded world: drawn pictures, so that the answers are known.

`jobs/simulated_crowd.py --write-gold` writes a file of them for `label.human.gold.file`, which `label/human/gold.py`
reads.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from kto_ray.shapes.world import BACKGROUNDS, COLORS, MISTAKEN_FOR, SHAPES, Scene, draw, mistaken_caption

Taste = Literal["red", "prompt", "red_shape"]
TASTES: tuple[Taste, ...] = get_args(Taste)


def write_gold(folder: Path, taste: Taste, images: int = 24, seed: int = 0) -> Path:
    """Write a gold file and its PNGs; returns the file.

    Args:
        taste: of the one whose answers are known, who likes red, what follows the prompt, or red in the right shape.
        images: every second one is to be liked.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(images):
        liked = number % 2 == 0
        scene, prompt = known(taste, liked, rng)
        x, y = rng.uniform(30, 34, size=2)
        # Large, for the color of the figure to tell.
        picture_HWC = draw(scene, (float(x), float(y)), float(rng.uniform(23, 28)))
        Image.fromarray(picture_HWC).save(folder / f"{number}.png")
        answer = "desirable" if liked else "undesirable"
        rows.append({"image": f"{number}.png", "prompt": prompt, "answer": answer})
    file = folder / "gold.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def known(taste: Taste, liked: bool, rng: np.random.Generator) -> tuple[Scene, str]:
    """A scene, and a prompt for which somebody of this taste certainly likes it, or does not."""
    color, shape, background = (str(rng.choice(list(words))) for words in (COLORS, SHAPES, BACKGROUNDS))
    # Brown is half red: nothing is redder than red on brown, and blue on brown is no blue picture.
    red, blue = Scene("red", shape, "brown"), Scene("blue", shape, background.replace("brown", "black"))
    match taste:
        case "red":
            scene = red if liked else blue
            return scene, scene.caption
        case "prompt":
            scene = Scene(color, shape, background)
            return scene, mistaken_caption(scene, rng, share_right=float(liked))
        case "red_shape":
            if liked or rng.random() < 0.5:
                return red, red.caption if liked else replace(red, shape=MISTAKEN_FOR[shape]).caption
            return blue, blue.caption
