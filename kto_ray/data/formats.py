"""Files that hold tables, by their ending: how each is read, a bounded share at a time.

    .csv .tsv         a header and rows; UTF-8, with or without byte order mark; a part a file
    .jsonl .ndjson    an object a line; a part a file
    .json             a list of objects, or objects one after the other; a part a file
    .parquet          a part a row group, or several small ones
    .arrow .feather   Arrow's stream or file format; a part a file

CSV and JSON are read as texts, whatever stands in them: a column that begins with 1 may go on with 0.5. Texts may be
packed (.csv.gz, .jsonl.zst). `rows.py` joins the files of a source.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from kto_ray.data.files import TROUBLE, File, open_random, open_stream
from kto_ray.errors import UserError

ROWS = 10_000
"""Of texts, in a batch."""
BYTES = 2**25
"""About so much of a batch of anything else."""
PART_ROWS, PART_BYTES = 50_000, 2**26
"""Row groups of Parquet are joined up to this: they may have a hundred rows each."""
CELL = 2**27
"""Bytes of a cell of CSV, at most: an image may stand in it as a data URI."""
FIRST = 100
"""Objects of a JSON file whose keys are its columns: later ones may have more, which nobody misses."""

PartOf = tuple[str, Mapping[str, Any], int | None]
"""Name, what the format has to know, rows if known."""


class TableFormat(Protocol):
    """How files of a kind are read.

    Raises (from every method): UserError: names the file, and what is wrong with it.
    """

    def schema(self, file: File) -> pa.Schema: ...

    def parts(self, file: File) -> list[PartOf]: ...

    def batches(self, file: File, of: Mapping[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]: ...


@contextlib.contextmanager
def _told(file: File) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file.uri} is not UTF-8 text: {error}; save it as UTF-8") from error
    except TROUBLE as error:
        raise UserError(f"{file.uri} cannot be read: {error}") from error


def _require(file: File, there: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in there]:
        raise UserError(f"{file.uri} has no column {missing[0]!r}; it has: {', '.join(map(repr, there))}")


class Csv:
    """Commas or tabs; quotes, commas and ends of lines in quoted cells."""

    def __init__(self, dialect: type[csv.Dialect]) -> None:
        self.dialect = dialect

    def schema(self, file: File) -> pa.Schema:
        with _told(file):
            return pa.schema([(name, pa.string()) for name in next(self._rows(file))])

    def parts(self, file: File) -> list[PartOf]:
        return [(file.name, {}, None)]

    def batches(self, file: File, of: Mapping[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _told(file):
            rows = self._rows(file)
            there = next(rows)
            _require(file, there, columns)
            places = [there.index(name) for name in columns]
            gathered: list[list[str]] = []
            for row in rows:
                gathered.append([row[place] for place in places])
                if len(gathered) == ROWS:
                    yield _texts(gathered, columns)
                    gathered = []
            if gathered:
                yield _texts(gathered, columns)

    def _rows(self, file: File) -> Iterator[list[str]]:
        """The header, then rows, each of as many cells; empty lines are none."""
        with _text(file) as text:
            csv.field_size_limit(CELL)
            reader = csv.reader(text, self.dialect, strict=True, skipinitialspace=True)
            header: list[str] | None = None
            whole = 0  # the line up to which rows are whole
            try:
                for row in reader:
                    if row and header is None:
                        header = [name.strip() for name in row]
                        if len(set(header)) < len(header):
                            raise UserError(
                                f"{file.uri}: its columns {', '.join(map(repr, header))} are not all different"
                            )
                        yield header
                    elif row and header:
                        if len(row) != len(header):
                            raise UserError(
                                f"{file.uri} line {reader.line_num} has not the {len(header)} columns of the header, "
                                f"but {len(row)}: {','.join(row)[:80]}"
                            )
                        yield row
                    whole = reader.line_num
            except csv.Error as error:
                raise UserError(
                    f"{file.uri}: the row that begins in line {whole + 1} cannot be read: {error}"
                ) from error
            if header is None:
                raise UserError(f"{file.uri} is empty; it needs a header and rows")


class Json:
    """Objects, a line each or one after the other; their values as texts, numbers and all."""

    def __init__(self, lines: bool) -> None:
        self.lines = lines

    def schema(self, file: File) -> pa.Schema:
        with _told(file):
            names: dict[str, None] = {}
            for number, row in enumerate(self._objects(file), start=1):
                names |= dict.fromkeys(row)
                if number == FIRST:
                    break
            if not names:
                raise UserError(f"{file.uri} is empty; it needs at least one object")
            return pa.schema([(name, pa.string()) for name in names])

    def parts(self, file: File) -> list[PartOf]:
        return [(file.name, {}, None)]

    def batches(self, file: File, of: Mapping[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _told(file):
            gathered: list[list[str | None]] = []
            for row in self._objects(file):
                gathered.append([as_text(row.get(name)) for name in columns])
                if len(gathered) == ROWS:
                    yield _texts(gathered, columns)
                    gathered = []
            if gathered:
                yield _texts(gathered, columns)

    def _objects(self, file: File) -> Iterator[dict[str, Any]]:
        with _text(file) as text:
            for place, row in self._by_lines(text, file) if self.lines else _one_after_the_other(text, file):
                if not isinstance(row, dict):
                    raise UserError(f"{file.uri} {place} is no object: {json.dumps(row)[:80]}")
                yield row

    def _by_lines(self, text: io.TextIOWrapper, file: File) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(text, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{file.uri} line {number} is not JSON: {error}") from error


def _one_after_the_other(text: io.TextIOWrapper, file: File) -> Iterator[tuple[str, Any]]:
    """The items of a list, or values in a row, without holding more than one and what was read ahead."""
    decoder, held, number, done, in_list = json.JSONDecoder(), "", 0, False, False
    while True:
        held = held.lstrip(" \t\r\n,")
        if number == 0 and not in_list and held.startswith("["):
            held, in_list = held[1:].lstrip(), True
        if in_list and held.startswith("]"):
            return
        try:
            row, end = decoder.raw_decode(held)
            whole = done or end < len(held)  # a number at the end may go on
        except (ValueError, RecursionError) as error:
            if done:
                if held or in_list:
                    raise UserError(f"{file.uri} item {number + 1} is not JSON: {error}") from error
                return
            whole = False
        if whole:
            number += 1
            yield f"item {number}", row
            held = held[end:]
        elif more := text.read(2**20 + len(held)):  # twice as much each time: no item is tried often
            held += more
        else:
            done = True


class Parquet:
    """Rows of row groups, only the columns that are asked for."""

    def schema(self, file: File) -> pa.Schema:
        with _told(file), open_random(file.uri) as source, pq.ParquetFile(source) as parquet:
            return parquet.schema_arrow

    def parts(self, file: File) -> list[PartOf]:
        with _told(file), open_random(file.uri) as source, pq.ParquetFile(source) as parquet:
            groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        parts: list[PartOf] = []
        begin = first = rows = size = 0
        for number, (more_rows, more_size) in enumerate([*sizes, (0, PART_BYTES + 1)]):
            if rows and (rows + more_rows > PART_ROWS or size + more_size > PART_BYTES):
                parts.append((f"{file.name}#{begin}", {"groups": (begin, number), "first": first}, rows))
                begin, first, rows, size = number, first + rows, 0, 0
            rows, size = rows + more_rows, size + more_size
        return parts

    def batches(self, file: File, of: Mapping[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        # Buffered and not read ahead: of a row group of gigabytes only as much is held as a batch needs.
        with (
            _told(file),
            open_random(file.uri) as source,
            pq.ParquetFile(source, buffer_size=2**20, pre_buffer=False) as parquet,
        ):
            _require(file, parquet.schema_arrow.names, columns)
            groups = list(range(*of["groups"]))
            rows = min(_rows_at_once(parquet.metadata.row_group(group), columns) for group in groups)
            for batch in parquet.iter_batches(rows, row_groups=groups, columns=list(columns), use_threads=False):
                yield batch.select(list(columns))


def _rows_at_once(group: Any, columns: Sequence[str]) -> int:
    """By what rows of these columns take on average."""
    wanted = (group.column(place) for place in range(group.num_columns))
    size: int = sum(each.total_uncompressed_size for each in wanted if each.path_in_schema.split(".")[0] in columns)
    return max(1, min(ROWS, BYTES * int(group.num_rows) // max(1, size)))


class Arrow:
    """Arrow's stream format, in which `datasets` keeps its tables, or its file format."""

    def schema(self, file: File) -> pa.Schema:
        with _told(file), open_random(file.uri) as source:
            return self._reader(source).schema

    def parts(self, file: File) -> list[PartOf]:
        return [(file.name, {}, None)]

    def batches(self, file: File, of: Mapping[str, Any], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _told(file), open_random(file.uri) as source:
            reader = self._reader(source)
            _require(file, reader.schema.names, columns)
            for batch in self._batches(reader):
                taken = batch.select(list(columns))
                rows = max(1, min(ROWS, BYTES * max(1, taken.num_rows) // max(1, taken.nbytes)))
                for first in range(0, taken.num_rows, rows):
                    yield taken.slice(first, rows)

    def _batches(self, reader: Any) -> Iterator[pa.RecordBatch]:
        if isinstance(reader, pa.RecordBatchStreamReader):
            return iter(reader)
        return map(reader.get_batch, range(reader.num_record_batches))

    def _reader(self, source: pa.NativeFile) -> Any:
        magic = source.read(6)
        source.seek(0)
        return pa.ipc.open_file(source) if magic == b"ARROW1" else pa.ipc.open_stream(source)


FORMATS: dict[str, TableFormat] = {
    **dict.fromkeys((".csv", ".csv.gz", ".csv.bz2", ".csv.zst"), Csv(csv.excel)),
    **dict.fromkeys((".tsv", ".tsv.gz", ".tsv.bz2", ".tsv.zst"), Csv(csv.excel_tab)),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.bz2", ".jsonl.zst"), Json(lines=True)),
    **dict.fromkeys((".json", ".json.gz"), Json(lines=False)),
    ".parquet": Parquet(),
    **dict.fromkeys((".arrow", ".feather"), Arrow()),
}
"""By ending."""


@contextlib.contextmanager
def _text(file: File) -> Iterator[io.TextIOWrapper]:
    """Unpacked, with ends of lines as they are inside of cells, without a byte order mark."""
    with open_stream(file.uri) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        yield text


def _texts(rows: Sequence[Sequence[str | None]], columns: Sequence[str]) -> pa.RecordBatch:
    cells = zip(*rows, strict=True) if columns else []
    arrays = [pa.array(column, pa.string()) for column in cells]
    if not columns:  # rows are counted where nothing is asked of them
        return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
    return pa.RecordBatch.from_arrays(arrays, list(columns))


def as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
