"""What each environment is built from: pinned packages and repairs."""

import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kto_ray.score.environments.repairs import Repair, Rewrite, Supply

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # one cluster, one minor version


def root() -> Path:
    """The folder of all environments: $KTO_RAY_ENVS, or ~/.cache/kto-ray/envs. The same path on every node."""
    return Path(os.environ.get("KTO_RAY_ENVS") or "~/.cache/kto-ray/envs").expanduser().absolute()


@dataclass(frozen=True)
class Environment:
    """What an environment is built from: pinned packages, installed as named and without others, and repairs."""

    name: str
    packages: tuple[str, ...]
    repairs: tuple[Repair, ...] = ()

    @property
    def folder(self) -> Path:
        return root() / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{PYTHON}" / "site-packages"


BASE = Environment(
    "base", ("numpy==2.4.6", "pillow==13.0.0", "pyarrow==26.0.1", "torch==2.14.1", "torchvision==0.29.1")
)
"""Shared by all layers; with the Ray that runs here, and with what these packages require."""

ENVIRONMENTS: dict[str, Environment] = {
    environment.name: environment
    for environment in (
        Environment(
            "image_reward",
            (
                "image-reward==1.5",
                "timm==0.6.13",  # as the package asks
                "fairscale==0.4.13",  # as the package asks
                "transformers==4.55.4",  # the last whose modeling_utils has apply_chunking_to_forward
                *("tokenizers==0.21.4", "huggingface-hub==0.36.2"),  # as transformers asks
                *("safetensors==0.8.0", "regex==2026.11.15", "tqdm==4.70.1"),
                "clip-anytorch==2.6.0",  # the module `clip`; PyPI's package of that name is another one
                *("ftfy==6.3.1", "wcwidth==0.9.4"),
            ),
            (
                Rewrite(
                    "no-training",
                    "importing the package imports its trainer, which needs diffusers, datasets and accelerate",
                    "ImageReward/__init__.py",
                    "from .ReFL import *",
                ),
                Rewrite(
                    "no-pkg-resources",
                    "clip takes packaging from pkg_resources, which setuptools has no more since version 82",
                    "clip/clip.py",
                    "from pkg_resources import packaging",
                    "import packaging.version",
                ),
            ),
        ),
        Environment(
            "hpsv2",
            (
                "hpsv2==1.2.0",
                "open_clip_torch==3.3.0",  # for the file that the repair takes out of it
                *("clint==0.5.1", "args==0.1.0", "huggingface-hub==0.36.2", "tqdm==4.70.1"),
                *("ftfy==6.3.1", "wcwidth==0.9.4", "regex==2026.11.15"),
            ),
            (
                Rewrite(
                    "no-turtle",
                    "an import that nobody uses needs Tk, which a server's Python often lacks",
                    "hpsv2/src/open_clip/factory.py",
                    "from turtle import forward",
                ),
                Supply(
                    "vocabulary",
                    "the wheel lacks the tokenizer's vocabulary; open_clip, of which it is a fork, has the same file",
                    "hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz",
                    "open_clip/bpe_simple_vocab_16e6.txt.gz",
                    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
                ),
            ),
        ),
    )
}


def requirements(environment: Environment) -> list[str]:
    """What pip is asked for. The base has the Ray that runs here: one cluster, one Ray."""
    return [*environment.packages, *([f"ray=={metadata.version('ray')}"] if environment is BASE else [])]


def specification(environment: Environment) -> dict[str, Any]:
    """What an environment would be built from here and now. One built from anything else is not used."""
    layers = [BASE] if environment is BASE else [BASE, environment]
    return {
        "Python": PYTHON,
        "Ray": metadata.version("ray"),
        "packages": [package for layer in layers for package in layer.packages],
        "repairs": [repr(repair) for repair in environment.repairs],
    }
