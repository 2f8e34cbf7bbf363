"""Repairs of packages that are broken as they were published, in the open; `building.py` applies them."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kto_ray.errors import UserError


class Repair(Protocol):
    """A change to installed files. Raises UserError where it does not find what it repairs."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...

    def apply(self, packages: Path) -> None:
        """Change the files under `packages`, which is a site-packages folder."""


@dataclass(frozen=True)
class Rewrite:
    """Puts another line in the place of a line that a file has exactly once; None leaves it out."""

    name: str
    reason: str
    file: str
    line: str
    becomes: str | None = None

    def apply(self, packages: Path) -> None:
        path = packages / self.file
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        if lines.count(self.line) != 1:
            raise _no_longer_fits(self, f"the line {self.line!r} once in {path}")
        place = lines.index(self.line)
        lines[place : place + 1] = [] if self.becomes is None else [self.becomes]
        path.write_text("\n".join(lines) + "\n", "utf-8")


@dataclass(frozen=True)
class Supply:
    """Puts a file that a package lacks in its place, from another package."""

    name: str
    reason: str
    file: str
    source: str
    sha256: str

    def apply(self, packages: Path) -> None:
        path, source = packages / self.file, packages / self.source
        if path.exists() or not path.parent.is_dir():
            raise _no_longer_fits(self, f"a folder {path.parent} without {path.name}")
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != self.sha256:
            raise _no_longer_fits(self, f"{source} with SHA-256 {self.sha256}")
        shutil.copyfile(source, path)


def _no_longer_fits(repair: Repair, wanted: str) -> UserError:
    return UserError(f"repair {repair.name!r} does not find {wanted}: this is not the package that it was written for")
