"""The formats of `--to`: whom each is for, what it writes, and the lines that load it again.

`exporting.py` asks the table. Facts about readers: diffusers takes adapters by the names that policies are published
with, scaled by the `lora_adapter_metadata` of the file's header. kohya's names are those that programs around U-Nets
know, with an alpha for each module; of transformers diffusers reads no such names. ComfyUI takes kohya's for U-Nets,
and for some transformers diffusers' names, scaled by 1 unless there is an alpha; diffusers in turn fails on alphas
beside its own names, but for FLUX, so the scale is multiplied into the weights. What ComfyUI knows was read in its
source, not tried.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kto_ray.config import Dtype
from kto_ray.diffusion import base_adapters
from kto_ray.diffusion.loading import DTYPES
from kto_ray.errors import UserError
from kto_ray.export.merging import Change, with_adapters, write_merged
from kto_ray.export.published import Published

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "diffusion_pytorch_model.safetensors"
IN_COMFYUI = {
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "AuraFlowPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
}
"""Pipelines with a transformer whose modules ComfyUI finds by diffusers' names. Lumina 2 is not one: ComfyUI takes its
names for those of Z-Image."""


@dataclass(frozen=True)
class Export:
    """A policy, and how it is to be written down."""

    published: Published
    to: str
    """One of `FORMATS`."""
    dtype: Dtype | None = None
    """Of the denoiser of a merged pipeline; None: that of the base model's files."""

    @property
    def name(self) -> str:
        """Of the policy, as a file name."""
        run = re.sub(r"[^\w.-]+", "-", self.published.config.run)
        return f"{run}-policy-{self.published.policy.version}"


@dataclass(frozen=True)
class Format:
    """One of `--to`."""

    refuses: Callable[[Published], str | None]
    """Why a policy cannot be written so, and what to give instead; None: it can."""
    write: Callable[[Export, Path], None]
    """Into a new folder. Raises UserError: weights that are not what their names say."""
    loading: Callable[[Export, str], list[str]]
    """Lines of Python that load it from a place: a folder, or a repository of a hub."""
    is_whole: bool = False
    """Whether it needs no base model beside it."""


def modules(published: Published) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, down and up weight of each adapted module, without the component's name before it.

    Raises:
        UserError: weights that are no pairs of these.
    """
    tensors = published.tensors
    names = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    if 2 * len(names) != len(tensors) or any(name + UP not in tensors for name in names):
        stray = next((name for name in tensors if not name.endswith((DOWN, UP))), "a half of a pair")
        raise UserError(f"--policy: {published.policy.version} has weights that are no LoRA pairs, such as {stray}")
    for name in names:
        yield name.removeprefix(f"{published.part}."), tensors[name + DOWN], tensors[name + UP]


# -- diffusers --------------------------------------------------------------------------------------------------------


def _write_diffusers(export: Export, folder: Path) -> None:
    """The published file itself, so that its digest stays that of the policy."""
    published = export.published
    if published.is_lora:
        (folder / ADAPTER_FILE).write_bytes(published.file())
        return
    component = folder / published.part
    component.mkdir()
    shutil.copyfile(published.folder / published.part / "config.json", component / "config.json")
    (component / FULL_FILE).write_bytes(published.file())


def _load_diffusers(export: Export, place: str) -> list[str]:
    if export.published.is_lora:
        return _load_adapter(export.published, place, ADAPTER_FILE)
    part = export.published.part
    return [
        f'{part} = AutoModel.from_pretrained("{place}", subfolder="{part}")',
        f"pipeline = DiffusionPipeline.from_pretrained({_base(export.published)}, {part}={part})",
    ]


# -- kohya and ComfyUI ------------------------------------------------------------------------------------------------


def kohya(published: Published) -> dict[str, Tensor]:
    """Weights of a U-Net's adapter by kohya's names."""
    tensors: dict[str, Tensor] = {}
    for module, down, up in modules(published):
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(float(published.alpha))
    return tensors


def scaled(published: Published) -> dict[str, Tensor]:
    """An adapter's weights by diffusers' names, such that they are right without any alpha."""
    tensors: dict[str, Tensor] = {}
    for module, down, up in modules(published):
        key = f"{published.part}.{module}"
        tensors |= {key + DOWN: down, key + UP: up * published.scale}
    return tensors


def _is_unet(published: Published) -> bool:
    return published.part == "unet"


def _write_kohya(export: Export, folder: Path) -> None:
    save_file(kohya(export.published), folder / f"{export.name}.safetensors", {"format": "pt"})


def _write_comfyui(export: Export, folder: Path) -> None:
    tensors = kohya(export.published) if _is_unet(export.published) else scaled(export.published)
    save_file(tensors, folder / f"{export.name}.safetensors", {"format": "pt"})


def _load_named(export: Export, place: str) -> list[str]:
    return _load_adapter(export.published, place, f"{export.name}.safetensors")


def _load_adapter(published: Published, place: str, file: str) -> list[str]:
    return [
        f"pipeline = DiffusionPipeline.from_pretrained({_base(published)})",
        *_load_base_adapters(published),
        f'pipeline.load_lora_weights("{place}", weight_name="{file}")',
    ]


def _load_base_adapters(published: Published) -> Iterator[str]:
    """Of the run's base model, which they were a part of."""
    for adapter, file in zip(published.model.adapters, base_adapters.files(published.model), strict=True):
        there = f'"{adapter.name}", weight_name="{file.name}"' if adapter.name != str(file) else f'"{file}"'
        yield f"pipeline.load_lora_weights({there})"
        yield f"pipeline.fuse_lora(components=pipeline.get_list_adapters(), lora_scale={adapter.scale:g})"
        yield "pipeline.unload_lora_weights()"


