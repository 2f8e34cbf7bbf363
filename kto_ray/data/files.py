"""Where the files of a source lie, locally or behind a URI: found, opened, and named so that names stay.

Paths of images that stand in tables are relative to the folder of the table, or to the one that `images` names; also
those that Windows wrote.
"""

import functools
import ntpath
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from kto_ray.errors import UserError
from kto_ray.storage import open_uri

WILD = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX)")
TROUBLE = (OSError, EOFError, pa.ArrowException, httpx2.HTTPError)
"""What reading may raise, from wherever a file is."""
URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""A scheme of two letters or more; one is a drive of Windows."""


@dataclass(frozen=True)
class File:
    """A file of a source: where it is, its name there, which moves with the source, and its size where it was found."""

    uri: str
    name: str
    size: int | None = field(default=None, compare=False)

    @property
    def folder(self) -> str:
        """What paths in it are relative to."""
        return parent(self.uri)


def is_uri(where: str) -> bool:
    return bool(URI.match(where))


def absolute(where: str) -> str:
    """A local path as an absolute one; URIs as they are, but for those of local files."""
    if where.startswith("file:"):
        return open_uri(where)[1]
    return where if is_uri(where) else str(Path(where).expanduser().absolute())


def parent(uri: str) -> str:
    path, separator, query = uri.partition("?")
    return f"{posixpath.dirname(path)}{separator}{query}" if is_uri(uri) else str(Path(uri).parent)


def join(base: str, below: str) -> str:
    path, separator, query = base.partition("?") if is_uri(base) else (base, "", "")
    return f"{path.rstrip('/')}/{below}{separator}{query}"


def resolve(base: str, reference: str) -> str:
    """Where an image lies that a table in `base` refers to: an absolute path or a URI."""
    if is_uri(reference):
        return absolute(reference)
    if ntpath.splitdrive(reference)[0] or "\\" in reference:
        reference = reference.replace("\\", "/")
    if reference.startswith(("/", "~")):
        return absolute(reference)
    if ntpath.splitdrive(reference)[0] or is_uri(
        base
    ):  # a drive of another machine: it is missing here, and said to be
        return join(base, posixpath.normpath(reference))
    return os.path.normpath(f"{base}/{reference}")


def is_missing(uri: str) -> bool:
    """Whether it is a local path at which there is nothing; nobody is asked for what is remote."""
    return not is_uri(uri) and not os.path.isfile(uri)  # noqa: PTH113  asked a million times


def find(where: str, endings: Sequence[str], what: str, may_be_none: bool = False) -> list[File]:
    """The files that a source names, by name: one file, those of a folder and its folders, or those of a pattern.

    Args:
        where: a path or URI; * ? [...] stand for parts of names, ** for folders, {000..099} for numbers.
        endings: of files that are wanted, where it is a folder.
        what: how messages begin, for instance "data: kind: table".
        may_be_none: a folder, or the one of a pattern, may have none of them yet.

    Raises:
        UserError: there are none, or they cannot be looked for.
    """
    uri = absolute(where)
    if braces := BRACES.search(uri):
        first, last = braces.groups()
        numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        return [
            file
            for number in numbers
            for file in find(f"{uri[: braces.start()]}{number}{uri[braces.end() :]}", endings, what, may_be_none)
        ]
    try:
        filesystem, path = open_uri(uri)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [File(uri, posixpath.basename(path), info.size)]
        if info.type == pafs.FileType.Directory:
            sizes = _below(filesystem, path)
            found = [name for name in sizes if name.lower().endswith(tuple(endings))]
            if not found and not may_be_none:
                raise UserError(f"{what}: {where} has no files of the right kind in it ({', '.join(endings)})")
            return [File(join(uri, name), name, sizes[name]) for name in found]
        if WILD.search(uri):
            # What comes before the first folder with a pattern in its name, and the pattern itself.
            root, pattern = (uri[: (cut := WILD.split(uri)[0].rindex("/"))], uri[cut + 1 :])
            folder = path.removesuffix(f"/{pattern}")
            sizes = _below(filesystem, folder)
            found = [name for name in sizes if re.match(glob_translate(pattern), name)]
            if found or (may_be_none and filesystem.get_file_info(folder).type == pafs.FileType.Directory):
                return [File(join(root, name), name, sizes[name]) for name in found]
    except (ValueError, ImportError, *TROUBLE) as error:
        raise UserError(f"{what}: {where} cannot be read: {error}") from error
    raise UserError(f"{what}: there is nothing at {where}; give a file, a folder, or a pattern such as data/*.parquet")


def _below(filesystem: pafs.FileSystem, folder: str) -> dict[str, int]:
    """Sizes of all files in a folder and its folders, by their names, sorted, without hidden ones."""
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == pafs.FileType.File]
    sizes = {info.path.removeprefix(folder).lstrip("/"): info.size for info in files}
    return {name: sizes[name] for name in sorted(sizes) if not HIDDEN.search(name)}


def listed(where: str, what: str) -> list[str]:
    """Names of what lies directly in a folder; nothing where it is none."""
    try:
        filesystem, path = open_uri(absolute(where))
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    except (ValueError, ImportError, *TROUBLE) as error:
        if isinstance(error, NotADirectoryError):
            return []
        raise UserError(f"{what}: {where} cannot be read: {error}") from error
    return sorted(info.base_name for info in infos)


def exists(uri: str) -> bool:
    filesystem, path = open_uri(uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


def open_random(uri: str) -> pa.NativeFile:
    """A file to read parts of, as a context. Raises OSError."""
    filesystem, path = _opened(uri)
    return filesystem.open_input_file(path)


def open_stream(uri: str) -> pa.NativeFile:
    """A file from its beginning, unpacked where its name ends with .gz, .bz2, .zst and the like. Raises OSError."""
    filesystem, path = _opened(uri)
    return filesystem.open_input_stream(path, compression="detect")


def read_bytes(uri: str) -> bytes:
    """All of an image file, by its path or URI.

    Raises:
        OSError: it is not there (FileNotFoundError), or cannot be read.
    """
    if not is_uri(uri):
        return Path(uri).read_bytes()
    filesystem, path = _opened(uri)
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read())


def _opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """Opens a bucket once in a process: s3://... anew would ask for its region anew."""
    scheme, separator, rest = uri.partition("://")
    if scheme not in ("s3", "gs", "gcs", "abfs", "abfss"):
        try:
            return open_uri(uri)
        except (ValueError, ImportError) as error:
            raise OSError(f"{uri}: {error}") from error
    path, mark, query = rest.partition("?")
    bucket, _, key = path.partition("/")
    filesystem, root = _bucket(f"{scheme}{separator}{bucket}{mark}{query}")
    return filesystem, f"{root}/{key}"


@functools.lru_cache(maxsize=64)
def _bucket(uri: str) -> tuple[pafs.FileSystem, str]:
    return open_uri(uri)
