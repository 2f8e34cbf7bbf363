"""How the weights of a component lie in its folder: one file or shards, plain or of a variant. Reads headers only.

The same files that `from_pretrained(variant=..., use_safetensors=True)` of diffusers and transformers would load, named
before anything is loaded. `source.py` checks and digests them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kto_ray.errors import UserError

NOT_WHOLE = "the folder is not whole, copy or download it again"
NAMES = ("diffusion_pytorch_model", "model")
"""Of diffusers' components, and of those of transformers."""


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one component, in name order: of the variant where it has one, else the plain ones.

    Raises:
        UserError: the component's folder, its config.json, its weights or one of their shards are missing.
    """
    if not (component / "config.json").is_file():
        raise UserError(f"model.name: {component / 'config.json'} is missing; {NOT_WHOLE}")
    # diffusers takes a component for one that has the variant by any file's name, pickled weights' too.
    has_variant = variant and any(path.name.partition(".")[2].startswith(variant) for path in component.iterdir())
    if files := _found(component, variant if has_variant else None):
        return files
    raise UserError(f"model.name: {component} has no weights *.safetensors{_instead(component, variant)}")


def _found(component: Path, variant: str | None) -> list[Path]:
    """Of exactly this variant; none: []."""
    dotted = f".{variant}" if variant else ""
    for name in NAMES:
        single = component / f"{name}{dotted}.safetensors"
        # Where there are both, diffusers takes the shards and transformers the single file.
        there = single.is_file() or single.is_symlink()  # a link into nowhere is named when it is opened
        if (index := _index(component, name, dotted)) and not (there and name == "model"):
            return _shards(index)
        if there:
            return [single]
    return []


def _index(component: Path, name: str, dotted: str) -> Path | None:
    """What lists the shards. Raises UserError: it has a name of old under which it would not be found."""
    index = component / f"{name}.safetensors.index{dotted}.json"
    old = component / f"{name}.safetensors{dotted}.index.json"
    if index.is_file() or not old.is_file():
        return index if index.is_file() else None
    # transformers does not know the old name, and diffusers makes it of the whole path by counting its dots.
    dots = 1 if ".cache" in str(component) else 0
    if name == "model" or str(component).count(".") != dots:
        raise UserError(
            f"model.name: {old} has a name of old versions of diffusers, by which new ones do not find it here; rename "
            f"it to {index.name}"
        )
    return old


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.name: {index} does not list the shards of its weights; {NOT_WHOLE}") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"model.name: {index.parent} lacks {len(missing)} of {len(names)} shards of its weights: "
            f"{', '.join(missing[:3])}; {NOT_WHOLE}"
        )
    return [index.parent / name for name in names]


def _instead(component: Path, variant: str | None) -> str:
    """What a component has in the place of weights that can be loaded, and what to do about it."""
    has = sorted(path.name for path in component.iterdir() if path.suffix in (".safetensors", ".bin"))
    shown = f" (it has {', '.join(has[:3])})" if has else ""
    stem = "|".join(NAMES)
    known = re.compile(rf"(?:{stem})\.(\w+)(?:-\d+-of-\d+)?\.safetensors|(?:{stem})-\d+-of-\d+\.(\w+)\.safetensors")
    variants = sorted({found[1] or found[2] for name in has if (found := known.fullmatch(name))})
    if variants:
        return f"{shown}, but those of a variant; give model.variant={variants[0]}"
    if any(name.endswith(".bin") for name in has):
        return (
            f"{shown}, but pickled ones, which are not read; convert them: load the folder with diffusers' "
            "from_pretrained(..., use_safetensors=False) and save_pretrained it to another one"
        )
    return f"{f' of variant {variant!r} or without' if variant else ''}{shown}; {NOT_WHOLE}"


def require_variant(components: Sequence[Path], variant: str | None) -> None:
    """Raises UserError: not one of a pipeline's components has weights of the variant that is asked for."""
    files = [path.name for component in components for path in sorted(component.glob("*.safetensors"))]
    if variant and not any(re.search(rf"\.{re.escape(variant)}[.-]", name) for name in files):
        raise UserError(
            f"model.variant: {variant!r}, but {components[0].parent} has no weights *.{variant}.safetensors (it has "
            f"{', '.join(sorted(set(files)))}); give one that it has, or none"
        )


def check_weights(component: Path, variant: str | None) -> None:
    """Raises UserError: weights are missing, truncated, or not those of a base model."""
    for file in weight_files(component, variant):
        keys = read_header(file, "model.name", NOT_WHOLE)
        if inserted := [key for key in keys if ".base_layer." in key or ".lora_A." in key]:
            raise UserError(
                f"model.name: {file} was saved with an adapter in it ({inserted[0]}); save the folder again after "
                "pipeline.fuse_lora() and pipeline.unload_lora_weights()"
            )


@dataclass(frozen=True)
class Header:
    """Of one tensor in a safetensors file: its type in the format's words ("F16", "BF16", ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path, field: str, advice: str) -> dict[str, Header]:
    """What tensors a safetensors file has, by name.

    Args:
        field: of the configuration, that names the file.
        advice: what to do about a broken one.

    Raises:
        UserError: it is truncated, missing, or no safetensors file.
    """
    try:
        with safe_open(file, framework="np") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118 (it is no mapping)
            return {key: Header(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{field}: {file} is truncated or not a safetensors file ({error}); {advice}") from error
