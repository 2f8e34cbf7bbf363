"""Rows of a query's answer, of any database that SQLAlchemy opens; streamed, as often as they are read.

The query must answer in a stable order, and alike each time: rows are known by their number.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from pydantic import SecretStr

from kto_ray.config.data import VotesData
from kto_ray.data.formats import BYTES, FIRST, ROWS
from kto_ray.data.protocol import Part
from kto_ray.errors import UserError
from kto_ray.secrets import fill, hide_in_database

AT_ONCE = 1_000
"""Rows fetched at a time."""


class SqlRows:
    """See the module.

    Args:
        base: folder that paths of images are relative to.
    """

    def __init__(self, settings: VotesData, what: str, base: str) -> None:
        assert settings.database
        self.settings, self.what, self.base = settings, what, base
        self.where = hide_in_database(settings.database.get_secret_value())

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("settings", "what", "base", "where")}

    @cached_property
    def _schema(self) -> pa.Schema:
        """Numbers, truth values, bytes, or else texts, by what stands in the first rows."""
        names: list[str] = []
        rows: list[Sequence[Any]] = []
        for found, row in islice(self._rows(), FIRST):
            names, rows = found, [*rows, row]
        if not names:
            raise UserError(f"{self.what}: query: it has no rows")
        columns = zip(*rows, strict=True)
        return pa.schema([(name, _type(column)) for name, column in zip(names, columns, strict=True)])

    def schema(self) -> pa.Schema:
        return self._schema

    def parts(self) -> Sequence[Part]:
        return [Part("query", {"name": "query"}, None)]

    def folder(self, part: Part) -> str:
        return self.base

    def batches(self, part: Part, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([self._schema.field(name) for name in columns])
        gathered: list[list[Any]] = []
        size = 0
        for names, row in self._rows():
            cells = [row[names.index(name)] for name in columns]
            gathered.append([_as(cell, field.type) for cell, field in zip(cells, schema, strict=True)])
            size += sum(len(cell) for cell in cells if isinstance(cell, bytes | memoryview))
            if len(gathered) == ROWS or size > BYTES:
                yield self._batch(gathered, schema)
                gathered, size = [], 0
        if gathered:
            yield self._batch(gathered, schema)

    def _batch(self, rows: list[list[Any]], schema: pa.Schema) -> pa.RecordBatch:
        columns = zip(*rows, strict=True)
        try:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        except pa.ArrowException as error:
            raise UserError(f"{self.what}: query: a column changes its type: {error}; cast it in the query") from error
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _rows(self) -> Iterator[tuple[list[str], Sequence[Any]]]:
        database, query = self.settings.database, self.settings.query
        assert database
        assert query
        engine = open_engine(database, f"{self.what}: database")
        try:
            with engine.connect().execution_options(yield_per=AT_ONCE) as connection:
                answer = connection.execute(sa.text(query))
                if not answer.returns_rows:
                    raise UserError(f"{self.what}: query: it answers nothing; it has to be a SELECT")
                names = list(answer.keys())
                for row in answer:
                    yield names, row
        except sa.exc.SQLAlchemyError as error:
            raise UserError(f"{self.what}: query: {self.where} does not answer: {reason(error)}") from error
        finally:
            engine.dispose()


def open_engine(database: SecretStr, field: str) -> sa.Engine:
    """An engine for a database of the user's, without having called it.

    Raises:
        UserError: its URL cannot be read, or no driver for it is installed.
    """
    url = database.get_secret_value()
    try:
        return sa.create_engine(fill(url, field))
    except (sa.exc.ArgumentError, ImportError) as error:
        raise UserError(f"{field}: {hide_in_database(url)} cannot be opened: {error}") from error


def reason(error: sa.exc.SQLAlchemyError) -> str:
    """What a database said, in a line."""
    return str(getattr(error, "orig", None) or error).split("\n")[0]


def _type(cells: Sequence[Any]) -> pa.DataType:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds and kinds <= {bytes, memoryview, bytearray}:
        return pa.binary()
    if kinds == {bool}:
        return pa.bool_()
    if kinds and kinds <= {int, float, bool}:
        return pa.float64()
    return pa.string()


def _as(cell: Any, kind: pa.DataType) -> Any:
    """Times become ISO 8601, whatever else is no text becomes JSON."""
    if cell is None or not pa.types.is_string(kind) or isinstance(cell, str):
        return bytes(cell) if isinstance(cell, memoryview | bytearray) else cell
    return cell.isoformat() if hasattr(cell, "isoformat") else json.dumps(cell, default=str)
