"""A row an image: any table of images, prompts and verdicts.

    prompt,image,label                        {"prompt": "a cat", "file_name": "7.png", "liked": true}
    a cat,images/7.png,1

CSV, TSV, JSON lines, JSON, Parquet and Arrow (`formats.py`); in Parquet and Arrow images may lie in the rows, as bytes
or as the struct of bytes and path in which `datasets` keeps its images. This is also the layout of an unpaired
preference data set as TRL has them: a prompt (a text, or a conversation), an image, a boolean `label`.

Each row stands for itself; where rows are votes, several an image, see `votes.py`.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.config.data import UNLABELLED, HuggingFaceData, ImageFolderData, TableData, WebDatasetData
from kto_ray.data.columns import FoundColumns, find_columns, is_image, is_text
from kto_ray.data.files import absolute, is_missing
from kto_ray.data.labelling import Images, as_metadata, holds_images, labelled, note_images, prompts_of
from kto_ray.data.notes import BOTH, FILTERED, MISSING, NOT_UNDERSTOOD, REPEATED, Notes
from kto_ray.data.protocol import LABELLED, Part, Preview, Source
from kto_ray.data.rows import FileRows, Rows
from kto_ray.data.verdicts import Expression, Reading, are_numbers, connect, counted, plain
from kto_ray.errors import UserError

FIRST = 5
"""Rows of a preview."""
SIGNS = frozenset({"0", "-1"})
"""Either means no, unless both are there."""


@dataclass(frozen=True)
class TablePlan:
    """Which columns are read for what."""

    schema: pa.Schema
    columns: FoundColumns
    expression: Expression | None
    where: Expression | None
    looked_at: tuple[str, ...]
    """By expressions."""

    def needed(self, *more: str) -> list[str]:
        return list(dict.fromkeys([*self.columns.of.values(), *self.looked_at, *more]))


class TableSource(Source):
    """See the module.

    Args:
        rows: what is read; None: the files that the settings name.
        kind: for ids and messages.
    """

    def __init__(
        self,
        settings: TableData | ImageFolderData | WebDatasetData | HuggingFaceData,
        rows: Rows | None = None,
        kind: str = "table",
    ) -> None:
        self.settings, self.kind, self.field = settings, kind, f"data.sources ({kind})"
        self.rows: Rows = rows or files_of(settings, self.field)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("settings", "kind", "field", "rows")}

    @cached_property
    def plan(self) -> TablePlan:
        """Raises UserError where a column is not there, or cannot be what it is taken for."""
        settings, schema = self.settings, self.rows.schema()
        columns = find_columns(schema, self.named(schema), self.rows.where, self.field)
        if not holds_images(schema.field(columns["image"]).type):
            raise UserError(
                f"{self.field}: image: {columns['image']!r} in {self.rows.where} is "
                f"{schema.field(columns['image']).type}; give a column of paths, URIs, or bytes of image files"
            )
        for name in (*settings.keep, *([settings.id] if settings.id else [])):
            if name not in schema.names:
                raise UserError(f"{self.field}: {self.rows.where} has no column {name!r}; it has: {schema.names}")
        expression, where = expressions(
            self.rows, self.field, {"expression": settings.expression, "where": settings.where}
        )
        looked_at = [*(expression.columns(schema) if expression else []), *(where.columns(schema) if where else [])]
        return TablePlan(schema, columns, expression, where, tuple(looked_at))

    def named(self, schema: pa.Schema) -> dict[str, str | None]:
        """What is looked for among the columns, with its name where that is known."""
        settings = self.settings
        named = {"prompt": settings.prompt, "image": settings.image, "who": settings.who}
        return named if settings.expression or settings.verdict == UNLABELLED else named | {"verdict": settings.verdict}

    def parts(self) -> Sequence[Part]:
        return self.rows.parts()

    def read(self, part: Part) -> Iterator[pa.Table]:
        plan, keep, named = self.plan, self.settings.keep, self.settings.id
        for first, batch in numbered(self.rows, part, plan.needed(*keep, *([named] if named else []))):
            ids = self._ids(part, first, batch)
            batch, ids = self._filtered(batch, ids)
            who = plan.columns.get("who")
            table = labelled(
                ids,
                Images(batch.column(plan.columns["image"]), self.rows.folder(part)),
                prompts_of(batch.column(plan.columns["prompt"])),
                self._verdicts(batch),
                batch.column(who) if who else None,
                as_metadata(batch, keep),
            )
            if table.num_rows:
                yield table

    def _ids(self, part: Part, first: int, batch: pa.RecordBatch) -> list[str]:
        if self.settings.id:
            return [f"{self.kind}:{name}" for name in batch.column(self.settings.id).to_pylist()]
        return [f"{self.kind}:{part.of['name']}:{first + number}" for number in range(batch.num_rows)]

    def _filtered(
        self, batch: pa.RecordBatch, ids: list[str], notes: Notes | None = None
    ) -> tuple[pa.RecordBatch, list[str]]:
        if self.plan.where is None:
            return batch, ids
        wanted = pc.fill_null(self.plan.where(batch), False)
        if notes:
            notes.add(FILTERED, len(ids) - (pc.sum(pc.cast(wanted, pa.int64())).as_py() or 0))
        return batch.filter(wanted), [name for name, keep in zip(ids, wanted.to_pylist(), strict=True) if keep]

    def _verdicts(self, batch: pa.RecordBatch, notes: Notes | None = None) -> pa.Array:
        """Of each row; null for none."""
        if self.plan.expression:
            return self.plan.expression(batch)
        column = self.plan.columns.get("verdict")
        if column is None:
            return pa.nulls(batch.num_rows, pa.bool_())
        cells = named_classes(batch.column(column), self.plan.schema, column)
        verdicts, odd = Reading(self.settings.desirable, self.settings.undesirable).read(cells)
        if notes:
            strange = cells.filter(odd).to_pylist()
            notes.add(NOT_UNDERSTOOD, len(strange), map(repr, dict.fromkeys(strange)))
            if not self.settings.desirable:
                notes.signs |= SIGNS & set(pc.unique(plain(cells)).to_pylist())
        return verdicts

    def preview(self) -> Preview:
        plan, notes, counts, rows = self.plan, Notes(), Counter[str](), 0
        light = [name for name in plan.needed() if not is_image(plan.schema.field(name).type)]
        if self.settings.id:
            light = list(dict.fromkeys([*light, self.settings.id]))
        by_path = plan.columns["image"] in light
        with Seen() as seen:
            for part in self.parts():
                for number, batch in numbered(self.rows, part, light):
                    ids = self._ids(part, number, batch)
                    seen.ids(ids if self.settings.id else [])
                    batch, ids = self._filtered(batch, ids, notes)
                    prompts = prompts_of(batch.column(plan.columns["prompt"]), notes)
                    verdicts = self._verdicts(batch, notes)
                    images = Images.of(pa.nulls(len(ids), pa.string()), pa.repeat(b"?", len(ids)))
                    if by_path:
                        images = Images(batch.column(plan.columns["image"]), self.rows.folder(part))
                        note_images(images, ids, notes)
                    table = labelled(ids, images, prompts, verdicts)
                    rows += table.num_rows
                    counts.update(counted(table["desirable"].combine_chunks()))
                    if by_path:
                        lost = [uri for uri in table["uri"].to_pylist() if uri and is_missing(uri)]
                        notes.add(MISSING, len(lost), lost)
                        seen.rows(table.filter(pc.is_valid(table["uri"])))
            seen.tell(notes, self.field, self.settings.id)
        self._require_sense(counts, notes)
        return Preview(
            self.kind, self.rows.where, plan.columns.of, rows, counts, first_rows(self), notes.counts, notes.examples
        )

    def _require_sense(self, counts: Counter[str], notes: Notes) -> None:
        if notes.signs == SIGNS:
            raise UserError(
                f"{self.field}: verdict: column {self.plan.columns['verdict']!r} in {self.rows.where} has both 0 and "
                "-1 in it, and either could mean no; say which: {desirable: [1], undesirable: [-1]}"
            )
        strange = notes.counts[NOT_UNDERSTOOD]
        if strange and not counts["desirable"] + counts["undesirable"]:
            column = self.plan.columns["verdict"]
            raise UserError(
                f"{self.field}: verdict: no value of column {column!r} in {self.rows.where} is understood, such as "
                f"{', '.join(notes.examples[NOT_UNDERSTOOD])}; name those that mean yes and no, {{desirable: [...], "
                f"undesirable: [...]}}, or give an expression: '{column} >= 4'"
            )


def files_of(settings: Any, field: str) -> FileRows:
    """Rows of the files that a source's settings name."""
    return FileRows(settings.path, field, absolute(settings.images) if settings.images else None)


