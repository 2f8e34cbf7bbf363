"""Scorers in environments of their own, against the functions of the packages that they stand on.

    kto-ray env build --all
    python benchmarks/scorers.py [--quick]

Both run in one process of the scorer's environment, on the CPU, with the same random checkpoint of true size, on
pictures of 512 x 512: the packages in float32, which is all that they can do there, ours in float32 and in bfloat16.
What is compared:

- ImageReward, other prompts: `score(prompt, image)` of the package for each image, and our batch.
- ImageReward, one prompt: `score(prompt, images)` of the package, and our batch.
- HPS v2, other prompts: `hpsv2.score(image, prompt)` for each image. It reads the checkpoint at every call.
- HPS v2, one prompt: `hpsv2.score(images, prompt)`, which reads the checkpoint once.

Answers of float32 that differ by more than 1e-3 end the benchmark.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # in the environments is neither rich nor the rest that it imports
    from measuring import Table

TITLES = {"image_reward": "ImageReward", "hpsv2": "HPS v2"}
CASES = ("other prompts", "one prompt")
DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-3

# -- in the main environment ------------------------------------------------------------------------------------------


class Inside:
    """The other end of a pipe to a process in an environment, which does what it is asked for by name."""

    def __init__(self, scorer: str, folder: str, images: int, full: bool) -> None:
        from measuring import threads

        from kto_ray.score.environments.finding import interpreter

        command = [str(interpreter(scorer)), "-I", __file__, scorer, folder, str(images), str(int(full))]
        surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads())}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings
        )
        self.scores: dict[str, list[float]] = {}
        """The last answer to each name."""

    def ask(self, name: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        self.scores[name] = json.loads(answer)


@contextlib.contextmanager
def inside(scorer: str, images: int, full: bool) -> Iterator[Inside]:
    with tempfile.TemporaryDirectory() as folder:
        other = Inside(scorer, folder, images, full)
        try:
            yield other
        finally:
            other.process.communicate()


def measure(quick: bool) -> "Table":
    """Time both contenders of each row in turn."""
    from measuring import Table, interleaved, median_and_range, ratios

    from kto_ray.score.environments.contents import BASE

    images, repeats = (2, 1) if quick else (4, 3)
    rows = []
    for scorer, title in TITLES.items():
        with inside(scorer, images, full=not quick) as other:
            for case in CASES:
                ours, theirs = [f"{dtype}, {case}" for dtype in DTYPES], f"package, {case}"
                seconds = interleaved({name: partial(other.ask, name) for name in (*ours, theirs)}, repeats)
                for dtype, name in zip(DTYPES, ours, strict=True):
                    difference = np.abs(np.subtract(other.scores[name], other.scores[theirs])).max()
                    if dtype == "float32" and difference > TOLERANCE:
                        raise RuntimeError(f"{title}, {case}: scores differ by {difference}")
                    faster = median_and_range(ratios(seconds[theirs], seconds[name]))
                    rates = [[images / value for value in seconds[who]] for who in (name, theirs)]
                    speeds = (median_and_range(rate, "{:.3g}")[0] for rate in rates)
                    rows.append((f"{title}, {case}, {dtype}", *faster, *speeds, f"{difference:.1e}"))
    torch = next(package for package in BASE.packages if package.startswith("torch=="))
    return Table(
        title=f"Scorers against their packages, {images} images at a time",
        columns=(
            "scorer",
            "times faster",
            "lowest - highest",
            "ours, images/s",
            "package, images/s",
            "scores differ by",
        ),
        rows=rows,
        note=f"Median of {repeats} repeats; {torch}." + (" Models are smaller than the true ones." if quick else ""),
    )


# -- in an environment ------------------------------------------------------------------------------------------------


def contenders(scorer: str, folder: Path, images: int, full: bool) -> dict[str, Callable[[], list[float]]]:
    """What is measured, by name; each scores all images."""
    from PIL import Image

    from kto_ray.records import Prompt
    from kto_ray.score.scorers import hpsv2, image_reward, load_scorer

    module: Any = {"hpsv2": hpsv2, "image_reward": image_reward}[scorer]
    arguments = module.random_checkpoint(folder, full)
    images_BHWC = np.random.default_rng(0).integers(0, 256, (images, 512, 512, 3), np.uint8)
    pictures = [Image.fromarray(image_HWC) for image_HWC in images_BHWC]
    texts = [f"a photo of {number} cats that sit on a red sofa" for number in range(images)]
    ours = {dtype: load_scorer(scorer)(**arguments, dtype=dtype) for dtype in DTYPES}
    os.chdir(folder)  # ImageReward asks for its tokenizer by name, which may be a folder
    one_each, one_prompt = (package_hpsv2 if scorer == "hpsv2" else package_image_reward)(arguments)
    prompts = [Prompt(text, text) for text in texts]

    def batches(asked: Sequence[Prompt]) -> dict[str, Callable[[], list[float]]]:
        return {dtype: lambda dtype=dtype: list(ours[dtype].score(images_BHWC, asked)) for dtype in DTYPES}

    return {
        **{f"{dtype}, other prompts": run for dtype, run in batches(prompts).items()},
        "package, other prompts": lambda: [one_each(text, image) for text, image in zip(texts, pictures, strict=True)],
        **{f"{dtype}, one prompt": run for dtype, run in batches(prompts[:1] * images).items()},
        "package, one prompt": lambda: one_prompt(texts[0], pictures),
    }


Functions = tuple[Callable[[str, Any], float], Callable[[str, Any], list[float]]]


def package_image_reward(arguments: dict[str, Any]) -> Functions:
    from ImageReward import load

    model = load(arguments["checkpoint"], device="cpu", med_config=arguments["med_config"])
    return model.score, model.score


def package_hpsv2(arguments: dict[str, Any]) -> Functions:
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        Path(arguments["architecture"]).stem, precision="amp", output_dict=True, light_augmentation=True
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)  # as it does itself, with a download

    def score(text: str, images: Any) -> list[float]:
        return [float(value) for value in img_score.score(images, text, cp=arguments["checkpoint"])]

    return lambda text, image: score(text, image)[0], score


def answer(scorer: str, folder: str, images: str, full: str) -> None:
    """Run what each line of stdin names, and answer with a line of JSON."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # packages print
        runs = contenders(scorer, Path(folder), int(images), bool(int(full)))
        for line in sys.stdin:
            print(json.dumps(runs[line.strip()]()), file=answers, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        answer(*sys.argv[1:])
    else:
        from measuring import run_alone

        run_alone(measure, __doc__)
