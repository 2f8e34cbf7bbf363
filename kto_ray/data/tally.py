"""Sources in which an image has several rows: rows are votes, which are added up before an image is read.

    1. read the columns that say what was voted, not the images, into a database on disk
    2. ask it for each image's verdict, and for the place at which the image stands first
    3. read the rows at these places, with images

Memory stays bounded however many votes there are: DuckDB spills what does not fit, and what is kept of an image between
the second step and the third is its place, verdict and counts. `pairs.py`, `ratings.py` and `votes.py` say what a vote
is, and which question gives verdicts.
"""

import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.data.files import is_missing
from kto_ray.data.labelling import Images, labelled, metadata
from kto_ray.data.notes import MISSING, Notes
from kto_ray.data.protocol import LABELLED, Part, Preview, Source
from kto_ray.data.rows import Rows
from kto_ray.data.table import numbered
from kto_ray.data.verdicts import connect, counted

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ITEMS, ROWS = 2**10, 2**32
"""More than there are of images in a row, and of rows in a part."""
KEY = "md5_number(image || chr(0) || prompt)"
"""An image under a prompt, in 16 bytes."""


def place(part: int, rows: Sequence[int], items: Sequence[int]) -> pa.Array:
    """Where images stand, as one ascending number each."""
    return pa.array([(part * ROWS + row) * ITEMS + item for row, item in zip(rows, items, strict=True)], pa.int64())


class TallySource(Source):
    """See the module."""

    kind: str
    where: str
    rows: Rows

    def __init__(self, kind: str, rows: Rows) -> None:
        self.kind, self.rows, self.where = kind, rows, rows.where
        self.field = f"data.sources ({kind})"

    def __getstate__(self) -> dict[str, Any]:
        cached = {name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    # -- what a kind of source says ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, str]:
        """Which columns are what, for previews."""

    @property
    @abstractmethod
    def light(self) -> Sequence[str]:
        """Columns that say what was voted."""

    @property
    @abstractmethod
    def heavy(self) -> Sequence[str]:
        """Columns of prompts and images."""

    @abstractmethod
    def votes(self, part: int, first: int, batch: pa.RecordBatch, notes: Notes) -> pa.Table:
        """What a batch of the light columns comes to.

        Args:
            part: number of the part that it is of.
            first: number of the batch's first row in the part.
        """

    @abstractmethod
    def count(self, votes: "DuckDBPyConnection", notes: Notes) -> pa.Table:
        """What the table "votes" comes to: columns "place", "desirable", "who" and figures, ascending by place."""

    @abstractmethod
    def images(self, batch: pa.RecordBatch, rows: pa.Array, items: pa.Array, folder: str) -> Images:
        """Those at places in a batch of the heavy columns."""

    @abstractmethod
    def prompts(self, batch: pa.RecordBatch, rows: pa.Array) -> list[str | None]:
        """Those of rows in such a batch."""

    # -- what all of them do ------------------------------------------------------------------------------------------

    @cached_property
    def _counted(self) -> tuple[list[Part], pa.Table, Notes]:
        """Parts as the rows have them, each image's verdict and place, and what was left out."""
        notes, parts = Notes(), list(self.rows.parts())
        with tempfile.TemporaryDirectory(prefix="kto-ray-") as folder, connect(folder) as database:
            known = False
            for number, part in enumerate(parts):
                first = 0
                for batch in self.rows.batches(part, self.light):
                    votes = database.from_arrow(self.votes(number, first, batch, notes))
                    if known:
                        votes.insert_into("votes")
                    else:
                        votes.create("votes")
                        known = True
                    first += batch.num_rows
            if not known:
                nothing = pa.table({"place": pa.array([], pa.int64()), "desirable": pa.array([], pa.bool_())})
                return parts, nothing, notes
            return parts, self.count(database, notes), notes

    def parts(self) -> Sequence[Part]:
        parts, verdicts, _ = self._counted
        found = []
        of_part = pc.divide(verdicts["place"], ROWS * ITEMS).combine_chunks().to_numpy()
        for number, part in enumerate(parts):
            first, end = of_part.searchsorted([number, number + 1])
            if first < end:
                taken = verdicts.take(pa.array(range(first, end)))  # a slice would pickle with all the others
                found.append(Part(part.name, {**part.of, "taken": taken}, int(end - first)))
        return found

    def read(self, part: Part) -> Iterator[pa.Table]:
        taken, first = part.of["taken"], 0
        places = pc.subtract(taken["place"], taken["place"][0].as_py() // (ROWS * ITEMS) * ROWS * ITEMS)
        rows = pc.divide(places, ITEMS).combine_chunks()
        items = pc.subtract(places, pc.multiply(pc.divide(places, ITEMS), ITEMS)).combine_chunks()
        row_numbers = rows.to_numpy()
        for start, batch in numbered(self.rows, part, list(self.heavy)):
            low, high = row_numbers.searchsorted([first, first + batch.num_rows])
            if low < high:
                here = slice(low, high)
                in_batch = pc.subtract(rows[here], first)
                table = self._labelled(part, start - first, batch, in_batch, items[here], taken.slice(low, high - low))
                if table.num_rows:
                    yield table
            first += batch.num_rows

    def _labelled(
        self, part: Part, offset: int, batch: pa.RecordBatch, rows: pa.Array, items: pa.Array, taken: pa.Table
    ) -> pa.Table:
        """Rows and items at places in a batch; `offset` is what leads to rows of the file."""
        in_part = pc.divide(taken["place"], ITEMS).to_pylist()
        return labelled(
            [
                f"{self.kind}:{part.of['name']}:{row % ROWS + offset}:{item}"
                for row, item in zip(in_part, items.to_pylist(), strict=True)
            ],
            self.images(batch, rows, items, self.rows.folder(part)),
            self.prompts(batch, rows),
            taken["desirable"].combine_chunks(),
            taken["who"].combine_chunks() if "who" in taken.column_names else None,
            figures(taken),
        )

    def preview(self) -> Preview:
        _, verdicts, known = self._counted
        counts, notes, rows = (
            Counter[str](),
            Notes(known.counts.copy(), dict(known.examples), known.facts),
            verdicts.num_rows,
        )
        first = LABELLED.empty_table()
        counts.update(counted(verdicts["desirable"].combine_chunks()))
        first = next(self.tables(), first).slice(0, 5)
        if first.num_rows and first["image"].null_count == first.num_rows:  # paths: reading them costs little
            counts.clear()
            rows = 0
            for table in self.tables():
                rows += table.num_rows
                counts.update(counted(table["desirable"].combine_chunks()))
                lost = [uri for uri in table["uri"].to_pylist() if uri and is_missing(uri)]
                notes.add(MISSING, len(lost), lost)
        return Preview(
            self.kind, self.where, self.columns, rows, counts, first, notes.counts, notes.examples, notes.facts
        )


def true_in(mask: pa.Array) -> int:
    """How often it is true."""
    return pc.sum(pc.cast(mask, pa.int64())).as_py() or 0


def figures(taken: pa.Table) -> list[str | None]:
    """What was counted, as JSON."""
    names = [name for name in taken.column_names if name not in ("place", "desirable", "who")]
    return [
        metadata({name: value for name, value in row.items() if value is not None})
        for row in taken.select(names).to_pylist()
    ]
