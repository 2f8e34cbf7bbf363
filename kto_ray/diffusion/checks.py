"""Whether a model can draw what `generate` and the prompts ask for: sizes, scheduler, steps, length of texts.

`preflight.py` asks here. Reads a folder that `source.check` has passed; loads no weights.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from kto_ray.config import Generate
from kto_ray.diffusion.layouts import Geometry, layout_of
from kto_ray.diffusion.noise import DiscreteDiffusion
from kto_ray.diffusion.sampling import compatible_scheduler
from kto_ray.errors import UserError

PIPELINES_WANT = 8
"""Pixels: diffusers' pipelines take multiples of it only, whatever the autoencoder."""


def check(settings: Generate, folder: Path) -> None:
    """Raises UserError: a size, a scheduler or a number of steps with which nothing can be drawn."""
    image_size(settings, layout_of(folder).geometry(folder))
    scheduler = _component(folder, "scheduler", diffusers)
    DiscreteDiffusion.from_folder(folder)
    _check_steps(settings, scheduler)


def image_size(settings: Generate, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the images in pixels. Raises UserError when they are not known, or cannot be."""
    sides = {"height": settings.height, "width": settings.width}
    given = {name: side for name, side in sides.items() if side is not None}
    if len(given) == 1:
        ((name, side),) = given.items()
        own = f" ({geometry.pixels[0]} x {geometry.pixels[1]})" if geometry.pixels else ""
        raise UserError(
            f"generate.{name}: {side} without the other side; give generate.height and generate.width, or neither of "
            f"them for what the model was trained on{own}"
        )
    if not given and geometry.pixels is None:
        raise UserError(
            "generate.height: the model does not say how large its images are; give generate.height and generate.width"
        )
    multiple = math.lcm(PIPELINES_WANT, geometry.shrink)
    for name, side in given.items():
        if side % multiple:
            below = side // multiple * multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise UserError(f"generate.{name}: {side} is no multiple of {multiple}, as this model needs; take {near}")
    return geometry.pixels if geometry.pixels and not given else (given["height"], given["width"])


def _check_steps(settings: Generate, own: Any) -> None:
    """Take a scheduler through all of its steps on one pixel."""
    chosen, trained = compatible_scheduler(own, settings.scheduler), own.config.num_train_timesteps
    if settings.steps > trained:
        raise UserError(f"generate.steps: {settings.steps} is more than the {trained} that the model was trained with")
    try:
        scheduler = chosen.from_config(own.config)
        scheduler.set_timesteps(settings.steps)
        pixel = torch.ones(1, 1, 1, 1) * scheduler.init_noise_sigma
        with torch.random.fork_rng(devices=[]):
            for timestep in scheduler.timesteps:
                predicted = 0.5 * scheduler.scale_model_input(pixel, timestep)
                pixel = scheduler.step(predicted, timestep, pixel).prev_sample
    except Exception as error:  # whatever a scheduler may raise for what it cannot do
        raise UserError(
            f"generate.steps: {settings.scheduler} cannot draw in {settings.steps} steps ({type(error).__name__}: "
            f"{error}); take another number of steps, or another generate.scheduler"
        ) from error
    if not pixel.isfinite().all():
        raise UserError(
            f"generate.steps: {settings.scheduler} draws nothing finite in {settings.steps} steps; take another number "
            "of steps, or another generate.scheduler"
        )


@dataclass(frozen=True)
class Read:
    """What of a text reaches the model."""

    tokens: tuple[int, ...]
    cut: bool


def read_by(folder: Path, texts: Sequence[str]) -> tuple[list[Read], int]:
    """What the model's tokenizer makes of each text, and the number of tokens after which it cuts."""
    import transformers

    tokenizer = _component(folder, "tokenizer", transformers)
    limit = int(tokenizer.model_max_length)

    def read(tokens: Sequence[int]) -> Read:
        kept = (*tokens[: limit - 1], tokens[-1]) if len(tokens) > limit else tuple(tokens)
        return Read(kept, len(tokens) > limit)

    return [read(tokens) for tokens in tokenizer(list(texts), verbose=False).input_ids], limit


def _component(folder: Path, name: str, library: Any) -> Any:
    """A component without weights, of the class that the folder names."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return getattr(library, index[name][1]).from_pretrained(folder, subfolder=name)
