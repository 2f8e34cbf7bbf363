"""Where a base model lies, whether it is whole, and its digest. Cheap: reads headers and bytes, loads no weights.

`resolve` turns `model.name` of the configuration ("shapes", a folder, a hub name, or through `single_file.py` a single
checkpoint) into a local diffusers folder; `check` names what is missing or broken before machine time is spent;
`reference_digest` and `component_digests` are the proof of identity that every replica and train worker compares with
the run's. `weights.py` knows how a component's weights lie in its folder.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kto_ray.config import Model
from kto_ray.diffusion import base_adapters, single_file
from kto_ray.diffusion.components import components, config_file
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.hub import configs_of, download_of
from kto_ray.diffusion.weights import NOT_WHOLE, check_weights, require_variant, weight_files
from kto_ray.errors import UserError
from kto_ray.shapes import MODEL_FOLDER


def resolve(model: Model) -> Path:
    """The local folder of a model. A hub name is downloaded into the hub's cache, a single file made a folder of; so
    that adapters are at hand, they are downloaded, too.

    Raises:
        UserError: no such folder or file, or the hub does not have it (or cannot be reached).
    """
    base_adapters.download(model)
    if single_file.is_single_file(model.name):
        return single_file.resolve(model)
    local = _local_folder(model)
    return local if local is not None else _download(model)


def local_folder(model: Model) -> Path | None:
    """The folder of a model that needs no download, nor to be made of a single file; or None.

    Raises:
        UserError: it is neither a folder, nor a file that can be read, nor a name that the hub could have.
    """
    at_hand = base_adapters.all_at_hand(model)
    folder = single_file.known(model) if single_file.is_single_file(model.name) else _local_folder(model)
    return folder if at_hand else None


def configs(model: Model) -> Path | None:
    """A folder that has at least the model's configurations, for which of a hub name no weights are downloaded.

    None: it is a single file that no folder was made of yet.

    Raises:
        UserError: see `resolve`.
    """
    if (folder := local_folder(model)) is not None or single_file.is_single_file(model.name):
        return folder
    return configs_of(model.name, model.revision)


def _local_folder(model: Model) -> Path | None:
    if model.config is not None:
        raise UserError(f"model.config: {model.config!r} is for a single file, and model.name is none; leave it out")
    if model.name == "shapes":
        return MODEL_FOLDER
    folder = Path(model.name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.name.startswith(".") or model.name.count("/") != 1:
        raise UserError(
            f"model.name: no folder {model.name!r}; give a diffusers pipeline folder, a .safetensors file, a hub name "
            "such as 'stable-diffusion-v1-5/stable-diffusion-v1-5', or 'shapes'"
        )
    return None


def _download(model: Model) -> Path:
    from diffusers import DiffusionPipeline

    advice = "it is no local folder; check the name, the network, HF_TOKEN"
    with download_of("model.name", model.name, advice):
        return Path(
            DiffusionPipeline.download(model.name, revision=model.revision, variant=model.variant, use_safetensors=True)
        )


def check(folder: Path, model: Model) -> type[Family]:
    """Make sure that a pipeline folder is whole and of a family that can be trained; returns its family.

    Raises:
        UserError: names the file that is missing or truncated, or the unsupported family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"model.name: {folder} is not a diffusers pipeline folder: it has no model_index.json; "
            "give the folder that contains it"
        )
    _read_json(index)
    family = family_of(folder, model)
    listed = components(folder, family)
    for needed in ((family.part,), ("vae",), ("scheduler",), tuple(family.reads)):
        if not any(name in listed for name in needed):
            raise UserError(f"model.name: {index} lists no {needed[-1]}, as a {family.__name__} has; {NOT_WHOLE}")
    for component, kind in listed.items():
        _read_json(config_file(folder / component, kind))
    models = [folder / component for component, kind in listed.items() if kind == "model"]
    require_variant(models, model.variant)
    for component_folder in models:
        check_weights(component_folder, model.variant)
    family.check(folder)
    base_adapters.check(model, folder, family)
    return family


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


def reference_digest(folder: Path, model: Model) -> str:
    """SHA-256 over the denoiser's weight files: who the reference is, whatever precision it is loaded in. With
    `model.adapters`, over these, too."""
    weights = _sha256(weight_files(folder / family_of(folder, model).part, model.variant))
    return _digest_of([weights, _adapters_digest(model)]) if model.adapters else weights


def component_digests(folder: Path, model: Model) -> dict[str, str]:
    """SHA-256 of everything an image or a training step depends on, by component: "unet", "vae", "tokenizer", ...

    Of a component with weights these are its config.json and the weights that are loaded, of any other all its files.
    `model.adapters`, if there are any, are one more.
    """
    listed = components(folder, family_of(folder, model))
    digests = {name: _component_digest(folder / name, model.variant, kind == "model") for name, kind in listed.items()}
    return digests | ({"adapters": _adapters_digest(model)} if model.adapters else {})


def _adapters_digest(model: Model) -> str:
    files = zip(model.adapters, base_adapters.files(model), strict=True)
    return _digest_of([f"{adapter.scale!r} {_sha256([file])}" for adapter, file in files])


def _digest_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _component_digest(component: Path, variant: str | None, has_weights: bool) -> str:
    if has_weights:
        parts = {"config.json": [component / "config.json"], "weights": weight_files(component, variant)}
    else:
        files = sorted(path for path in component.rglob("*") if path.is_file() and not path.name.startswith("."))
        parts = {path.relative_to(component).as_posix(): [path] for path in files}
    return _digest_of([f"{name} {_sha256(files)}" for name, files in parts.items()])


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
