"""Images of the embedded world as an application's log has them: drawn by its base model, liked or not.

    python jobs/label_shapes.py runs/_shapes_labelled --images 5184

Each has its prompt in a text file beside it; it is liked when the world's scorer gives it 0.5 or more. The prompts are
those that `prompts.train` of the demo has, each as often. What `jobs/offline_kto.py --recipe shapes_offline` trains on.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track

from kto_ray.config import load
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.sampling import draw
from kto_ray.diffusion.texts import Texts
from kto_ray.prompts import load_prompts, round_requests
from kto_ray.shapes.scorer import ShapesScorer

BATCH = 72
DONE = "README.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5184, help="as many as the online demo draws, by default")
    parser.add_argument("--seed", type=int, default=1, help="other than the demo's, so that no image is one of its own")
    args = parser.parse_args()
    if (args.folder / DONE).exists():
        print(f"{args.folder} is there already")
        return 0
    liked = label(args.folder, args.images, args.seed)
    (args.folder / DONE).write_text(
        f"{args.images} images that the base model of the embedded world drew, {liked} of them liked.\n"
        f"Made by jobs/label_shapes.py with seed {args.seed}.\n"
    )
    print(f"{args.folder}: {args.images} images, {liked} liked")
    return 0


def label(folder: Path, images: int, seed: int) -> int:
    """Draw and judge; gives how many are liked."""
    config = load("shapes_demo")
    for name in ("liked", "disliked"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    family = load_family(source.resolve(config.model), config.model, torch.device("cpu"), torch.float32)
    texts, scorer, liked = Texts(lambda: family), ShapesScorer(), 0
    requests = round_requests(load_prompts("prompts.train", config.prompts.train), seed, "labelled", 0, images)
    for start in track(range(0, images, BATCH), "draw and judge"):
        batch = requests[start : start + BATCH]
        prompts = [request.prompt for request in batch]
        _, pixels_BHWC, _ = draw(
            family, texts, [prompt.text for prompt in prompts], [request.seed for request in batch], config.generate
        )
        scores = scorer.score(pixels_BHWC, prompts)
        for number, (pixels_HWC, prompt, score) in enumerate(zip(pixels_BHWC, prompts, scores, strict=True), start):
            file = folder / ("liked" if score >= 0.5 else "disliked") / f"{number:06}.png"
            Image.fromarray(pixels_HWC).save(file)
            file.with_suffix(".txt").write_text(prompt.text)
            liked += score >= 0.5
    return liked


if __name__ == "__main__":
    sys.exit(main())
