"""What test_scorer_environments.py runs inside an environment: our scorer beside its package's own function.

    python -I inside_environment.py hpsv2 FOLDER

Checkpoints are random. The last line is JSON: what both answer, and how a spoilt checkpoint is refused.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.scorers.blank import Unfilled
from kto_ray.score.scorers.hpsv2 import HPSv2, build_model
from kto_ray.score.scorers.hpsv2 import random_checkpoint as random_hpsv2
from kto_ray.score.scorers.image_reward import ImageReward
from kto_ray.score.scorers.image_reward import random_checkpoint as random_image_reward

LONG = "a very long prompt of a red circle on black " * 20
Images = npt.NDArray[np.uint8]


def image_reward(folder: Path) -> dict[str, Any]:
    from ImageReward import load

    arguments = random_image_reward(folder)
    images_BHWC, texts = pictures(2, 64, 96), ["a red circle", LONG]
    os.chdir(folder)  # the package asks for the tokenizer by its name on the hub, which may be a folder
    with Unfilled():
        model = load(arguments["checkpoint"], device="cpu", med_config=arguments["med_config"])
    scorer = ImageReward(**arguments)
    other = folder / "other"
    other.mkdir()
    (other / "vocab.txt").write_text((folder / "bert-base-uncased" / "vocab.txt").read_text() + "\none-more")
    (other / "med_config.json").write_text("{")
    return {
        "ours": scorer.score(images_BHWC, prompts(texts)),
        "package": [model.score(text, image) for text, image in zip(texts, pil(images_BHWC), strict=True)],
        "empty": scorer.score(images_BHWC[:0], []),
        "missing": sorted(model.state_dict().keys() - read(arguments["checkpoint"]).keys()),
        "refused": {
            **refused_checkpoints(ImageReward, arguments, "mlp.layers.0.weight"),
            "no tokenizer": refused(ImageReward, **{**arguments, "tokenizer": str(folder / "nowhere")}),
            "other tokenizer": refused(ImageReward, **{**arguments, "tokenizer": str(other)}),
            "no med_config": refused(ImageReward, **{**arguments, "med_config": str(folder / "nowhere.json")}),
            "other med_config": refused(ImageReward, **{**arguments, "med_config": str(other / "med_config.json")}),
        },
    }


def hpsv2(folder: Path) -> dict[str, Any]:
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    arguments = random_hpsv2(folder)
    images_BHWC = pictures(5, 64, 48)
    texts = ["a red circle", LONG, "", "a red circle", "🔴 on ⚫"]
    scorer = HPSv2(**arguments)
    model, _, preprocess = open_clip.create_model_and_transforms(
        Path(arguments["architecture"]).stem, precision="amp", output_dict=True, light_augmentation=True
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)  # or else it downloads a ViT-H-14
    compressed = str(folder / "compressed.pt")  # as the authors' files, which are in half precision
    torch.save(
        {"state_dict": {name: value.half() for name, value in read(arguments["checkpoint"]).items()}}, compressed
    )
    return {
        "arguments": arguments,
        "ours": scorer.score(images_BHWC, prompts(texts)),
        "single": [scorer.score(images_BHWC[i : i + 1], prompts(texts[i : i + 1]))[0] for i in range(len(texts))],
        "package": [
            img_score.score(image, text, cp=arguments["checkpoint"])[0].item()
            for text, image in zip(texts, pil(images_BHWC), strict=True)
        ],
        "empty": scorer.score(images_BHWC[:0], []),
        "compressed": HPSv2(**{**arguments, "checkpoint": compressed}).score(images_BHWC, prompts(texts)),
        "bfloat16": HPSv2(**arguments, dtype="bfloat16").score(images_BHWC, prompts(texts)),
        "versions": [HPSv2(**arguments, version=version).version for version in ("2.0", 2.1)],
        "missing": sorted(
            {in_layer_0(name) for name in build_model("ViT-H-14")[0].state_dict()} - model.state_dict().keys()
        ),
        "refused": {
            **refused_checkpoints(HPSv2, arguments, "transformer.resblocks.0.mlp.c_fc.weight"),
            "true architecture": refused(HPSv2, checkpoint=arguments["checkpoint"]),
            "unknown architecture": refused(HPSv2, **{**arguments, "architecture": "ViT-H14"}),
            "no architecture": refused(HPSv2, **{**arguments, "architecture": str(folder / "nowhere.json")}),
            "unknown version": refused(HPSv2, **arguments, version="3"),
        },
    }


def in_layer_0(name: str) -> str:
    return ".".join("0" if part.isdigit() else part for part in name.split("."))


def pictures(count: int, height: int, width: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def pil(images_BHWC: Images) -> list[Image.Image]:
    return [Image.fromarray(image_HWC) for image_HWC in images_BHWC]


def prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(str(i), text) for i, text in enumerate(texts)]


def read(checkpoint: str) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return content.get("state_dict", content)


def refused_checkpoints(scorer: Callable[..., object], arguments: dict[str, Any], weight: str) -> dict[str, str]:
    """What is said of a missing file, half of one, one without `weight` and one with another shape of it."""
    path = Path(arguments["checkpoint"])
    spoilt = str(path.with_name("spoilt.pt"))
    answers = {"missing": refused(scorer, **{**arguments, "checkpoint": spoilt})}
    Path(spoilt).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    answers["truncated"] = refused(scorer, **{**arguments, "checkpoint": spoilt})
    weights = read(str(path))
    whole = weights.pop(weight)
    torch.save(weights, spoilt)
    answers["incomplete"] = refused(scorer, **{**arguments, "checkpoint": spoilt})
    torch.save({**weights, weight: whole[:1]}, spoilt)
    answers["another shape"] = refused(scorer, **{**arguments, "checkpoint": spoilt})
    return answers


def refused(scorer: Callable[..., object], **arguments: Any) -> str:
    try:
        scorer(**arguments)
    except UserError as error:
        return str(error)
    return "it was not refused"


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # packages print
        answers = {"image_reward": image_reward, "hpsv2": hpsv2}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(answers))
