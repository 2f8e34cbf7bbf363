"""The one table of model families: from a pipeline's class to how its folder is laid out and who loads it.

`source.py` checks folders by it, `families.py` loads them, and whoever needs a component's name or the size of a latent
asks here. Reads configurations, loads no weights and no torch. A new family is one file beside this one and one row.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from a model's configuration."""

    channels: int
    """Of a latent."""
    shrink: int
    """Pixels of an image to one of a latent, in height and in width."""
    pixels: tuple[int, int] | None
    """(height, width) of the images that the model was trained on; None: it does not say."""


@dataclass(frozen=True)
class Layout:
    """A pipeline folder of one family."""

    family: str
    """Dotted path of the class that loads it, a `families.Family`."""
    denoiser: str
    """The component that is trained, which is also what diffusers puts before the names of its adapters' weights."""
    weights: tuple[str, ...]
    """Components that have a config.json and weights."""
    configs: tuple[str, ...] = ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")
    """Files without which the rest of the folder cannot be loaded."""

    def geometry(self, folder: Path) -> Geometry:
        """Raises OSError or ValueError for a folder that `source.check` has not passed."""
        vae, denoiser = (_config(folder / component) for component in ("vae", self.denoiser))
        shrink = 2 ** (len(vae["block_out_channels"]) - 1)
        size: int | list[int] | None = denoiser.get("sample_size")
        sizes = [size, size] if isinstance(size, int) else size
        return Geometry(
            channels=denoiser["in_channels"],
            shrink=shrink,
            pixels=None if sizes is None else (sizes[0] * shrink, sizes[1] * shrink),
        )


LAYOUTS: dict[str, Layout] = {
    "StableDiffusionPipeline": Layout(
        family="kto_ray.diffusion.stable_diffusion:StableDiffusion",
        denoiser="unet",
        weights=("vae", "text_encoder", "unet"),
    ),
}


def layout_of(folder: Path) -> Layout:
    """The layout that a folder's model_index.json names. Raises KeyError for a family that is not in the table."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return LAYOUTS[index["_class_name"]]


def _config(component: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((component / "config.json").read_text(encoding="utf-8"))
    return config