def _not_lora(published: Published) -> str | None:
    if published.is_lora:
        return None
    return "is a format of LoRA adapters, and this run trained all of the denoiser; give merged or diffusers"


def _not_kohya(published: Published) -> str | None:
    if _is_unet(published):
        return _not_lora(published)
    comfyui = "comfyui, " if published.pipeline in IN_COMFYUI else ""
    return (
        f"is a format of U-Nets, and this model ({published.pipeline}) has a transformer, of which diffusers cannot "
        f"read such a file; give {comfyui}diffusers or merged"
    )


def _not_comfyui(published: Published) -> str | None:
    if _is_unet(published) or published.pipeline in IN_COMFYUI:
        return _not_lora(published)
    return (
        f"is for U-Nets and {', '.join(sorted(IN_COMFYUI))}; of this model ({published.pipeline}) ComfyUI is not known "
        "to find the modules by the names in such a file; give diffusers or merged"
    )


# -- a whole pipeline -------------------------------------------------------------------------------------------------


def _write_merged(export: Export, folder: Path) -> None:
    published = export.published
    changes: dict[str, Change] = (
        {f"{module}.weight": (down, up) for module, down, up in modules(published)}
        if published.is_lora
        else {**published.tensors}
    )
    with with_adapters(published) as whole:
        write_merged(whole, folder, changes, DTYPES[export.dtype] if export.dtype else None)


def _load_merged(export: Export, place: str) -> list[str]:
    model = export.published.model
    variant = f', variant="{model.variant}"' if model.variant and not model.adapters else ""
    return [f'pipeline = DiffusionPipeline.from_pretrained("{place}"{variant})']


def _base(published: Published) -> str:
    """The arguments that load the base model."""
    more = {"revision": published.model.revision if published.hub_name else None, "variant": published.model.variant}
    given = [f'{name}="{value}"' for name, value in more.items() if value]
    return ", ".join([f'"{published.hub_name or published.folder}"', *given])


FORMATS = {
    "diffusers": Format(lambda published: None, _write_diffusers, _load_diffusers),
    "kohya": Format(_not_kohya, _write_kohya, _load_named),
    "merged": Format(lambda published: None, _write_merged, _load_merged, is_whole=True),
    "comfyui": Format(_not_comfyui, _write_comfyui, _load_named),
}
"""By the name that `--to` takes."""
