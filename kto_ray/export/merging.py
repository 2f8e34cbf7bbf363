"""A whole pipeline with the policy in its denoiser: the base model's folder again, but for the trained weights.

`formats.py` calls it. No model is loaded: weight files are read and written one at a time, under the names and with the
shards that they had, so that memory for the largest of them is enough. Sums are made in float32 and rounded once. Only
a base model that adapters are part of (`model.adapters`) is loaded, and saved with them in it, first.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kto_ray.diffusion.components import components
from kto_ray.diffusion.family import index_of
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.weights import weight_files
from kto_ray.errors import UserError
from kto_ray.export.published import Published

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf")

Change = Tensor | tuple[Tensor, Tensor]
"""A new weight, or down and up weight of what is added to the old one."""


@contextmanager
def with_adapters(published: Published) -> Iterator[Published]:
    """The same policy on a base model that has its `model.adapters` in its files, in float32; as it is without any."""
    if not published.model.adapters:
        yield published
        return
    with tempfile.TemporaryDirectory() as folder:
        family = load_family(published.folder, published.model, torch.device("cpu"), torch.float32)
        family.pipeline.save_pretrained(folder)
        plain = published.model.model_copy(update={"adapters": (), "variant": None})
        yield replace(published, folder=Path(folder), model=plain)


def write_merged(
    published: Published, out: Path, changes: Mapping[str, Change], dtype: torch.dtype | None = None
) -> None:
    """Write the pipeline into a folder.

    Args:
        changes: by the name of the denoiser's weight.
        dtype: of the denoiser; None: as its files have it.

    Raises:
        UserError: the base model has no weight of such a name and shape.
    """
    _copy_pipeline(published, out)
    left = dict(changes)
    for file in weight_files(published.folder / published.part, published.model.variant):
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {"format": "pt"}
            tensors = {
                name: _changed(name, weights.get_tensor(name), left.pop(name, None), published.scale, dtype)
                for name in weights.keys()  # noqa: SIM118  it is no mapping
            }
        save_file(tensors, out / published.part / file.name, metadata)
    if left:
        raise UserError(f"--policy: the base model has no weight {min(left)!r}, which the policy would change")


def _changed(name: str, base: Tensor, change: Change | None, scale: float, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and base.is_floating_point() else base.dtype
    if change is None:
        return base.to(wanted)
    if isinstance(change, Tensor):
        new = change
    else:
        down, up = change
        try:
            new = base.float() + scale * (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
        except RuntimeError as error:
            raise UserError(
                f"--policy: its adapter of {name!r} does not fit the base model's weight: {error}"
            ) from error
    if new.shape != base.shape:
        raise UserError(f"--policy: {name!r} is {list(new.shape)} in it and {list(base.shape)} in the base model")
    return new.to(wanted).contiguous()


def _copy_pipeline(published: Published, out: Path) -> None:
    """All but the denoiser's weights. Components that the index names and the folder lacks are no longer named."""
    index = index_of(published.folder)
    loaded = components(published.folder, published.family)
    named = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2]
    for name in named:
        component = published.folder / name
        if not component.is_dir():
            index[name] = [None, None]
        elif loaded.get(name) == "model":
            files = weight_files(component, published.model.variant)
            kept = set() if name == published.part else {file.name for file in files}
            _copy_component(component, out / name, {file.name for file in files}, kept)
        else:
            shutil.copytree(component, out / name)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in published.folder.glob("LICENSE*"):
        shutil.copyfile(file, out / file.name)


def _copy_component(component: Path, out: Path, loaded: set[str], kept: set[str]) -> None:
    """Configuration and, of the weight files, those that are kept; other variants and formats stay behind.

    Args:
        loaded: weight files that the run had loaded.
    """
    out.mkdir()
    for file in component.iterdir():
        if not file.is_file() or (file.suffix in WEIGHTS and file.name not in kept):
            continue
        if ".index." in file.name and not set(json.loads(file.read_bytes())["weight_map"].values()) <= loaded:
            continue
        shutil.copyfile(file, out / file.name)
