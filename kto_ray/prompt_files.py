"""How a prompts file is read, by its ending: `prompts.py` makes a set of what comes.

    .txt              a prompt a line, named by line number; a line that begins with "# " is a comment
    .csv .tsv         a header, and a prompt a row, named by row number
    .jsonl .ndjson    an object (or only a text) a line, named by line number
    .json             a list of those, named by their place in it; or an object a line

The text stands under `text`, `prompt` or `caption`, the name under `id` where there is one, both in any case; every
other column is the prompt's metadata.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.text import read_text

TEXT_COLUMNS = ("text", "prompt", "caption")
EXPECTED = 'expected an object of strings such as {"id": "1", "text": "a red circle"}'

Row = tuple[str, str, Any]
"""Where it stands, the name that it has if it says no other, and what it holds: a text, or columns."""


def read_prompts(path: Path, what: str) -> Iterator[tuple[str, Prompt]]:
    """The prompts of a file, in its order, each with where it stands ("line 3").

    Args:
        what: how messages begin: the field and the file.

    Raises:
        UserError: names the place: an unknown ending, no UTF-8, a malformed row, a row without text.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{what}: an ending {path.suffix!r} says nothing of how prompts stand in a file; "
            f"known: {', '.join(READERS)} (.txt: a prompt a line)"
        )
    for place, number, row in reader(read_text(path, what), what):
        yield place, _prompt(row, number, f"{what} {place}")


def blank(text: str) -> bool:
    """Whether there is nothing to see: spaces, also of no width."""
    return all(letter.isspace() or unicodedata.category(letter) == "Cf" for letter in text)


def _lines(text: str) -> Iterator[Row]:
    # Not splitlines(): a JSON string may contain U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not blank(line):
            yield f"line {number}", str(number), line.strip()


def _plain(text: str, _what: str) -> Iterator[Row]:
    return (row for row in _lines(text) if row[2] != "#" and not row[2].startswith("# "))


def _json_lines(text: str, what: str) -> Iterator[Row]:
    for place, number, line in _lines(text):
        yield place, number, _parsed(line, f"{what} {place}")


def _json(text: str, what: str) -> Iterator[Row]:
    if not text.lstrip().startswith("["):
        yield from _json_lines(text, what)
        return
    for number, row in enumerate(_parsed(text, what), start=1):
        yield f"item {number}", str(number), row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}; {EXPECTED}") from error


def _table(dialect: type[csv.Dialect]) -> Callable[[str, str], Iterator[Row]]:
    def rows(text: str, what: str) -> Iterator[Row]:
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

    return rows


READERS = {
    ".txt": _plain,
    ".csv": _table(csv.excel),
    ".tsv": _table(csv.excel_tab),
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}


def _prompt(row: Any, number: str, where: str) -> Prompt:
    if isinstance(row, str) and not blank(row):
        return Prompt(number, row)
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise UserError(f"{where} is no object of strings: {_some(row)}; {EXPECTED}")
    columns, rest = ", ".join(map(repr, row)), dict(row)
    text, name = _take(rest, *TEXT_COLUMNS), _take(rest, "id")
    if text is None:
        raise UserError(f"{where} has no text: no {', '.join(map(repr, TEXT_COLUMNS))} among its columns {columns}")
    for column, value in (("text", text), ("id", name)):
        if value is not None and blank(value):
            raise UserError(f"{where} has an empty {column}: {_some(row)}; {EXPECTED}")
    return Prompt(number if name is None else name, text, rest)


def _take(row: dict[str, str], *names: str) -> str | None:
    """Take out the first column of these names; as it is written comes before upper and lower case."""
    for name in names:
        for column in (name, *row):
            if column in row and column.strip().lower() == name:
                return row.pop(column)
    return None


def _some(row: Any) -> str:
    return (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str))[:80]
