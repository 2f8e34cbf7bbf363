"""The policy store: numbered, immutable versions of the trained weights, each with the digest that proves it.

The train worker publishes, generator replicas load. A version is `policies/00003/policy.safetensors` and its marker
`policy.json`, written last: without marker, no version. Version 0 is the base model; its digest is the reference
digest, beside which its marker has those of all components, and it has no weights of its own.

Weights that nobody needs any more may go (`retention.py`), markers stay: a version whose weights are gone is still
published, its digest known, and nothing else can ever be published in its place.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from itertools import takewhile
from typing import TYPE_CHECKING

from kto_ray.errors import UserError
from kto_ray.records import PolicyRef
from kto_ray.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BASE_MARKER = "00000/policy.json"


class DigestError(RuntimeError):
    """Bytes, weights or a model are not what their digest says."""


class PolicyStore:
    """Publishes and resolves policies in `<run>/policies`."""

    def __init__(self, run: Storage) -> None:
        self.storage = run / "policies"

    def publish_base(self, reference_digest: str, components: Mapping[str, str]) -> PolicyRef:
        """Make the base model version 0.

        Args:
            components: digest of each component of the base model; a run that knows none yet is given these.

        Raises:
            DigestError: the run began with another base model, which stands still.
        """
        self.require_base(reference_digest, components)
        if self.base_components() is None:
            if self.storage.exists(BASE_MARKER):
                logger.warning(
                    "%s was begun by a version that kept a digest of the denoiser only; what the model's other "
                    "components are now is kept from here on",
                    self.storage,
                )
            self.storage.write_json(
                BASE_MARKER, {"version": 0, "digest": reference_digest, "components": dict(components)}
            )
        return PolicyRef(0, reference_digest)

    def require_base(self, reference_digest: str, components: Mapping[str, str]) -> None:
        """Raises DigestError, with what `base_differs` says."""
        if differs := self.base_differs(reference_digest, components):
            raise DigestError(differs)

    def base_differs(self, reference_digest: str, components: Mapping[str, str]) -> str | None:
        """In words, which components are not those of the base model that the run began with; None: all are."""
        if not self.storage.exists(BASE_MARKER):
            return None
        began = self.base_components() or {}
        changed = [name for name in began if began[name] != components.get(name)]
        if not changed and self.resolve(0).digest != reference_digest:
            changed = ["denoiser"]
        if not changed:
            return None
        verb = "is" if len(changed) == 1 else "are"
        return (
            f"the base model has changed since the run began: {', '.join(sorted(changed))} {verb} not what policy 0 of "
            f"{self.storage} stands for"
        )

    def base_components(self) -> dict[str, str] | None:
        """Digests of the base model's components; None: there is no base, or a run of version 0.1.0 has begun it."""
        marker = self.storage.read_json(BASE_MARKER) if self.storage.exists(BASE_MARKER) else {}
        components: dict[str, str] | None = marker.get("components")
        return components

    def publish(self, version: int, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> PolicyRef:
        """Store weights as the given version, marker last. Publishing the same weights again changes nothing, also
        where they have gone since.

        Raises:
            DigestError: the version exists already with other weights.
        """
        data = _file_of(tensors, metadata)
        policy = PolicyRef(version, hashlib.sha256(data).hexdigest())
        if not self.storage.exists(f"{version:05}/policy.json"):
            self.storage.write(f"{version:05}/policy.safetensors", data)
        return self._mark(policy)

    def _mark(self, policy: PolicyRef) -> PolicyRef:
        marker = f"{policy.version:05}/policy.json"
        if self.storage.exists(marker):
            published = self.resolve(policy.version)
            if published != policy:
                raise DigestError(
                    f"policy {policy.version} of {self.storage} has digest {published.digest}, "
                    f"not {policy.digest}: it is immutable"
                )
        else:
            self.storage.write_json(marker, {"version": policy.version, "digest": policy.digest})
        return policy

    def resolve(self, version: int) -> PolicyRef:
        """The policy of a version. Raises FileNotFoundError when it is not (wholly) published."""
        marker = self.storage.read_json(f"{version:05}/policy.json")
        return PolicyRef(marker["version"], marker["digest"])

    def versions(self) -> list[int]:
        """The published versions, ascending."""
        return [int(name) for name in self.storage.names() if self.storage.exists(f"{name}/policy.json")]

    def newest(self) -> int:
        """The last of the published versions; 0 where nothing is."""
        names = reversed(self.storage.names())
        return next((int(name) for name in names if self.storage.exists(f"{name}/policy.json")), 0)

    def has_weights(self, version: int) -> bool:
        """Whether a published version can still be loaded. The base always can."""
        return version == 0 or self.storage.exists(f"{version:05}/policy.safetensors")

    def drop_before(self, version: int) -> None:
        """Remove the weights of all versions before this one, oldest first; markers stay.

        One file goes at a time, and what is gone are always the first versions, wherever a crash comes: the next call
        looks back until it meets one of them.

        Raises:
            UserError: one cannot be removed, or the run's lease was lost.
        """
        self.storage.require_mine()
        for old in reversed(list(takewhile(self.has_weights, range(version - 1, 0, -1)))):
            self.storage.delete(f"{old:05}/policy.safetensors")

    def load(self, policy: PolicyRef) -> "dict[str, Tensor] | None":
        """Weights of a policy, verified; None for the base model.

        Raises:
            DigestError: they are not what the policy's digest says.
            FileNotFoundError: there is no such version.
            UserError: there was; its weights are gone.
        """
        return None if policy.version == 0 else self.weights_of(policy, self.read(policy))

    def read(self, policy: PolicyRef) -> bytes:
        """The file of a policy other than the base, as it is.

        Raises:
            FileNotFoundError, UserError: see `load`.
        """
        try:
            return self.storage.read(f"{policy.version:05}/policy.safetensors")
        except FileNotFoundError:
            if not self.storage.exists(f"{policy.version:05}/policy.json"):
                raise
            raise UserError(
                f"policy {policy.version} of {self.storage} has no weights any more: keep_policies lets go of what is "
                "older than the last so many policies; use one that is still there"
            ) from None

    def weights_of(self, policy: PolicyRef, data: bytes | memoryview) -> "dict[str, Tensor]":
        """What is in the file of a policy. Raises DigestError: it is another one's, or damaged."""
        import safetensors.torch

        if (digest := hashlib.sha256(data).hexdigest()) != policy.digest:
            raise DigestError(
                f"policy {policy.version} of {self.storage} has digest {digest}, asked for {policy.digest}"
            )
        return safetensors.torch.load(bytes(data))  # of bytes, no copy


def digest_of(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> str:
    """What weights would have as their digest, were they published."""
    return hashlib.sha256(_file_of(tensors, metadata)).hexdigest()


def _file_of(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> bytes:
    import safetensors.torch

    return _canonical(safetensors.torch.save(dict(tensors), metadata=dict(metadata)))


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with a sorted header: the library writes metadata in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]
