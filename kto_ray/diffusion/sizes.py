"""How many numbers a model's components have, from their configurations alone: nothing is read of the weights.

Modules are built on torch's meta device, which keeps shapes and no data. `memory.py` counts with it what a role needs
on its device, `checks.py` finds in it the layers that adapters are put on.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kto_ray.diffusion.family import index_of
from kto_ray.diffusion.sharding import blocks_of


def parameters_of(folder: Path, component: str) -> int:
    """Weights and stored buffers of a component."""
    module = _built(folder, component)
    return sum(tensor.numel() for tensor in module.state_dict().values())


def largest_block_of(folder: Path, component: str) -> int:
    """Weights of the largest of the parts that are gathered one by one where a component is sharded."""
    module = _built(folder, component)
    counted: set[int] = set()
    largest = 0
    for block in [*blocks_of(module), module]:  # inner ones first, whose weights are not their surroundings'
        own = [weight for weight in block.parameters() if id(weight) not in counted]
        counted |= {id(weight) for weight in own}
        largest = max(largest, sum(weight.numel() for weight in own))
    return largest


def layers_of(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Its linear layers and convolutions by name, and the shapes of their weights: (out, in, ...)."""
    return {
        name: tuple(module.weight.shape)
        for name, module in _built(folder, component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def _built(folder: Path, component: str) -> nn.Module:
    library, name = index_of(folder)[component]
    return _on_meta(library, name, (folder / component / "config.json").read_text(encoding="utf-8"))


@cache
def _on_meta(library: str, name: str, config: str) -> nn.Module:
    import diffusers
    import transformers

    kind: Any = getattr(diffusers if library == "diffusers" else transformers, name)
    tree = json.loads(config)
    with torch.device("meta"):
        module: nn.Module = (
            kind.from_config(tree) if library == "diffusers" else kind(kind.config_class.from_dict(tree))
        )
    return module
