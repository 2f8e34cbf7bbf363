"""What is exported: a published policy of a run and the model it was trained on, both proven before a byte is written.

`formats.py` writes it down and `card.py` describes it. Weights are proven against the digest in the policy's marker,
the model against those that the run began with, as replicas and train workers do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kto_ray.config import Model, RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.family import Family, index_of
from kto_ray.errors import UserError
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.records import PolicyRef
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A policy that is there, and where its base model lies on this machine."""

    run: Storage
    config: RunConfig
    policy: PolicyRef
    tensors: Mapping[str, "Tensor"]
    """As they were published: float32, by name."""
    model: Model
    """The run's, or what takes its place here."""
    folder: Path
    """The base model's."""

    @cached_property
    def family(self) -> type[Family]:
        return family_of(self.folder, self.model)

    @property
    def part(self) -> str:
        """The component that was trained."""
        return self.family.part

    @property
    def pipeline(self) -> str:
        """The class that the base model's folder names."""
        return str(index_of(self.folder)["_class_name"])

    @property
    def is_lora(self) -> bool:
        return self.config.train.adapter.kind == "lora"

    @property
    def alpha(self) -> float:
        return self.config.train.adapter.alpha or self.config.train.adapter.rank

    @property
    def scale(self) -> float:
        """By which the adapter's product is multiplied."""
        return self.alpha / self.config.train.adapter.rank

    @property
    def hub_name(self) -> str | None:
        """The base model's name on the model hub; None: it was taken from a folder."""
        return self.model.name if source.local_folder(self.model) is None else None

    @property
    def base_digest(self) -> str:
        """Of what the denoiser was before it was trained."""
        return source.reference_digest(self.folder, self.model)

    def file(self) -> bytes:
        """The published file, as its digest says."""
        return PolicyStore(self.run).storage.read(f"{self.policy.version:05}/policy.safetensors")


def find(run: Storage, version: int | None = None, model: str | None = None) -> Published:
    """A published policy and its base model.

    Args:
        version: None is the newest.
        model: folder or hub name of the base model, where it is not what the run's configuration says any more.

    Raises:
        UserError: no such run or policy, weights that are gone, or a model that is not the one that the run began with.
    """
    config = saved_config(run)
    store = PolicyStore(run)
    policy = _resolve(store, version)
    here = config.model if model is None else config.model.model_copy(update={"name": model, "revision": None})
    try:
        tensors = store.load(policy)
        folder = source.resolve(here)
        source.check(folder, here)
        store.require_base(source.reference_digest(folder, here), source.component_digests(folder, here))
    except DigestError as error:
        raise UserError(f"{error}; nothing was exported. Another folder or hub name can be given as --model") from error
    except UserError as error:
        moved = str(error).startswith("model.name") and model is None
        raise UserError(f"{error}. A model that has moved can be given as --model" if moved else str(error)) from error
    assert tensors is not None  # as that of version 0 alone is
    return Published(run, config, policy, tensors, here, folder)


def _resolve(store: PolicyStore, version: int | None) -> PolicyRef:
    newest = store.newest()
    if newest == 0:
        raise UserError(
            f"run: {store.storage} has no policy yet but 0, the base model itself: there is nothing to export"
        )
    if version == 0:
        raise UserError(
            f"--policy: 0 is the base model itself, there is nothing to export; give one from 1 to {newest}"
        )
    try:
        return store.resolve(newest if version is None else version)
    except FileNotFoundError:
        raise UserError(f"--policy: {store.storage} has no policy {version}; it has those from 1 to {newest}") from None
