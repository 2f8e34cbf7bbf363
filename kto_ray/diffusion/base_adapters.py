"""LoRAs to start from (`model.adapters`): they become a part of the base model before anything is drawn or trained.

`source.py` has them downloaded, checked by their headers and counted into the model's digests; `loading.py` has them
added to the weights, so that nobody after it knows of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kto_ray.config import Model
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.hub import download_of
from kto_ray.diffusion.weights import Header, read_header, weight_files
from kto_ray.errors import UserError

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
        if _folder_or_file(adapter.name) is None:
            _snapshot(adapter.name)


def all_at_hand(model: Model) -> bool:
    """Whether no adapter needs a download. Raises UserError: one is neither here nor a name that the hub could have."""
    places = [_folder_or_file(adapter.name) for adapter in model.adapters]  # all are looked at, also after a None
    return None not in places


def files(model: Model) -> list[Path]:
    """Raises UserError: see `all_at_hand`; a folder has no adapter, or several; one is still to be downloaded."""
    return [_file(adapter.name) for adapter in model.adapters]


def _file(name: str) -> Path:
    found = _folder_or_file(name)
    if found is None:
        raise UserError(f"{FIELD}: {name!r} is not downloaded")
    if found.is_file():
        return found
    there = sorted(path.name for path in found.glob(f"*{SUFFIX}"))
    chosen = next((preferred for preferred in PREFERRED if preferred in there), None)
    if chosen is None and len(there) != 1:
        has = f"several, {', '.join(there[:3])}" if there else f"no *{SUFFIX}"
        raise UserError(f"{FIELD}: {found} has {has}; give the file of one LoRA")
    return found / (chosen or there[0])


def _folder_or_file(name: str) -> Path | None:
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == SUFFIX):
        return path
    if path.is_file():
        raise UserError(f"{FIELD}: {name!r} is no {SUFFIX} file; only these are read")
    if path.is_absolute() or path.suffix == SUFFIX or name.startswith(".") or name.count("/") != 1:
        raise UserError(
            f"{FIELD}: no file or folder {name!r}; give a {SUFFIX} file of a LoRA, a folder that has one, or a hub name"
        )
    return _downloaded(name)


def _downloaded(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{SUFFIX}"], local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _snapshot(name: str) -> None:
    from huggingface_hub import snapshot_download

    with download_of(FIELD, name, "it is no local file or folder; check the name, the network, HF_TOKEN"):
        snapshot_download(name, allow_patterns=[f"*{SUFFIX}"])


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
