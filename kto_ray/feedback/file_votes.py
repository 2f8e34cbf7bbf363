"""Votes as files of a folder: Parquet that comes or grows, JSON lines that are appended to.

What was read is known by file: how many rows, and of JSON lines how many bytes, so that only the new end is read. A
last line without its end is still being written, and left for the next time; so is Parquet that cannot be read yet,
which is said. Files may be added and grow; one that got shorter is no longer what was read, and is refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kto_ray.config.feedback import Feedback
from kto_ray.data.columns import FoundColumns
from kto_ray.data.files import TROUBLE, File, find, open_random
from kto_ray.data.formats import FORMATS
from kto_ray.errors import UserError
from kto_ray.feedback.understanding import NewVotes, Understanding, VoteRow, columns_of
from kto_ray.people.votes import Outcomes

FIELD = "label.feedback"
AT_ONCE = 500
"""Votes of Parquet that are counted in one go, ..."""
BYTES = 2**18
"""... and bytes of JSON lines."""
PARQUET, LINES = ".parquet", (".jsonl", ".ndjson")
OPTIONAL = frozenset({"id", "who", "when"})


@dataclass
class _Read:
    """How far a file was read."""

    size: int = 0
    """Of the whole file then; of JSON lines, bytes that were read."""
    rows: int = 0


class FileVotes:
    """See the module; a `VoteTable`."""

    def __init__(self, settings: Feedback) -> None:
        assert settings.path
        self.settings, self.where = settings, settings.path
        self.understanding = Understanding(settings)
        self._columns: dict[tuple[str, ...], FoundColumns] = {}  # by the columns of a file

    def files(self) -> list[File]:
        """Raises UserError: the folder is not there."""
        found = find(self.where, (PARQUET, *LINES), f"{FIELD}.path", may_be_none=True)
        if odd := [file.name for file in found if not file.name.lower().endswith((PARQUET, *LINES))]:
            raise UserError(f"{FIELD}.path: {odd[0]} is neither Parquet nor JSON lines ({', '.join(LINES)})")
        return found

    def check(self) -> FoundColumns:
        for file in self.files():
            if file.name.lower().endswith(PARQUET):
                return self._found(FORMATS[PARQUET].schema(file).names)
            if rows := _lines(file, 0)[0]:
                return self._found(_names([row for row in rows if isinstance(row, dict)]))
        return FoundColumns({})  # nobody has voted yet

    def _found(self, names: Sequence[str]) -> FoundColumns:
        key = tuple(names)
        if key not in self._columns:
            self._columns[key] = columns_of(names, self.settings, self.where, FIELD, OPTIONAL)
        return self._columns[key]

    def read(self, position: str | None) -> Iterator[NewVotes]:
        # A position in a database's table says nothing of files: these are read from the beginning.
        places = json.loads(position or "{}").get("files", {})
        known = {name: _Read(*numbers) for name, numbers in places.items()}
        failed: UserError | None = None
        for file in self.files():
            done = known.setdefault(file.name, _Read())
            if file.size == done.size:
                continue
            try:
                for rows in self._new(file, done):
                    odd = Outcomes()
                    votes = self.understanding.votes([row for row in rows if isinstance(row, VoteRow)], odd)
                    for row in rows:
                        if isinstance(row, str):
                            odd.add("odd", row)
                    places = {name: [read.size, read.rows] for name, read in known.items()}
                    yield NewVotes(votes, odd, json.dumps({"files": places}))
            except UserError as error:
                failed = failed or error  # the other files are read all the same
        if failed is not None:
            raise failed

    def _new(self, file: File, done: _Read) -> Iterator[list[VoteRow | str]]:
        """Rows that were added to a file, or what is wrong with one, some at a time; `done` goes along."""
        if (file.size or 0) < done.size:
            raise UserError(f"{FIELD}.path: {file.uri} got shorter; add files, or add to them, and leave what is there")
        if not file.name.lower().endswith(PARQUET):
            while (found := _lines(file, done.size))[1] > done.size:
                lines, end = found
                objects = [line for line in lines if isinstance(line, dict)]
                columns = self._found(_names(objects)) if objects else None
                rows = [self._row(file, columns, line, done.rows + n) for n, line in enumerate(lines)]
                done.size, done.rows = end, done.rows + len(lines)
                yield rows
            return
        parquet, first, before = FORMATS[PARQUET], 0, done.rows
        columns = self._found(parquet.schema(file).names)
        names = list(dict.fromkeys(columns.of.values()))
        for _, of, _ in parquet.parts(file):
            for batch in parquet.batches(file, of, names):
                table = batch.slice(max(0, before - first)) if first < before else batch
                first += batch.num_rows
                for start in range(0, table.num_rows, AT_ONCE):
                    some = table.slice(start, AT_ONCE).to_pylist()
                    rows = [self._row(file, columns, row, done.rows + n) for n, row in enumerate(some)]
                    done.rows += len(some)
                    yield rows
        if first < before:
            raise UserError(f"{FIELD}.path: {file.uri} has fewer rows than before; add files, or add to them")
        done.size = file.size or 0
        yield []

    def _row(self, file: File, of: FoundColumns | None, cells: Any, number: int) -> VoteRow | str:
        if not isinstance(cells, Mapping) or of is None:
            return f"{file.name} row {number}: {str(cells)[:40]!r}"
        found = {what: cells.get(column) for what, column in of.of.items()}
        key = found.pop("id", None)
        place = f"file:{file.name}:{number}"
        return VoteRow(place if key is None else f"table:{key}", **found)


def _lines(file: File, start: int) -> tuple[list[Any], int]:
    """Objects of some whole lines from a byte on, a text for one that is none, and the byte after the last."""
    try:
        with open_random(file.uri) as source:
            source.seek(start)
            read = source.read(BYTES)
    except TROUBLE as error:
        raise UserError(f"{FIELD}.path: {file.uri} cannot be read: {error}") from error
    whole, end, _ = read.rpartition(b"\n")
    if not end and len(read) == BYTES:
        raise UserError(f"{FIELD}.path: {file.uri} has a line of more than {BYTES} bytes; those are no votes")
    found: list[Any] = []
    for line in filter(bytes.strip, whole.split(b"\n")):
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(line.decode(errors="replace").strip())
    return found, start + len(whole) + len(end)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of any of the rows."""
    return list(dict.fromkeys(name for row in rows for name in row))
