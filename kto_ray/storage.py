"""A run's folder, local or remote: whole files only, JSON and Parquet.

`policies.py`, `rounds.py` and the loop keep everything they know here. A file is either there and whole or not there:
an object store's put is atomic by itself, and where there are real files they are written aside and moved. What must
come last (a manifest, a policy's marker) is simply written last. A run's driver, replicas and train workers write under
the run's lease (`lease.py`), which is asked before every write.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

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


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URI, by pyarrow or else by fsspec, and the path in it.

    Raises:
        ValueError, ImportError, OSError: nobody knows such a URI, or it cannot be reached.
    """
    try:
        # Google's client goes on trying for a quarter of an hour unless told otherwise.
        patience = "?retry_limit_seconds=30" if uri.startswith(("gs://", "gcs://")) else ""
        filesystem, path = pafs.FileSystem.from_uri(uri + patience)
    except pa.ArrowInvalid:
        import fsspec

        remote, path = fsspec.core.url_to_fs(uri)
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(remote))
    return filesystem, path


class Fence(Protocol):
    """Whether this process may write, and whether it sees the folder that its driver sees. Pickles."""

    def require(self) -> None: ...

    def require_seen(self) -> None: ...


class Storage:
    """A folder of whole files. Pickles as its URI and fence.

    Args:
        uri: a local path, or anything that pyarrow or else fsspec opens (s3://..., gs://..., memory://...).
        fence: asked before every write.
        field: of the configuration, which names the folder; for messages.
    """

    def __init__(self, uri: str, fence: Fence | None = None, field: str = "runs_folder") -> None:
        self.uri = uri if "://" in uri else str(Path(uri).expanduser().absolute())
        self.fence, self.field = fence, field

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, Fence | None, str]]:
        return Storage, (self.uri, self.fence, self.field)

    def __truediv__(self, name: str) -> "Storage":
        below = Storage(f"{self.uri}/{name}", self.fence, self.field)
        filesystem, folder = self._opened
        below._opened = filesystem, f"{folder}/{name}"  # opening s3://... anew would ask for its region anew
        return below

    def __str__(self) -> str:
        return self.uri

    @cached_property
    def _opened(self) -> tuple[pafs.FileSystem, str]:
        try:
            return open_uri(self.uri)
        except (ValueError, ImportError, OSError) as error:
            raise self._error("open", "", error) from error

    def _error(self, action: str, name: str, error: Exception) -> UserError:
        where = f"{self.uri}/{name}" if name else repr(self.uri)
        why = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        if self._is_local:
            advice = "; give a folder that can be written and has room"
        elif action == "open":
            advice = ""
        else:
            advice = "; is it spelled right, is there such a bucket, may you use it, and can it be reached from here?"
        return UserError(f"{self.field}: cannot {action} {where}: {why}{advice}")

    @property
    def _is_local(self) -> bool:
        return "://" not in self.uri or self.uri.startswith("file://")

    @contextlib.contextmanager
    def _told(self, action: str, name: str) -> Iterator[tuple[pafs.FileSystem, str]]:
        """Open; raises UserError for whatever goes wrong, and FileNotFoundError where a file to be read is missing."""
        filesystem, folder = self._opened
        try:
            yield filesystem, f"{folder}/{name}" if name else folder
        except (OSError, pa.ArrowException) as error:
            if action != "write" and isinstance(error, FileNotFoundError):
                raise
            raise self._error(action, name, error) from error

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None when it is remote."""
        filesystem, path = self._opened
        return Path(path) if isinstance(filesystem, pafs.LocalFileSystem) else None

    @property
    def shared(self) -> tuple[str, pafs.FileSystem | None]:
        """The folder as Ray Train takes it: what pyarrow opens by itself, or else a path and its file system."""
        filesystem, path = self._opened
        return (path, filesystem) if isinstance(filesystem, pafs.PyFileSystem) else (self.uri, None)

    def require_seen(self) -> None:
        """Raises UserError when this process does not see the folder that the run's driver writes to."""
        if self.fence is not None:
            self.fence.require_seen()

    def require_mine(self) -> None:
        """Raises UserError when another driver has taken the run over, so that nothing may be written any more."""
        if self.fence is not None:
            self.fence.require()

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in place.

        Raises:
            UserError: it cannot be written, and an older file stays; or the run's lease was lost.
        """
        self.require_mine()
        with self._told("write", name) as (filesystem, target):
            _put(filesystem, target, data)

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already will do."""
        with contextlib.suppress(FileNotFoundError), self._told("delete", name) as (filesystem, target):
            filesystem.delete_file(target)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._told("read", name) as (filesystem, target), filesystem.open_input_stream(target) as stream:
            return bytes(stream.read())

    def open(self, name: str) -> pa.NativeFile:
        """A file to read parts of, as a context. Raises FileNotFoundError."""
        with self._told("read", name) as (filesystem, target):
            return filesystem.open_input_file(target)

    @property
    def unfenced(self) -> "Storage":
        """The same folder for whoever has just asked the lease (`require_mine`)."""
        same = Storage(self.uri, field=self.field)
        same._opened = self._opened
        return same

    def move(self, name: str, target: str) -> None:
        """Move a file, or a folder with all that is in it, within this folder; done again after a crash, what is left.

        Raises:
            UserError: it cannot be written, or the run's lease was lost.
        """
        self.require_mine()
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
        with self._told("read", name) as (filesystem, target):
            _forget_listings(filesystem)
            return bool(filesystem.get_file_info(target).type != pafs.FileType.NotFound)

    def names(self, folder: str = "", suffix: str = "") -> list[str]:
        """Names of the files and folders in a subfolder, sorted; those that end with `suffix`."""
        with self._told("read", folder) as (filesystem, path):
            _forget_listings(filesystem)
            found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.base_name.endswith(suffix))

    def files(self) -> list[str]:
        """Names of all files in this folder and below, "data/train.parquet", sorted."""
        with self._told("read", "") as (filesystem, path):
            _forget_listings(filesystem)
            found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        inside = path.rstrip("/") + "/"
        return sorted(info.path.removeprefix(inside) for info in found if info.type == pafs.FileType.File)

    def write_json(self, name: str, value: Any) -> None:
        """See `to_json`."""
        self.write(name, (to_json(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_table(self, name: str, table: pa.Table) -> str:
        """Gives the SHA-256 of the file."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, sink.getvalue())
        return hashlib.sha256(sink.getvalue()).hexdigest()

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read(name)), columns=columns)

    def require_room(self, needed_bytes: int) -> None:
        """Look, where that is possible without writing, whether it can be written and has room. Raises UserError."""
        filesystem, folder = self._opened
        if filesystem.type_name in ("s3", "gcs"):
            bucket = folder.partition("/")[0]
            with self._told("read", ""):
                there_is = filesystem.get_file_info(bucket).type != pafs.FileType.NotFound
            if not there_is:
                raise UserError(f"{self.field}: cannot write {self.uri}: there is no bucket {bucket!r}; make it first")
        if self.local is None:
            return
        there = next(folder for folder in (self.local, *self.local.parents) if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            what = "cannot be written" if there.is_dir() else "is no folder"
            raise UserError(
                f"{self.field}: cannot write {self.uri}: {there} {what}; give a folder that can be written and has room"
            )
        if (free := shutil.disk_usage(there).free) < needed_bytes:
            raise UserError(
                f"{self.field}: {self.uri} has {free / 1e9:.2f} GB free, the run needs about "
                f"{needed_bytes / 1e9:.2f} GB; make room, or give another folder"
            )


def _put(filesystem: pafs.FileSystem, target: str, data: bytes) -> None:
    """Make the file, so that there is never a part of it."""
    folder, aside = target.rpartition("/")[0], f"{target}.{uuid.uuid4().hex}.part"
    if isinstance(filesystem, pafs.LocalFileSystem):
        filesystem.create_dir(folder, recursive=True)
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            Path(aside).unlink(missing_ok=True)
    elif not isinstance(filesystem, pafs.PyFileSystem):
        # An object store: there are no folders to make, and nothing is there before the stream was closed well.
        with filesystem.open_output_stream(target) as stream:
            stream.write(data)
    else:
        _put_with_fsspec(filesystem.handler.fs, folder, aside, target, data)


def _put_with_fsspec(remote: Any, folder: str, aside: str, target: str, data: bytes) -> None:
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    remote.makedirs(folder, exist_ok=True)
    if isinstance(remote, AsyncFileSystem) or type(remote).pipe_file is not AbstractFileSystem.pipe_file:
        remote.pipe_file(target, data)
        return
    # What is left to do by hand is done on real files: a stream of those that breaks leaves the part that was written.
    try:
        with remote.open(aside, "wb") as stream:
            stream.write(data)
        remote.mv(aside, target)
    except OSError:
        with contextlib.suppress(OSError):
            remote.rm_file(aside)
        raise


def _forget_listings(filesystem: pafs.FileSystem) -> None:
    """fsspec's object stores remember what they listed, but other processes write there, too."""
    if isinstance(filesystem, pafs.PyFileSystem):
        filesystem.handler.fs.invalidate_cache()
