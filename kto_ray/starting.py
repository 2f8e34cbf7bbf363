"""`start_from: RUN@policy`: a trained policy becomes a part of the base model that another run begins with.

    started   before anything is checked: `model.adapters` has the policy as its last; reads only
    kept      once the run's folder is open: the same, of a copy in start/ of the run's folder

So the policy is fused into the base's weights (`diffusion/base_adapters.py`) wherever the model is loaded: policy 0 of
the new run is what it begins with, a `fixed` reference is it, too, and the adapter that is trained begins at zero. The
run's config.yaml has both the field and the adapter. The earlier run may go on, or go away.
"""

import hashlib

from kto_ray.config import BaseAdapter, RunConfig
from kto_ray.diffusion import source
from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage

FIELD = "start_from"
MARKER = "start.json"
"""In a run's folder: which policy it began with, and the files that were added to its base for that."""
SUFFIX = ".safetensors"


def started(config: RunConfig) -> RunConfig:
    """The configuration with the policy of `start_from` in its base model; without one, as it is.

    Raises:
        UserError: there is no such run or policy, its weights are gone or not what they were, it is no adapter, or one
            of another model.
    """
    if config.start_from is None:
        return config
    run = Storage(config.runs_folder) / config.run
    if run.exists(MARKER):
        return _with(config, [_address(run, name) for name in run.read_json(MARKER)["files"]])
    return _with(config, _found(config, config.start_from)[2])


def _found(config: RunConfig, start_from: str) -> tuple[Storage, PolicyRef, list[str]]:
    """The earlier run, its policy, and the files that are to be added to the base: proved, the policy's the last."""
    origin, policy = _named(start_from)
    saved = saved_config(origin, FIELD)
    added = _added(config, saved, origin)
    if saved.train.adapter.kind != "lora":
        raise UserError(
            f"{FIELD}: {origin} trained all of its denoiser, which cannot be added to another; begin with it as the "
            f"base model: kto-ray export {origin} --policy {policy.version} --to merged --out FOLDER, and model=FOLDER"
        )
    store = PolicyStore(origin)
    if hashlib.sha256(store.read(policy)).hexdigest() != policy.digest:
        raise UserError(f"{FIELD}: policy {policy.version} of {origin} is damaged: its weights are not those published")
    return origin, policy, [*added, _address(store.storage, f"{policy.version:05}/policy{SUFFIX}")]


def kept(config: RunConfig, run: Storage) -> RunConfig:
    """The same, of copies in the run's folder, which are made where there are none.

    Args:
        config: as it was given.
        run: its folder, whose lease is held.
    """
    if config.start_from is None or run.exists(MARKER):
        return started(config)
    origin, policy, addresses = _found(config, config.start_from)  # once: the earlier run may publish meanwhile
    files = []
    for address in addresses:
        folder, _, name = address.rpartition("/")
        data = Storage(folder).read(name)
        files.append(f"start/{hashlib.sha256(data).hexdigest()}{SUFFIX}")
        run.write(files[-1], data)
    began = {"run": str(origin), "policy": policy.version, "digest": policy.digest}
    run.write_json(MARKER, began | {"files": files})
    return started(config)


def _named(start_from: str) -> tuple[Storage, PolicyRef]:
    """The run and the policy that are meant; the newest, where none is named."""
    name, _, version = start_from.rpartition("@")
    is_named = bool(name) and version.isdigit()
    origin = Storage(name if is_named else start_from)
    saved_config(origin, FIELD)
    store = PolicyStore(origin)
    number = int(version) if is_named else store.newest()
    if number == 0:
        why = "is its base model" if is_named else "is all that there is, its base model"
        raise UserError(f"{FIELD}: policy 0 of {origin} {why}; name a trained one, RUN@POLICY, or leave {FIELD} out")
    try:
        return origin, store.resolve(number)
    except FileNotFoundError as error:
        raise UserError(f"{FIELD}: {origin} has no policy {number}; its newest is {store.newest()}") from error


def _added(config: RunConfig, saved: RunConfig, origin: Storage) -> list[str]:
    """Files that the earlier run itself had started from. Raises UserError where its base was another model."""
    began = origin.read_json(MARKER)["files"] if origin.exists(MARKER) else []
    own = saved.model.adapters[: len(saved.model.adapters) - len(began)]
    same = config.model == saved.model.model_copy(update={"adapters": own})
    if not same and not began and (folder := source.local_folder(config.model)) is not None:  # it may have moved
        same = PolicyStore(origin).base_components() == source.component_digests(folder, config.model)
    if not same:
        raise UserError(
            f"{FIELD}: the policies of {origin} are adapters of another model ({saved.model.name}) than this run's "
            f"({config.model.name}); give the same model, with the same model.adapters"
        )
    return [_address(origin, name) for name in began]


def _address(folder: Storage, name: str) -> str:
    return str(folder.local / name) if folder.local is not None else f"{folder.uri.rstrip('/')}/{name}"


def _with(config: RunConfig, files: list[str]) -> RunConfig:
    adapters = (*config.model.adapters, *(BaseAdapter(name=file) for file in files))
    return config.model_copy(update={"model": config.model.model_copy(update={"adapters": adapters})})
