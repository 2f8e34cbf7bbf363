"""What a run is called on a cluster and by trackers, where other runs of the same name may be.

The name says whose something is to people, a digest of where the run lies keeps it apart. Serve applications, their
pages, the caretaker's actor, W&B and MLflow go by `unique_name`; who knows a run's folder finds them again.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Literal, cast

from kto_ray.storage import Storage

SLUG_LENGTH = 40
DIGEST_LENGTH = 8
Role = Literal["generators", "page", "watch"]
ROLES: tuple[Role, ...] = ("generators", "page", "watch")
"""In the order in which they are ended: who holds GPUs comes first."""
APPLICATION = re.compile(rf"kto-ray-(?P<run>.+)-(?P<role>{'|'.join(ROLES)})-(?P<job>[0-9a-f]+)")


def unique_name(run: Storage) -> str:
    """The run's name, as far as ASCII says it, and eight hexadecimal digits: "demo-1f0c93ab". Fits into paths and ids.

    The same folder has the same name, however its path is written.
    """
    scheme, _, path = run.uri.rpartition("://")
    local = scheme in ("", "file")
    where = os.path.realpath(path) if local else f"{scheme}://{re.sub('/+', '/', path).rstrip('/')}"
    name = path.rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", name)[:SLUG_LENGTH].strip("-._")
    digest = hashlib.sha256(where.encode()).hexdigest()[:DIGEST_LENGTH]
    return f"{slug}-{digest}" if slug else digest


@dataclass(frozen=True)
class Application:
    """A Serve application of a run's, and which driver's: "kto-ray-demo-1f0c93ab-generators-02000000".

    Args:
        run: its `unique_name`.
        job: id of the driver's job on the cluster.
    """

    run: str
    role: Role
    job: str

    def __str__(self) -> str:
        return f"kto-ray-{self.run}-{self.role}-{self.job}"

    def rank(self) -> int:
        """Its place in `ROLES`."""
        return ROLES.index(self.role)

    @classmethod
    def parse(cls, name: str) -> "Application | None":
        """None: it is nobody's of whom this version knows."""
        found = APPLICATION.fullmatch(name)
        return cls(found["run"], cast(Role, found["role"]), found["job"]) if found else None
