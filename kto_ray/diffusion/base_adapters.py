"""LoRAs to start from (`model.adapters`): they become a part of the base model before anything is drawn or trained.

`source.py` has them downloaded, checked by their headers and counted into the model's digests; `loading.py` has them
added to the weights, so that nobody after it knows of them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kto_ray.config import BaseAdapter, Model
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.hub import cache_folder, download_of
from kto_ray.diffusion.weights import Header, read_header, weight_files
from kto_ray.errors import UserError
from kto_ray.storage import Storage

FIELD = "model.adapters"
SUFFIX = ".safetensors"
PREFERRED = ("pytorch_lora_weights.safetensors", "policy.safetensors")
"""What diffusers and this project call an adapter's file in a folder of several."""
DOWN = ".lora_A.weight"
MARKS = ("lora_", ".lora.", ".lokr_")
AGAIN = "copy or download it again"


def download(model: Model) -> None:
    """Raises UserError: an adapter is neither here nor on the hub."""
    for adapter in model.adapters:
        if _at_hand(adapter) is None:
            _download(adapter)


def all_at_hand(model: Model) -> bool:
    """Whether no adapter needs a download. Raises UserError: one is neither here nor a name that the hub could have."""
    files = [_at_hand(adapter) for adapter in model.adapters]  # all are looked at, also after a None
    return None not in files


def files(model: Model) -> list[Path]:
    """Raises UserError: see `all_at_hand`; a folder has no adapter, or several; one is still to be downloaded."""
    found = [(adapter.name, _at_hand(adapter)) for adapter in model.adapters]
    for name, file in found:
        if file is None:
            raise UserError(f"{FIELD}: {name!r} is not downloaded")
    return [file for _, file in found if file is not None]


def _at_hand(adapter: BaseAdapter) -> Path | None:
    """Its file, where it needs no download. Raises UserError: there is none, and it is no hub name."""
    name, path = adapter.name, Path(adapter.name)
    if "://" in name:
        return _fetched(name)
    if path.is_dir():
        return path / _chosen(adapter, [file.name for file in path.glob(f"*{SUFFIX}")])
    if path.is_file():
        if path.suffix != SUFFIX:
            raise UserError(f"{FIELD}: {name!r} is no {SUFFIX} file; only these are read")
        return path
    if path.is_absolute() or path.suffix == SUFFIX or name.startswith(".") or name.count("/") != 1:
        raise UserError(
            f"{FIELD}: no file or folder {name!r}; give a {SUFFIX} file of a LoRA, a folder that has one, or a hub name"
        )
    return _downloaded(adapter)


def _fetched(uri: str) -> Path:
    """Of a file on storage, a copy on this machine: for files that stay as they are, such as published policies.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    folder, _, name = uri.rpartition("/")
    copy = cache_folder() / "adapters" / hashlib.sha256(uri.encode()).hexdigest() / name
    if not copy.exists():
        try:
            data = Storage(folder).read(name)
        except FileNotFoundError as error:
            raise UserError(f"{FIELD}: there is no file {uri}") from error
        Storage(str(copy.parent)).write(name, data)
    return copy


def _chosen(adapter: BaseAdapter, there: Iterable[str]) -> str:
    """Which of the files of a folder. Raises UserError: it has none, or several and none is named."""
    names = sorted(there)
    if adapter.file is not None:
        if adapter.file not in names:
            raise UserError(f"{FIELD}: {adapter.name} has no {adapter.file} (it has {', '.join(names[:3]) or 'none'})")
        return adapter.file
    chosen = next((preferred for preferred in PREFERRED if preferred in names), None)
    if chosen is None and len(names) != 1:
        has = f"several, {', '.join(names[:3])}" if names else f"no *{SUFFIX}"
        raise UserError(f"{FIELD}: {adapter.name} has {has}; give one of a LoRA, as {{name: ..., file: ...}}")
    return chosen or names[0]


def _downloaded(adapter: BaseAdapter) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(adapter.name, revision=adapter.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    there = [file.name for file in folder.glob(f"*{SUFFIX}")]
    wanted = [adapter.file] if adapter.file is not None else there
    # What is there may be left of a download of something else.
    return folder / _chosen(adapter, there) if wanted and set(wanted) <= set(there) else None


def _download(adapter: BaseAdapter) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    with download_of(FIELD, adapter.name, "it is no local file or folder; check the name, the network, HF_TOKEN"):
        there = HfApi().list_repo_files(adapter.name, revision=adapter.revision)
    file = _chosen(adapter, [name for name in there if name.endswith(SUFFIX) and "/" not in name])
    with download_of(FIELD, adapter.name, "check the name, the network, HF_TOKEN"):
        hf_hub_download(adapter.name, file, revision=adapter.revision)


def check(model: Model, folder: Path, family: type[Family]) -> None:
    """Whether the adapters are such of this model, as far as headers tell.

    Raises:
        UserError: a file is missing, truncated, no LoRA, or one of another model.
    """
    if model.adapters and not family.takes_adapters:
        raise UserError(f"{FIELD}: a {family.__name__} takes none; leave them out")
    headers = [(file, read_header(file, FIELD, AGAIN)) for file in files(model)]
    parts = weight_files(folder / family.part, model.variant) if headers else []
    weights = {name: tensor for part in parts for name, tensor in read_header(part, "model.name", AGAIN).items()}
    for file, header in headers:
        if not any(mark in name for name in header for mark in MARKS):
            raise UserError(
                f"{FIELD}: {file} is no LoRA (it has {', '.join(sorted(header)[:3])}); give the file of one"
            )
        _require_match(file, header, weights, f"{family.part}.")


def _require_match(file: Path, header: Mapping[str, Header], weights: Mapping[str, Header], prefix: str) -> None:
    """Of files whose names are those of diffusers; of others, `fuse` tells."""
    adapted = {
        name[len(prefix) : -len(DOWN)]: name for name in header if name.startswith(prefix) and name.endswith(DOWN)
    }
    fitting = [
        name
        for layer, name in adapted.items()
        if f"{layer}.weight" in weights and weights[f"{layer}.weight"].shape[1:2] == header[name].shape[1:2]
    ]
    if adapted and not fitting:
        raise _other_model(file, f"its {next(iter(adapted.values()))} fits nothing there")


def _other_model(file: Path, why: str) -> UserError:
    return UserError(
        f"{FIELD}: {file} is a LoRA of another model ({why}); give one that was trained on this model.name"
    )


def fuse(pipeline: Any, model: Model) -> None:
    """Add the adapters to the weights of a pipeline, one after the other.

    Raises:
        UserError: one does not fit the model.
    """
    for adapter, file in zip(model.adapters, files(model), strict=True):
        try:
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
            raise _other_model(file, f"{type(error).__name__}: {error}") from error
        adapted = list(pipeline.get_list_adapters())
        if not adapted:
            raise _other_model(file, "none of its weights fits anything there")
        pipeline.fuse_lora(components=adapted, lora_scale=adapter.scale)
        pipeline.unload_lora_weights()
