"""Where a base model lies, whether it is whole, and its digest. Cheap: reads headers and bytes, loads no weights.

`resolve` turns `model.name` of the configuration ("shapes", a folder, a hub name) into a local diffusers folder;
`check` names what is missing or broken before machine time is spent; `reference_digest` and `component_digests` are the
proof of identity that every replica and train worker compares with the run's.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kto_ray.config import Model
from kto_ray.diffusion.layouts import LAYOUTS, layout_of
from kto_ray.errors import UserError
from kto_ray.shapes import MODEL_FOLDER

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
NOT_WHOLE = "the folder is not whole, copy or download it again"


def resolve(model: Model) -> Path:
    """The local folder of a model, downloaded from the hub into its cache when it is a hub name.

    Raises:
        UserError: no such folder, or the hub does not have it (or cannot be reached).
    """
    local = local_folder(model)
    return local if local is not None else _download(model)


def local_folder(model: Model) -> Path | None:
    """The folder of a model that needs no download, or None.

    Raises:
        UserError: it is neither a folder nor a name that the hub could have.
    """
    if model.name == "shapes":
        return MODEL_FOLDER
    folder = Path(model.name)
    if folder.is_dir():
        return folder
    if folder.suffix in SINGLE_FILES or folder.is_file():
        raise UserError(
            f"model.name: {model.name!r} is a single file, which is not supported yet; make a folder of it with "
            f"StableDiffusionPipeline.from_single_file({model.name!r}).save_pretrained('FOLDER') of diffusers, and "
            "give that"
        )
    if folder.is_absolute() or model.name.startswith(".") or model.name.count("/") != 1:
        raise UserError(
            f"model.name: no folder {model.name!r}; give a diffusers pipeline folder, a hub name such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5', or 'shapes'"
        )
    return None


def _download(model: Model) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(model.name, revision=model.revision, variant=model.variant, use_safetensors=True)
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name: {model.name!r} is no local folder and could not be had from the model hub "
            f"(check the name, the network, HF_TOKEN): {error}"
        ) from error


def check(folder: Path, variant: str | None = None) -> str:
    """Make sure that a pipeline folder is whole and of a family that can be trained; returns its pipeline class.

    Raises:
        UserError: names the file that is missing or truncated, or the unsupported family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"model.name: {folder} is not a diffusers pipeline folder: it has no model_index.json; "
            "give the folder that contains it"
        )
    pipeline_class = str(_read_json(index).get("_class_name"))
    if pipeline_class not in LAYOUTS:
        raise UserError(
            f"model.name: {folder} holds a {pipeline_class}, which is not supported; supported: {', '.join(LAYOUTS)}"
        )
    layout = LAYOUTS[pipeline_class]
    for config in (*layout.configs, *(f"{component}/config.json" for component in layout.weights)):
        _read_json(folder / config)
    for component in layout.weights:
        for file in weight_files(folder / component, variant):
            try:
                with safe_open(file, framework="np") as weights:
                    weights.keys()
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"model.name: {file} is truncated or not a safetensors file ({error}); {NOT_WHOLE}"
                ) from error
    return pipeline_class


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"model.name: {file} is missing; {NOT_WHOLE}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.name: {file} is not valid JSON ({error}); {NOT_WHOLE}") from error
    if not isinstance(content, dict):
        raise UserError(f"model.name: {file} is not a JSON object; {NOT_WHOLE}")
    return content


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one component, in name order.

    Raises:
        UserError: the component's folder, its config.json or its weights are missing.
    """
    if not (component / "config.json").is_file():
        raise UserError(f"model.name: {component / 'config.json'} is missing; {NOT_WHOLE}")
    names = sorted(path for path in component.glob("*.safetensors"))
    # "model.fp16.safetensors", "model-00001-of-00002.fp16.safetensors" and "model.fp16-00001-of-00002.safetensors".
    chosen = [path for path in names if variant is None or re.search(rf"\.{re.escape(variant)}[.-]", path.name)]
    # Without a variant asked for, a folder may hold "model.safetensors" next to "model.fp16.safetensors".
    plain = [path for path in chosen if path.name.count(".") == 1]
    files = chosen if variant else plain
    if not files:
        wanted = f"*.{variant}.safetensors" if variant else "*.safetensors"
        has = f" (it has {', '.join(path.name for path in names)})" if names else ""
        raise UserError(f"model.name: {component} has no weights {wanted}{has}; {NOT_WHOLE}")
    return files


def reference_digest(folder: Path, variant: str | None = None) -> str:
    """SHA-256 over the denoiser's weight files: who the reference is, whatever precision it is loaded in."""
    return _sha256(weight_files(folder / layout_of(folder).denoiser, variant))


def component_digests(folder: Path, variant: str | None = None) -> dict[str, str]:
    """SHA-256 of everything an image or a training step depends on, by component: "unet", "vae", "tokenizer", ...

    Of a component with weights these are its config.json and the weights that are loaded, of any other all its files.
    """
    layout = layout_of(folder)
    components = {*layout.weights, *(config.partition("/")[0] for config in layout.configs)}
    return {name: _component_digest(folder / name, variant, name in layout.weights) for name in sorted(components)}


def _component_digest(component: Path, variant: str | None, has_weights: bool) -> str:
    if has_weights:
        parts = {"config.json": [component / "config.json"], "weights": weight_files(component, variant)}
    else:
        files = sorted(path for path in component.rglob("*") if path.is_file() and not path.name.startswith("."))
        parts = {path.relative_to(component).as_posix(): [path] for path in files}
    lines = (f"{name} {_sha256(files)}\n" for name, files in parts.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(files: Sequence[Path]) -> str:
    """Of the files as one; read once a process, unless they have changed."""
    states = ((file, file.stat()) for file in files)
    return _read_sha256(tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))


@cache
def _read_sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _size, _mtime in files:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
