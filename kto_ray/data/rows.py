"""Rows of tables, whatever they lie in: files of `formats.py`, or a query's answer. No column has a meaning yet.

`table.py`, `votes.py` and the other table-like sources read them twice, where several rows make one verdict: first the
columns that say what was voted, then, of the rows that are taken, the images.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Protocol

import pyarrow as pa

from kto_ray.data.files import File, find
from kto_ray.data.formats import FORMATS, TableFormat
from kto_ray.data.protocol import Part
from kto_ray.errors import UserError

AT_ONCE = 8  # files whose footers are read side by side


class Rows(Protocol):
    """A table that is read in parts; pickles."""

    where: str
    """For messages."""

    def schema(self) -> pa.Schema: ...

    def parts(self) -> Sequence[Part]: ...

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns, in this order, of the rows of a part, in their order; at least one row a batch."""
        ...

    def folder(self, part: Part) -> str:
        """That paths in a part are relative to."""
        ...


class FileRows:
    """Rows of files of one format; of all that a path names.

    Args:
        what: how messages begin, for instance "data.sources: kind: table".
        base: folder that paths in them are relative to; None: each file's own.
    """

    def __init__(self, where: str, what: str, base: str | None = None) -> None:
        self.where, self.what, self.base = where, what, base

    def __getstate__(self) -> dict[str, object]:
        return {"where": self.where, "what": self.what, "base": self.base}

    @cached_property
    def files(self) -> list[File]:
        found = find(self.where, list(FORMATS), self.what)
        known = [file for file in found if _format_of(file.name)]
        if not known:
            raise UserError(
                f"{self.what}: the ending of {self.where} says nothing of what is in it; known: {', '.join(FORMATS)}"
            )
        one_of = {_format_of(file.name): file.name for file in known}
        if len(one_of) > 1:
            raise UserError(
                f"{self.what}: {self.where} has files of several formats in it ({', '.join(one_of.values())}); "
                "name those of one, for instance with a pattern: folder/*.parquet"
            )
        return known

    @property
    def format(self) -> TableFormat:
        found = _format_of(self.files[0].name)
        assert found
        return found

    @cached_property
    def _schema(self) -> pa.Schema:
        return self.format.schema(self.files[0])

    def schema(self) -> pa.Schema:
        return self._schema

    def parts(self) -> Sequence[Part]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(self.format.parts, self.files)
            return [
                Part(name, {"uri": file.uri, "name": file.name, **of}, rows)
                for file, parts in zip(self.files, found, strict=True)
                for name, of, rows in parts
            ]

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        file = File(part.of["uri"], part.of["name"])
        reader = _format_of(file.name)
        assert reader
        for batch in reader.batches(file, part.of, columns):
            if batch.num_rows:
                yield batch

    def folder(self, part: Part) -> str:
        return self.base or File(part.of["uri"], part.of["name"]).folder


def _format_of(name: str) -> TableFormat | None:
    """By the ending, which may be in any case."""
    return next((reader for ending, reader in FORMATS.items() if name.lower().endswith(ending)), None)
