"""WebDataset tars: files of one name, up to its first dot, are one sample; they lie one after the other.

    000017.jpg  000017.txt    a cat                  the prompt, also as .caption
                000017.cls    1                      the verdict: a number or word
                000017.json   {"liked": true, ...}   columns, as those of a table; .txt and .cls come before them

A part a tar, read from its beginning to its end; images travel in the rows. Source: the format's description in the
documentation of the package webdataset, which is not needed.
"""

import contextlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa

from kto_ray.config.data import WebDatasetData
from kto_ray.data.files import TROUBLE, File, find, open_random, open_stream
from kto_ray.data.folders import IMAGES
from kto_ray.data.formats import BYTES, FIRST, ROWS, as_text
from kto_ray.data.protocol import Part
from kto_ray.data.table import TableSource
from kto_ray.errors import UserError

TARS = (".tar", ".tar.gz", ".tgz")
ASIDE = {"txt": "txt", "caption": "txt", "cls": "cls"}
"""Endings of files beside an image that hold one value, and the columns that they become."""


class WebDatasetSource(TableSource):
    """See the module."""

    def __init__(self, settings: WebDatasetData) -> None:
        super().__init__(settings, Tars(settings.path, "data.sources (webdataset)"), "webdataset")

    def named(self, schema: pa.Schema) -> dict[str, str | None]:
        named = super().named(schema) | {"image": "image"}
        for what, column in (("prompt", "txt"), ("verdict", "cls")):
            if what in named and named[what] is None and column in schema.names:
                named[what] = column
        return named


class Tars:
    """Rows of samples: the column "image" has the bytes of the image file, all others are texts."""

    def __init__(self, where: str, what: str) -> None:
        self.where, self.what = where, what

    def __getstate__(self) -> dict[str, str]:
        return {"where": self.where, "what": self.what}

    @cached_property
    def files(self) -> list[File]:
        return find(self.where, TARS, self.what)

    @cached_property
    def _schema(self) -> pa.Schema:
        names: dict[str, None] = {}
        for sample in islice(_samples(self.files[0], pixels=False), FIRST):
            names |= dict.fromkeys(sample)
        if "image" not in names:
            raise UserError(
                f"{self.what}: {self.files[0].uri} has no images in its first samples; their names must end with one "
                f"of {', '.join(IMAGES)}"
            )
        return pa.schema([(name, pa.binary() if name == "image" else pa.string()) for name in names if name != "key"])

    def schema(self) -> pa.Schema:
        return self._schema

    def parts(self) -> Sequence[Part]:
        return [Part(file.name, {"uri": file.uri, "name": file.name}, None) for file in self.files]

    def folder(self, part: Part) -> str:
        return File(part.of["uri"], part.of["name"]).folder

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([self._schema.field(name) for name in columns])
        gathered: list[dict[str, Any]] = []
        size = 0
        for sample in _samples(File(part.of["uri"], part.of["name"]), pixels="image" in columns):
            gathered.append(sample)
            size += len(sample.get("image") or b"")
            if size >= BYTES or len(gathered) == ROWS:
                yield pa.RecordBatch.from_pylist(gathered, schema)
                gathered, size = [], 0
        if gathered:
            yield pa.RecordBatch.from_pylist(gathered, schema)


def _samples(file: File, pixels: bool) -> Iterator[dict[str, Any]]:
    """One after the other; with `pixels` unset, "image" is there and empty."""
    key, sample = None, dict[str, Any]()
    try:
        with _tar(file) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember all of them
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                name, _, ending = base.partition(".")
                if f"{folder}/{name}" != key:
                    if sample:
                        yield sample
                    key, sample = f"{folder}/{name}", {}
                _add(sample, ending.lower(), tar, member, file, pixels)
            if sample:
                yield sample
    except (*TROUBLE, tarfile.TarError) as error:
        raise UserError(f"{file.uri} cannot be read: {error or 'it is no tar file'}") from error


def _add(
    sample: dict[str, Any], ending: str, tar: tarfile.TarFile, member: tarfile.TarInfo, file: File, pixels: bool
) -> None:
    def content() -> bytes:
        stream = tar.extractfile(member)
        return stream.read() if stream else b""

    if f".{ending}" in IMAGES:
        sample.setdefault("image", content() if pixels else b"")
    elif ending in (*ASIDE, "json"):
        try:
            text = content().decode("utf-8-sig").strip()
            values = json.loads(text) if ending == "json" else {ASIDE[ending]: text}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file.uri}: {member.name} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{file.uri}: {member.name} is no JSON object: {text[:80]}")
        for name, value in values.items():
            if name != "image":
                sample[name] = as_text(value)


@contextlib.contextmanager
def _tar(file: File) -> Iterator[tarfile.TarFile]:
    """Where it is not packed, what is not wanted of it is passed over unread."""
    if file.uri.partition("?")[0].endswith(".tar"):
        with open_random(file.uri) as source, tarfile.open(fileobj=source, mode="r:") as tar:
            yield tar
            # To the standard library a tar that breaks off within a header has ended; a whole one ends with zeros.
            if tar.offset + tarfile.BLOCKSIZE > source.size():
                raise EOFError("it is truncated")
    else:
        with open_stream(file.uri) as source, tarfile.open(fileobj=source, mode="r|*") as tar:
            yield tar
