"""A run's folder, local or remote: whole files only, JSON and Parquet.

`policies.py`, `rounds.py` and the loop keep everything they know here. A file is either there and whole or not there:
local files are written aside and renamed, and an object store's put is atomic by itself. What must come last (a
manifest, a policy's marker) is simply written last.
"""

import io
import json
import math
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from kto_ray.errors import UserError


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite, for which JSON has no word, becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Storage:
    """A folder of whole files. Pickles as its URI.

    Args:
        uri: a local path, or anything that pyarrow or else fsspec opens (s3://..., gs://..., memory://...).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).expanduser().absolute())

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.uri,)

    def __truediv__(self, name: str) -> "Storage":
        return Storage(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    @cached_property
    def _opened(self) -> tuple[pafs.FileSystem, str]:
        try:
            filesystem, path = pafs.FileSystem.from_uri(self.uri)
        except pa.ArrowInvalid:
            import fsspec

            try:
                remote, path = fsspec.core.url_to_fs(self.uri)
            except (ValueError, ImportError) as error:
                raise UserError(f"runs_folder: cannot open {self.uri!r}: {error}") from error
            filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(remote))
        return filesystem, path

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None when it is remote."""
        filesystem, path = self._opened
        return Path(path) if isinstance(filesystem, pafs.LocalFileSystem) else None

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in place. Raises UserError when it cannot be written; an older file then stays."""
        filesystem, folder = self._opened
        target = f"{folder}/{name}"
        try:
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            if self.local is None:
                with filesystem.open_output_stream(target) as stream:
                    stream.write(data)
                return
            aside = f"{target}.{os.getpid()}.part"
            try:
                with open(aside, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, target)
            finally:
                Path(aside).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"runs_folder: cannot write {self.uri}/{name}: {error.strerror or error}; "
                "give a folder that can be written and has room"
            ) from error

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        filesystem, folder = self._opened
        with filesystem.open_input_stream(f"{folder}/{name}") as stream:
            return bytes(stream.read())

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of, as a context. Raises FileNotFoundError."""
        filesystem, folder = self._opened
        return filesystem.open_input_file(f"{folder}/{name}")

    def move(self, name: str, target: str) -> None:
        """Move a file, or a folder with all that is in it, within this folder; done again after a crash, what is left.

        Raises:
            UserError: it cannot be written.
        """
        filesystem, folder = self._opened
        source = f"{folder}/{name}"
        found = filesystem.get_file_info(source).type
        if found == pafs.FileType.NotFound:
            return
        selector = pafs.FileSelector(source, recursive=True)
        is_folder = found == pafs.FileType.Directory
        infos = filesystem.get_file_info(selector if is_folder else [source])
        try:
            for path in [info.path for info in infos if info.type == pafs.FileType.File]:
                goal = f"{folder}/{target}{path[len(source) :]}"
                filesystem.create_dir(goal.rpartition("/")[0], recursive=True)
                if self.local is not None:
                    os.replace(path, goal)
                    continue
                # Not copied by the store itself: that has a limit of 5 GB for a file.
                with filesystem.open_input_stream(path) as origin, filesystem.open_output_stream(goal) as copy:
                    shutil.copyfileobj(origin, copy, 2**26)
                filesystem.delete_file(path)
        except OSError as error:
            raise UserError(f"{self.uri}/{name} cannot be moved to {target}: {error.strerror or error}") from error
        if is_folder:
            filesystem.delete_dir(source)

    def exists(self, name: str) -> bool:
        filesystem, folder = self._opened
        return bool(filesystem.get_file_info(f"{folder}/{name}").type != pafs.FileType.NotFound)

    def names(self, folder: str = "", suffix: str = "") -> list[str]:
        """Names of the files and folders in a subfolder, sorted; those that end with `suffix`."""
        filesystem, root = self._opened
        selector = pafs.FileSelector(f"{root}/{folder}" if folder else root, allow_not_found=True)
        names = sorted(info.base_name for info in filesystem.get_file_info(selector))
        return [name for name in names if name.endswith(suffix)]

    def write_json(self, name: str, value: Any) -> None:
        """See `to_json`."""
        self.write(name, (to_json(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_table(self, name: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, sink.getvalue())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read(name)), columns=columns)

    def require_room(self, needed_bytes: int) -> None:
        """Look, where that is possible without writing, whether it can be written and has room. Raises UserError."""
        if self.local is None:
            return
        there = next(folder for folder in (self.local, *self.local.parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            what = "cannot be written" if there.is_dir() else "is no folder"
            raise UserError(
                f"runs_folder: cannot write {self.uri}: {there} {what}; give a folder that can be written and has room"
            )
        if (free := shutil.disk_usage(there).free) < needed_bytes:
            raise UserError(
                f"runs_folder: {self.uri} has {free / 1e9:.2f} GB free, the run needs about "
                f"{needed_bytes / 1e9:.2f} GB; make room, or give another folder"
            )
