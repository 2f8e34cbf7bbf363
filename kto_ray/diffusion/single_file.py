"""A single checkpoint, as model sites offer them, becomes a diffusers folder, once; everything else sees that folder.

`source.py` asks here where `model.name` is a file. What it is of is found from its header alone, so that a dry run can
refuse what is not supported. The folder lies under $KTO_RAY_CACHE (or ~/.cache/kto-ray) and is made of two things: the
weights, which diffusers' `from_single_file` reads in the file's own precision, and what the file has not: configs,
tokenizers and perhaps text encoders, which are copied from `model.config`, or from the hub's folder of that kind.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kto_ray.config import Model
from kto_ray.diffusion.checkpoint_kinds import ADVICE, Checkpoint, read_checkpoint
from kto_ray.diffusion.components import components, config_file
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.family import Family, index_of
from kto_ray.diffusion.hub import cache_folder, configs_of
from kto_ray.diffusion.noise import scheduler_config
from kto_ray.diffusion.weights import NOT_WHOLE, weight_files
from kto_ray.errors import UserError

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", ".gguf", *PICKLED)


def is_single_file(name: str) -> bool:
    """Whether `model.name` names a file, be it there or not."""
    return not Path(name).is_dir() and (Path(name).is_file() or Path(name).suffix in SUFFIXES)


def check(model: Model) -> Checkpoint:
    """What the file is that `model.name` names; reads its header.

    Raises:
        UserError: there is no such file, or it is not a whole model of a kind that can be read.
    """
    file = Path(model.name)
    if not file.is_file():
        raise UserError(f"model.name: no file {model.name!r}; {ADVICE}")
    if file.suffix != ".safetensors":
        why = "it is pickled, which is not read" if file.suffix in PICKLED else "only .safetensors files are read"
        raise UserError(f"model.name: {file} cannot be loaded: {why}; give the model's .safetensors file")
    if model.variant is not None:
        raise UserError(f"model.variant: {model.variant!r}, but {file} is a single file, which has none; leave it out")
    return read_checkpoint(file)


def known(model: Model) -> Path | None:
    """The folder of a file, where it is made already. Neither downloads nor makes anything.

    Raises:
        UserError: see `check`; or `model.config` is not the folder of such a model.
    """
    checkpoint = check(model)
    config = _config(checkpoint, model, download=False)
    if config is None:
        return None
    target = _target(config, model)
    return target if target.is_dir() else None


def resolve(model: Model) -> Path:
    """The folder of a file; made where it is not there yet. Safe to be called by several processes at once.

    Raises:
        UserError: see `check`; or configs and components that the file lacks cannot be had.
    """
    checkpoint = check(model)
    config = _config(checkpoint, model, download=True)
    assert config is not None
    target = _target(config, model)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:  # many gigabytes in memory: one process a machine at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as made:
                _make(checkpoint, config, family_of(config, model), Path(made) / "model")
                _put(Path(made) / "model", target)
    return target


def _put(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:  # another machine, where locks do not reach, was faster
        if not target.is_dir():
            raise


def _config(checkpoint: Checkpoint, model: Model, download: bool) -> Path | None:
    """The folder that tells what the file does not; None: it needs a download."""
    kind, needed = checkpoint.kind, f"a diffusers folder of a {checkpoint.kind.pipeline}"
    if model.config is not None:
        config = Path(model.config)
        if not (config / "model_index.json").is_file():
            raise UserError(f"model.config: {model.config!r} is no diffusers folder; give {needed}")
    elif checkpoint.repository is None:
        raise UserError(
            f"model.config: {checkpoint.file} does not tell all of its configuration; give {needed} that has the same, "
            "to take it from"
        )
    else:
        advice = "it has the configs of such files; give model.config, a diffusers folder of the same kind"
        found = configs_of(checkpoint.repository, None, download, "model.config", advice)
        if found is None:
            return None
        config = found
    name = index_of(config)["_class_name"]
    if name != kind.pipeline:
        raise UserError(
            f"model.config: {config} holds a {name}, but {checkpoint.file} is a {kind.pipeline}; give {needed}"
        )
    _require_rest(checkpoint, config, family_of(config, model))
    scheduler = scheduler_config(config)
    for field, value in checkpoint.scheduled.items():
        if scheduler.get(field) != value:
            raise UserError(
                f"model.config: {checkpoint.file} was trained with {field} {value}, but the scheduler of {config} has "
                f"{scheduler.get(field)}; give {needed} whose scheduler has it"
            )
    return config


def _require_rest(checkpoint: Checkpoint, config: Path, family: type[Family]) -> None:
    """Raises UserError: the folder has not all that the file lacks."""
    for name, kind in components(config, family).items():
        told = config_file(config / name, kind)
        if not told.is_file():
            raise UserError(f"model.config: {told} is missing; {NOT_WHOLE}")
        if kind == "model" and name not in checkpoint.dtypes:
            try:
                weight_files(config / name, None)
            except UserError as error:
                raise UserError(
                    f"model.config: {checkpoint.file} has no {name}, and neither has {config}; give a diffusers folder "
                    f"of a {checkpoint.kind.pipeline} with weights ({error})"
                ) from error


def _target(config: Path, model: Model) -> Path:
    """By path, size and time: a file's bytes are too many to be read by every actor, and the folder's digests tell
    whose weights they really are."""
    used = [Path(model.name), *sorted(path for path in config.rglob("*") if path.is_file())]
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in used]
    return cache_folder() / "models" / hashlib.sha256(json.dumps([states, model.family]).encode()).hexdigest()


def _make(checkpoint: Checkpoint, config: Path, family: type[Family], folder: Path) -> None:
    listed = components(config, family)
    loaded = {name: dtype for name, dtype in checkpoint.dtypes.items() if name in listed}
    folder.mkdir()
    for name, kind in listed.items():
        if name not in loaded:
            _copy(config / name, kind == "model", folder / name)
    for dtype in sorted(set(loaded.values())):
        names = [name for name in loaded if loaded[name] == dtype]
        left_out = {name: None for name, kind in listed.items() if kind == "model" and name not in names}
        for name, module in _load(checkpoint, config, dtype, names, left_out | dict(family.left_out)).items():
            module.save_pretrained(folder / name)
            # Not as saved, which tells of this machine, too: digests are the same on all.
            shutil.copyfile(config / name / "config.json", folder / name / "config.json")
    index = index_of(config)
    index |= {name: [None, None] for name in family.left_out if isinstance(index.get(name), list)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy(component: Path, has_weights: bool, target: Path) -> None:
    """A component that the file has not, of the folder that has."""
    used = weight_files(component, None) if has_weights else []
    unused = {path.name for path in component.iterdir() if path.suffix in SUFFIXES and has_weights and path not in used}
    shutil.copytree(component, target, ignore=lambda _folder, names: unused & set(names))


def _load(
    checkpoint: Checkpoint, config: Path, dtype: str, names: list[str], left_out: Mapping[str, Any]
) -> dict[str, Any]:
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from transformers import PreTrainedModel

    failures = (LookupError, ValueError, TypeError, RuntimeError, OSError, AttributeError, SingleFileComponentError)
    pipeline_class = getattr(diffusers, checkpoint.kind.pipeline)
    try:
        pipeline = pipeline_class.from_single_file(
            str(checkpoint.file),
            config=str(config),
            torch_dtype=getattr(torch, dtype),
            local_files_only=True,
            **left_out,
        )
        modules = {name: getattr(pipeline, name) for name in names}
        for module in modules.values():
            if isinstance(module, PreTrainedModel):
                module.tie_weights()  # files have what is shared once
            module.to("cpu")  # where weights are missing, diffusers leaves placeholders, which cannot be moved
    except NotImplementedError as error:
        raise UserError(
            f"model.name: {checkpoint.file} lacks weights of a model of the size of {config}; copy or download it "
            "again, or give as model.config a folder of the same kind and size"
        ) from error
    except failures as error:
        raise UserError(
            f"model.name: {checkpoint.file} could not be read with the configs of {config}; give as model.config a "
            f"folder of the same kind and size ({type(error).__name__}: {error})"
        ) from error
    return modules
