"""What a replica and a train worker hold on their device, from configurations alone, and what would make it less.

`preflight.py` refuses by it what cannot fit on the cards that the run has, before anything is downloaded, and the dry
run shows it. Counted are weights, gradients and the optimizer's state; activations come on top and are not known before
something is drawn or trained: a fifth of a card is left to them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kto_ray.config import RunConfig, held_dtype
from kto_ray.diffusion.checks import adapted
from kto_ray.diffusion.components import components
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.loading import DTYPES
from kto_ray.diffusion.sizes import largest_block_of, parameters_of
from kto_ray.errors import UserError

FOR_ACTIVATIONS = 0.2
"""Of a card."""
TRAINED = {"adamw": 4 + 4 + 4 + 4, "adamw_8bit": 4 + 4 + 1 + 1, "adamw_paged": 4 + 4, "adafactor": 4 + 4}
"""Bytes of a trained number by `train.optimizer`: itself and its gradient in float32, and what the optimizer holds that
cannot go to the host's memory."""
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Of one process."""

    role: str
    section: str
    """Of the configuration, which says what it may have."""
    parts: Mapping[str, int]
    """Bytes by what they are."""
    cards: float
    """`resources.num_gpus`; 0: it runs on the CPU."""
    less: str
    """What makes it less; "": nothing that a setting does."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_said(size)}" for name, size in self.parts.items() if size)
        return f"{_said(self.total)}, and activations ({parts})"


def needs_of(config: RunConfig, folder: Path) -> tuple[Need, Need]:
    """Of a replica and of a train worker."""
    return _replica(config, folder), _train_worker(config, folder)


def require_fit(needs: tuple[Need, ...], card_gb: float) -> None:
    """Raises UserError: a role needs more than its share of a card of so many GB has for it."""
    for need in needs:
        room = need.cards * card_gb * 10**9 * (1 - FOR_ACTIVATIONS)
        if need.cards and need.total > room:
            more = f"; {need.less}" if need.less else ""
            raise UserError(
                f"{need.section}.resources: a {need.role} holds {need}, but {need.cards:g} of a card of {card_gb:g} GB "
                f"(cluster.gpu_gb) leaves {_said(room)} beside activations; give it a larger card or share{more}"
            )


def _said(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _numbers(config: RunConfig, folder: Path) -> tuple[dict[str, int], int]:
    """By component, and of the adapters."""
    family, adapter = family_of(folder, config.model), config.train.adapter
    listed = [name for name, kind in components(folder, family).items() if kind == "model"]
    shapes = adapted(folder, config.model, adapter).values() if adapter.kind == "lora" else ()
    adapters = sum(adapter.rank * (shape[0] + torch.Size(shape[1:]).numel()) for shape in shapes)
    return {name: parameters_of(folder, name) for name in listed}, adapters


def _replica(config: RunConfig, folder: Path) -> Need:
    numbers, adapters = _numbers(config, folder)
    part, generate = family_of(folder, config.model).part, config.generate
    width = DTYPES[generate.dtype].itemsize
    parts = {name: width * count for name, count in numbers.items()}
    if config.train.adapter.kind == "full":
        parts["base, beside the policy"] = width * numbers[part]
    parts |= {"adapters": 4 * adapters}
    less = "generate.offload=model holds a component at a time"
    if generate.offload == "model":
        parts = {
            name: size for name, size in parts.items() if name in (max(parts, key=lambda of: parts[of]), "adapters")
        }
        less = "generate.offload=group holds a layer at a time"
    elif generate.offload == "group":
        parts, less = {"vae": parts["vae"]}, ""
    if generate.dtype == "float32":
        less = "generate.dtype=bfloat16 halves it"
    return Need("replica", "generate", parts, generate.resources.num_gpus, less)


def _train_worker(config: RunConfig, folder: Path) -> Need:
    numbers, adapters = _numbers(config, folder)
    part, train = family_of(folder, config.model).part, config.train
    trained = TRAINED[train.optimizer]
    follows = train.objective.needs.reference in ("round", "ema")
    if train.adapter.kind == "full":
        share = math.ceil(numbers[part] / (train.workers if train.strategy == "fsdp" else 1))
        parts = {
            f"{part} and its optimizer": trained * share,
            "base": 4 * share,
            "reference": 4 * share * follows,
        }
        less = "train.strategy=fsdp shares it among train.workers, train.adapter.kind=lora needs a fraction"
        if train.strategy == "fsdp":
            # The block in work, and the one that is fetched meanwhile.
            parts["gathered blocks"] = 2 * DTYPES[train.dtype].itemsize * largest_block_of(folder, part)
            less = "more train.workers share it"
    else:
        parts = {
            part: DTYPES[held_dtype(train)].itemsize * numbers[part],
            "adapters and their optimizer": trained * adapters,
            "reference": 4 * adapters * follows,
        }
        less = "" if held_dtype(train) == "bfloat16" else "train.dtype=bfloat16 halves it"
    return Need("train worker", "train", parts, train.resources.num_gpus, less)