def numbered(rows: Rows, part: Part, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of a part, each with the number of its first row in the part's file."""
    first = int(part.of.get("first", 0))
    for batch in rows.batches(part, columns):
        yield first, batch
        first += batch.num_rows


def expressions(rows: Rows, field: str, texts: Mapping[str, str | None]) -> list[Expression | None]:
    """SQL expressions over the columns of rows. Columns of texts that hold numbers, as CSV has them, are numbers there.

    Raises:
        UserError: one does not hold for these columns.
    """
    schema, numbers = rows.schema(), list[str]()
    if any(texts.values()):
        words = [name for name in schema.names if is_text(schema.field(name).type)]
        parts = rows.parts()
        batch = next(iter(rows.batches(parts[0], words)), None) if parts and words else None
        numbers = [name for name in words if batch is not None and are_numbers(batch.column(name))]
    return [Expression(text, f"{field}: {name}", numbers) if text else None for name, text in texts.items()]


def named_classes(cells: pa.Array, schema: pa.Schema, column: str) -> pa.Array:
    """Numbers of classes as their names, where `datasets` has kept these beside."""
    import json

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names") if isinstance(features.get(column), dict) else None
    return pa.array(names, pa.string()).take(cells) if names else cells


def first_rows(source: Any) -> pa.Table:
    """The first few rows that a source gives."""
    found = next(iter(source.tables()), LABELLED.empty_table())
    return found.slice(0, FIRST)


class Seen:
    """Which images were there before: counted on disk, however many they are. A context."""

    def __enter__(self) -> "Seen":
        self._folder = tempfile.TemporaryDirectory(prefix="kto-ray-")
        self._connection = connect(self._folder.name)
        self._connection.execute("CREATE TABLE images (image UBIGINT, desirable BOOLEAN)")
        self._connection.execute("CREATE TABLE ids (id VARCHAR)")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._folder.cleanup()

    def rows(self, table: pa.Table) -> None:
        """Of `LABELLED`, with URIs."""
        self._connection.from_arrow(table.select(["uri", "prompt", "desirable"])).select(
            "hash(uri, prompt), desirable"
        ).insert_into("images")

    def ids(self, ids: Sequence[str]) -> None:
        if ids:
            self._connection.from_arrow(pa.table({"id": ids})).insert_into("ids")

    def tell(self, notes: Notes, field: str, column: str | None) -> None:
        """Raises UserError when ids are not unique."""
        both, again = self._connection.execute(
            "SELECT count(*) FILTER (yes AND no), sum(rows) - sum(yes::INT + no::INT + other::INT) FROM ("
            "SELECT count(*) AS rows, bool_or(desirable IS true) AS yes, bool_or(desirable IS false) AS no, "
            "bool_or(desirable IS NULL) AS other FROM images GROUP BY image)"
        ).fetchall()[0]
        notes.add(BOTH, both)
        notes.add(REPEATED, int(again or 0))
        twice = self._connection.execute("SELECT id FROM ids GROUP BY id HAVING count(*) > 1 ORDER BY id LIMIT 1")
        if found := twice.fetchall():
            raise UserError(
                f"{field}: id: {found[0][0].partition(':')[2]!r} stands in column {column!r} more than once; ids must "
                "be unique: name another column, or none"
            )
