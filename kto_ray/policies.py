"""The policy store: numbered, immutable versions of the trained weights, each with the digest that proves it.

The train worker publishes, generator replicas load. A version is `policies/00003/policy.safetensors` and its marker
`policy.json`, written last: without marker, no version. Version 0 is the base model; its digest is the reference
digest and it has no weights of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kto_ray.records import PolicyRef
from kto_ray.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor


class DigestError(RuntimeError):
    """Bytes, weights or a model are not what their digest says."""


class PolicyStore:
    """Publishes and resolves policies in `<run>/policies`."""

    def __init__(self, run: Storage) -> None:
        self.storage = run / "policies"

    def publish_base(self, reference_digest: str) -> PolicyRef:
        """Make the base model version 0. Raises DigestError when the run began with another: it stands still."""
        return self._mark(PolicyRef(0, reference_digest))

    def publish(self, version: int, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> PolicyRef:
        """Store weights as the given version, marker last. Publishing the same weights again changes nothing.

        Raises:
            DigestError: the version exists already with other weights.
        """
        import safetensors.torch

        data = _canonical(safetensors.torch.save(dict(tensors), metadata=dict(metadata)))
        policy = PolicyRef(version, hashlib.sha256(data).hexdigest())
        if not self.storage.exists(f"{version:05}/policy.json"):
            self.storage.write(f"{version:05}/policy.safetensors", data)
        return self._mark(policy)

    def _mark(self, policy: PolicyRef) -> PolicyRef:
        marker = f"{policy.version:05}/policy.json"
        if self.storage.exists(marker):
            published = self.resolve(policy.version)
            if published != policy:
                what = "the base model has changed since the run began" if policy.version == 0 else "it is immutable"
                raise DigestError(
                    f"policy {policy.version} of {self.storage} has digest {published.digest}, "
                    f"not {policy.digest}: {what}"
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

    def load(self, policy: PolicyRef) -> "dict[str, Tensor] | None":
        """Weights of a policy, verified; None for the base model. Raises DigestError, FileNotFoundError."""
        import safetensors.torch

        if policy.version == 0:
            return None
        data = self.storage.read(f"{policy.version:05}/policy.safetensors")
        if (digest := hashlib.sha256(data).hexdigest()) != policy.digest:
            raise DigestError(
                f"policy {policy.version} of {self.storage} has digest {digest}, asked for {policy.digest}"
            )
        return safetensors.torch.load(data)


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with a sorted header: the library writes metadata in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]
