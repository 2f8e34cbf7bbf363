"""How files of prompts are read, by their ending: `prompts.py` makes a set of what comes.

    .txt              a prompt a line; a line that begins with "# " is a comment
    .csv .tsv         a header, and a prompt a row
    .jsonl .ndjson    an object (or only a text) a line
    .json             a list of those; or an object a line
    .parquet .arrow   a prompt a row

A folder is that of a dataset: its files of one kind and split, one after the other. The text stands under `text`,
`prompt`, `prompts` or `caption`, the name under `id` where there is one, all in any case, or under a column that the
configuration names; every other column is the prompt's metadata, as text. Files lie on a disk, or wherever `Storage`
reads.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kto_ray.errors import UserError
from kto_ray.storage import Storage
from kto_ray.text import decode

TEXT_COLUMNS = ("text", "prompt", "prompts", "caption")
EXPECTED = 'expected an object such as {"id": "1", "text": "a red circle"}'

T = TypeVar("T")
Raw = tuple[str, str, Any]
"""Where it stands ("line 3"), its number, and what it holds: a text, or columns."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt as it stands in its source.

    `number` is its place there, `id` the name that it gives itself, if it does.
    """

    place: str
    number: str
    text: str
    id: str | None = None
    weight: int = 1
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Columns:
    """Where text, name and weight stand; None: found by name, or, for weights, nowhere."""

    text: str | None = None
    id: str | None = None
    weight: str | None = None


def read_rows(source: str, what: str, split: str | None = None, columns: Columns = Columns()) -> Iterator[Row]:
    """The prompts of a file or folder, in its order.

    Args:
        source: a path or URI.
        what: how messages begin: the field and the source.
        split: of a folder that has several.

    Raises:
        UserError: names the place: an unknown ending, no UTF-8, a malformed row, a row without text.
    """
    path = Path(source).expanduser()
    remote = "://" in source
    is_file = _ending(source) in READERS if remote else path.is_file()
    if is_file:
        folder, name = source.rstrip("/").rpartition("/")[::2] if remote else (str(path.parent), path.name)
        if split is not None:
            raise UserError(f"{what} is a file, and split={split!r} chooses among those of a folder; leave it out")
        yield from _of_file(Storage(folder), name, what, columns)
        return
    folder_ = Storage(source.rstrip("/"))
    files = _of_split(_data_files(_said(what, folder_.files), what), split, what)
    for file in files:
        for row in _of_file(folder_, file, what, columns):
            yield replace(row, place=f"{file} {row.place}") if len(files) > 1 else row


def made_row(made: Any, number: int, what: str, columns: Columns) -> Row:
    """The same of what a `PromptSource` gives: a text, or a mapping."""
    return _row((f"prompt {number}", str(number), made), columns, f"{what} prompt {number}")


def _ending(name: str) -> str:
    """In lower case; web addresses may go on behind it."""
    return PurePosixPath(name.partition("?")[0]).suffix.lower()


def blank(text: str) -> bool:
    """Whether there is nothing to see: spaces, also of no width."""
    return all(letter.isspace() or unicodedata.category(letter) == "Cf" for letter in text)


# -- folders ----------------------------------------------------------------------------------------------------------

NO_PROMPTS = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|cache-.*|(readme|licen[cs]e|requirements)\b.*", re.IGNORECASE
)
"""Names of what lies beside the files of a dataset."""
SHARD = re.compile(r"(?P<split>\w[\w.]*?)-\d{5}-of-\d{5}\.\w+")
KEYWORD = re.compile(r"(?:^|[^a-z0-9])(train|validation|valid|val|dev|test|eval)(?:ing|uation)?(?=[^a-z0-9]|$)")
SAME_SPLIT = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "test"}


def _data_files(names: list[str], what: str) -> list[str]:
    """Those of a dataset's prompts, which are of one kind. Raises UserError."""
    files = [
        name
        for name in names
        if _ending(name) in READERS
        and not NO_PROMPTS.fullmatch(PurePosixPath(name).name)
        and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    if not files:
        raise UserError(f"{what}: there is no file of prompts there; known endings: {', '.join(READERS)}")
    kinds = sorted({_ending(name) for name in files})
    if len(kinds) > 1:
        raise UserError(
            f"{what} has files of several kinds, {', '.join(kinds)}; name one of them, or a folder of one kind"
        )
    return files


def _of_split(files: list[str], split: str | None, what: str) -> list[str]:
    splits: dict[str, list[str]] = {}
    for name in files:
        splits.setdefault(split_of(name), []).append(name)
    if split is None and len(splits) > 1:
        raise UserError(f"{what} has the splits {', '.join(sorted(splits))}; say which one: split={sorted(splits)[0]}")
    if split is not None and split not in splits:
        raise UserError(f"{what} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return next(iter(splits.values())) if split is None else splits[split]


def split_of(name: str) -> str:
    """Of a dataset's file, by its path as Hugging Face names them; "train" where nothing says otherwise."""
    path = PurePosixPath(name)
    if (shard := SHARD.fullmatch(path.name)) and shard["split"] != "data":
        return shard["split"]
    if path.suffix == ".arrow" and len(path.parts) > 1:  # as `save_to_disk` writes splits
        return path.parts[0]
    found = KEYWORD.findall(path.with_suffix("").as_posix().lower())
    return SAME_SPLIT.get(found[-1], found[-1]) if found else "train"


def _said(what: str, read: Callable[[], T]) -> T:
    """What `read` gives; what `Storage` says of a run's folder is said of the source."""
    try:
        return read()
    except FileNotFoundError as error:
        raise UserError(f"{what}: there is no such file") from error
    except UserError as error:
        raise UserError(f"{what}: {str(error).removeprefix('runs_folder: ')}") from error


# -- files ------------------------------------------------------------------------------------------------------------


def _of_file(folder: Storage, name: str, what: str, columns: Columns) -> Iterator[Row]:
    reader = READERS.get(suffix := _ending(name))
    if reader is None:
        raise UserError(
            f"{what}: an ending {suffix!r} says nothing of how prompts stand in a file; "
            f"known: {', '.join(READERS)} (.txt: a prompt a line)"
        )
    with _said(what, lambda: folder.open(name)) as file:
        for raw in reader(file, what):
            yield _row(raw, columns, f"{what} {raw[0]}")


def _lines(text: str) -> Iterator[Raw]:
    # Not splitlines(): a JSON string may contain U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not blank(line):
            yield f"line {number}", str(number), line.strip()


def _plain(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    return (raw for raw in _lines(decode(file.read(), what)) if raw[2] != "#" and not raw[2].startswith("# "))


def _json_lines(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    return _objects(decode(file.read(), what), what)


def _objects(text: str, what: str) -> Iterator[Raw]:
    for place, number, line in _lines(text):
        yield place, number, _parsed(line, f"{what} {place}")


def _json(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    text = decode(file.read(), what)
    if not text.lstrip().startswith("["):
        yield from _objects(text, what)
        return
    for number, raw in enumerate(_parsed(text, what), start=1):
        yield f"item {number}", str(number), raw


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}; {EXPECTED}") from error


def _csv(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    return _table(decode(file.read(), what), what, csv.excel)


class _Unquoted(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _tsv(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    """Many write no quotes around a field, and one that begins with a quotation mark then begins no quoted field."""
    text = decode(file.read(), what)
    try:
        return iter(list(_table(text, what, csv.excel_tab)))
    except UserError as error:
        try:
            return iter(list(_table(text, what, _Unquoted)))
        except UserError:
            raise error from None


def _table(text: str, what: str, dialect: type[csv.Dialect]) -> Iterator[Raw]:
    reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, strict=True, skipinitialspace=True)
    whole = 0  # the line up to which rows are whole
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise UserError(f"{what}: its columns {', '.join(map(repr, columns))} are not all different")
        for number, row in enumerate(reader, start=1):
            whole = reader.line_num
            place = f"line {whole}"
            if None in row or None in row.values():
                raise UserError(f"{what} {place} has not the {len(columns)} columns of the header: {_some(row)}")
            yield place, str(number), row
    except csv.Error as error:
        raise UserError(f"{what}: the row that begins in line {whole + 1} cannot be read: {error}") from error


def _parquet(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    try:
        parquet = pq.ParquetFile(file)
        yield from _numbered(parquet.iter_batches(columns=_written(parquet.schema_arrow)))
    except pa.ArrowException as error:
        raise UserError(f"{what} is no Parquet file that can be read: {error}") from error


def _arrow(file: pa.NativeFile, what: str) -> Iterator[Raw]:
    """As `Dataset.save_to_disk` writes it, a stream; or a file."""
    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).read_all()
        yield from _numbered(table.select(_written(table.schema)).to_batches(1024))
    except pa.ArrowException as error:
        raise UserError(f"{what} is no Arrow file that can be read: {error}") from error


def _written(schema: pa.Schema) -> list[str]:
    """Columns of texts, numbers, truths and dates; without pictures, lists and mappings."""
    return [column.name for column in schema if not (pa.types.is_nested(column.type) or "binary" in str(column.type))]


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[Raw]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", str(number), row


READERS: dict[str, Callable[[pa.NativeFile, str], Iterator[Raw]]] = {
    ".txt": _plain,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


# -- rows -------------------------------------------------------------------------------------------------------------


def _row(raw: Raw, columns: Columns, where: str) -> Row:
    place, number, held = raw
    if isinstance(held, str):
        held = {columns.text or "text": held}
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise UserError(f"{where} is no object, and no text: {_some(held)}; {EXPECTED}")
    rest = dict(held)
    text, name = _take(rest, columns.text, TEXT_COLUMNS, where), _take(rest, columns.id, ("id",), where)
    if text is None and not any(column.strip().lower() in TEXT_COLUMNS for column in held) and columns.text is None:
        have, known = ", ".join(map(repr, held)), ", ".join(map(repr, TEXT_COLUMNS))
        raise UserError(f"{where} has no text: no {known} among its columns {have}; name the right one as text=COLUMN")
    weight = 1 if columns.weight is None else _weight(_take(rest, columns.weight, (), where), columns.weight, where)
    if text is None or (isinstance(text, str) and blank(text)):
        raise UserError(f"{where} has an empty text: {_some(held)}; {EXPECTED}")
    if not isinstance(text, str):
        raise UserError(f"{where} has a text of type {type(text).__name__}: {_some(held)}; {EXPECTED}")
    if name is not None and blank(name := _as_text(name)):
        raise UserError(f"{where} has an empty id: {_some(held)}; {EXPECTED}")
    return Row(place, number, text, name, weight, {key: _as_text(rest[key]) for key in rest if rest[key] is not None})


def _take(row: dict[str, Any], named: str | None, names: tuple[str, ...], where: str) -> Any:
    """Take out the named column, or the first of `names`: as it is written comes before upper and lower case."""
    if named is not None:
        if named not in row:
            raise UserError(f"{where} has no column {named!r}; it has {', '.join(map(repr, row))}")
        return row.pop(named)
    for name in names:
        for column in (name, *row):
            if column in row and column.strip().lower() == name:
                return row.pop(column)
    return None


def _weight(value: Any, column: str, where: str) -> int:
    try:
        weight = int(str(value))
    except ValueError:
        weight = 0
    if not 1 <= weight <= MAX_WEIGHT:
        raise UserError(f"{where} has the weight {value!r} in {column!r}; give a whole number from 1 to {MAX_WEIGHT}")
    return weight


MAX_WEIGHT = 1000


def _as_text(value: Any) -> str:
    """Numbers, truths and what is nested as JSON writes them."""
    plain = isinstance(value, bool | int | float | list | dict)
    return json.dumps(value, ensure_ascii=False, default=str) if plain else str(value)


def _some(row: Any) -> str:
    return (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str))[:80]
