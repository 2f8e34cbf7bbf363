"""How a cell becomes a verdict: by the usual words for yes and no, by values that are named, or by an expression.

    desirable     true, 1, yes, liked, up, good, win, chosen, ...
    undesirable   false, 0, -1, no, disliked, down, bad, lose, rejected, ...
    no verdict    null, nothing, 0.5, abstain, unsure, tie, ...

in any case. Whatever else stands there is no verdict and is counted as not understood; numbers on another scale need an
expression: "rating >= 4". Expressions are DuckDB's SQL, over the columns of one row, without files or network.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.errors import UserError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

YES = (
    *("desirable", "true", "t", "yes", "y", "1", "+1", "like", "liked", "up", "upvote", "thumbs_up", "thumbsup"),
    *("good", "positive", "win", "winner", "chosen", "preferred", "accept", "accepted", "approved", "👍", "❤️"),
)
NO = (
    *("undesirable", "false", "f", "no", "n", "0", "-1", "dislike", "disliked", "down", "downvote", "thumbs_down"),
    *("thumbsdown", "bad", "negative", "lose", "loser", "reject", "rejected", "👎"),
)
NEITHER = ("", "0.5", "abstain", "unsure", "neutral", "skip", "skipped", "tie", "none", "null", "nan", "n/a", "failed")


class Reading:
    """What cells of a column of verdicts mean.

    Args:
        desirable: values that mean yes; none: the usual ones.
        undesirable: values that mean no.
    """

    def __init__(self, desirable: Sequence[object] = (), undesirable: Sequence[object] = ()) -> None:
        self.named = bool(desirable)
        self.yes = tuple(map(_plain, desirable)) if desirable else YES
        self.no = tuple(map(_plain, undesirable)) if desirable else NO

    def read(self, cells: pa.Array) -> tuple[pa.BooleanArray, pa.BooleanArray]:
        """Verdicts, null for none, and which cells are not understood."""
        words = plain(cells)
        yes = pc.is_in(words, pa.array(self.yes))
        no = pc.is_in(words, pa.array(self.no))
        known = pc.or_(yes, no)
        verdicts = pc.if_else(known, yes, pa.scalar(None, pa.bool_()))
        if self.named:
            return verdicts, pa.repeat(pa.scalar(False), len(words))
        neither = pc.fill_null(pc.is_in(words, pa.array(NEITHER)), True)
        return verdicts, pc.invert(pc.or_(known, neither))


def _plain(value: object) -> str:
    return str(plain(pa.array([value]))[0].as_py())


def plain(cells: pa.Array) -> pa.Array:
    """Texts in lower case without spaces around; 1.0 is 1."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_boolean(cells.type):
        return pc.fill_null(pc.cast(cells, pa.string()), "")
    words = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(cells, pa.string())))
    words = pc.replace_substring_regex(words, r"^([+-]?\d+)\.0+$", r"\1")
    return pc.fill_null(words, "")


class Expression:
    """An SQL expression over the columns of a table, as a truth value of each row.

    Args:
        text: for instance "rating >= 4 and safe".
        field: of the configuration, for messages.
        numbers: columns of texts that are read as numbers; what is none becomes null.
    """

    def __init__(self, text: str, field: str, numbers: Sequence[str] = ()) -> None:
        self.text, self.field, self.numbers = text, field, tuple(numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("text", "field", "numbers")}

    @cached_property
    def _connection(self) -> "DuckDBPyConnection":
        return connect()

    def columns(self, schema: pa.Schema) -> list[str]:
        """Those of a table that it looks at.

        Raises:
            UserError: it is no expression over these columns, or no truth.
        """
        # Without one of those that it needs it does not hold; without any other it does.
        self(pa.RecordBatch.from_pylist([], schema=schema))
        needed = []
        for name in schema.names:
            rest = pa.schema([field for field in schema if field.name != name] or [pa.field("_", pa.bool_())])
            try:
                self(pa.RecordBatch.from_pylist([], schema=rest))
            except UserError:
                needed.append(name)
        return needed

    def __call__(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """Raises UserError: it does not hold for these columns, or cannot be worked out for a row."""
        import duckdb

        for name in set(self.numbers) & set(batch.schema.names):
            place = batch.schema.get_field_index(name)
            batch = batch.set_column(place, name, as_numbers(batch.column(place)))
        try:
            truth = duckdb.SQLExpression(self.text).cast("BOOLEAN").alias("truth")
            answer = self._connection.from_arrow(pa.Table.from_batches([batch])).select(truth).to_arrow_table()
        except duckdb.Error as error:
            known = ", ".join(map(repr, batch.schema.names))
            why = str(error).splitlines()[0]
            advice = "; write try_cast(COLUMN AS DOUBLE)" if "cast is required" in why else ""
            raise UserError(
                f"{self.field}: {self.text!r} is no truth about the columns {known}: {why}{advice}"
            ) from error
        column = answer.column("truth").combine_chunks()
        return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def connect(folder: str | None = None) -> "DuckDBPyConnection":
    """A database in memory, or in a folder, that reaches nothing else.

    Args:
        folder: for what does not fit into a bounded amount of memory.
    """
    import duckdb

    settings: dict[str, str | bool | int | float | list[str]] = {"threads": 1, "memory_limit": "512MB"}
    if folder is not None:
        settings |= {"temp_directory": f"{folder}/aside"}
    connection = duckdb.connect(f"{folder}/votes.duckdb" if folder else ":memory:", config=settings)
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_external_access = false")
    return connection


def as_numbers(words: pa.Array) -> pa.Array:
    """Texts as float64; null where one is no number."""
    words = pc.utf8_trim_whitespace(words)
    digits = pc.match_substring_regex(words, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
    return pc.cast(pc.if_else(digits, words, pa.scalar(None, pa.string())), pa.float64())


def are_numbers(words: pa.Array) -> bool:
    """Whether a column of texts holds numbers, as far as something stands there."""
    said = pc.filter(words, pc.invert(pc.is_in(plain(words), pa.array(["", "none", "null", "nan", "n/a"]))))
    return len(said) > 0 and as_numbers(said).null_count == 0


def counted(verdicts: pa.Array) -> Mapping[str, int]:
    """How many of each."""
    yes = pc.sum(pc.cast(verdicts, pa.int64())).as_py() or 0
    return {"desirable": yes, "undesirable": len(verdicts) - verdicts.null_count - yes, "none": verdicts.null_count}
