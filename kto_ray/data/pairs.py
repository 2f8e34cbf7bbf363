"""Pairs of images and which one is better, as Pick-a-Pic v2 has them, in Parquet.

    caption, jpg_0, jpg_1, label_0, label_1, image_0_uid, image_1_uid, has_label, ...

`jpg_0` and `jpg_1` are the bytes of JPEG files; `label_0` and `label_1` are 1 and 0, 0 and 1, or 0.5 twice for a tie.
An image stands in many rows, and is known by its uid; without uids each image of a row is one of its own. Under one
prompt it becomes one verdict:

    ever     desirable if it was ever preferred, as in the Diffusion-KTO paper; undesirable if another was, each time
             that there was no tie; with nothing but ties it has none
    share    by its share of wins, a tie being half of one

Rows whose `has_label` is false are no comparisons. Source: Kirstain et al., "Pick-a-Pic", arXiv 2305.01569; the
columns are those of the published data set's second version.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.config.data import PairsData
from kto_ray.data.columns import find_columns
from kto_ray.data.labelling import Images, prompts_of
from kto_ray.data.notes import FILTERED, Notes
from kto_ray.data.table import expressions, files_of
from kto_ray.data.tally import KEY, TallySource, place, true_in
from kto_ray.data.verdicts import Expression
from kto_ray.errors import UserError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

IMAGES = (("jpg_0", "jpg_1"), ("image_0", "image_1"), ("image_0_path", "image_1_path"))
UIDS, LABELS = ("image_0_uid", "image_1_uid"), ("label_0", "label_1")
UNDECIDED = "rows are no comparison: they have no label"
STRANGE = "labels of pairs are neither 0, 1 nor 0.5"


class PairsSource(TallySource):
    """See the module."""

    def __init__(self, settings: PairsData) -> None:
        self.settings = settings
        super().__init__("pairs", files_of(settings, "data.sources (pairs)"))

    @cached_property
    def _schema(self) -> pa.Schema:
        schema = self.rows.schema()
        if missing := [name for name in LABELS if name not in schema.names]:
            raise UserError(
                f"{self.field}: {self.where} has no column {missing[0]!r}; it has: {', '.join(schema.names)}"
            )
        return schema

    @cached_property
    def _images(self) -> tuple[str, str]:
        there = self._schema.names
        found = next((pair for pair in IMAGES if set(pair) <= set(there)), None)
        if found is None:
            names = " or ".join(f"{one} and {other}" for one, other in IMAGES)
            raise UserError(f"{self.field}: {self.where} has no columns {names}; it has: {', '.join(there)}")
        return found

    @cached_property
    def _prompt(self) -> str:
        return find_columns(self._schema, {"prompt": None}, self.where, self.field)["prompt"]

    @cached_property
    def _where(self) -> Expression | None:
        (found,) = expressions(self.rows, self.field, {"where": self.settings.where})
        return found

    @cached_property
    def _has_uids(self) -> bool:
        return set(UIDS) <= set(self._schema.names)

    @property
    def columns(self) -> Mapping[str, str]:
        uids = {"known by": " and ".join(UIDS)} if self._has_uids else {}
        return {"prompt": self._prompt, "images": " and ".join(self._images), "verdict": " and ".join(LABELS), **uids}

    @property
    def light(self) -> Sequence[str]:
        optional = [name for name in (*UIDS, "has_label") if name in self._schema.names]
        looked_at = self._where.columns(self._schema) if self._where else []
        return list(dict.fromkeys([self._prompt, *LABELS, *optional, *looked_at]))

    @property
    def heavy(self) -> Sequence[str]:
        return [self._prompt, *self._images]

    def votes(self, part: int, first: int, batch: pa.RecordBatch, notes: Notes) -> pa.Table:
        labels = [self._labels(batch.column(name), notes) for name in LABELS]
        counts = pc.and_(pc.is_valid(labels[0]), pc.is_valid(labels[1]))
        if "has_label" in batch.schema.names:
            counts = pc.and_(counts, pc.fill_null(pc.cast(batch.column("has_label"), pa.bool_()), False))
        notes.add(UNDECIDED, batch.num_rows - true_in(counts))
        if self._where:
            wanted = pc.fill_null(self._where(batch), False)
            notes.add(FILTERED, batch.num_rows - true_in(wanted))
            counts = pc.and_(counts, wanted)
        prompts = pa.array(prompts_of(batch.column(self._prompt), notes), pa.string())
        tables = []
        for item in (0, 1):
            rows = range(first, first + batch.num_rows)
            places = place(part, rows, [item] * batch.num_rows)
            image = pc.cast(batch.column(UIDS[item]) if self._has_uids else places, pa.string())
            tables.append(pa.table({"place": places, "image": image, "prompt": prompts, "label": labels[item]}))
        mask = pc.and_(counts, pc.is_valid(prompts))
        return pa.concat_tables([table.filter(mask) for table in tables])

    def _labels(self, cells: pa.Array, notes: Notes) -> pa.Array:
        labels = pc.cast(cells, pa.float64())
        strange = pc.and_(pc.is_valid(labels), pc.invert(pc.is_in(labels, pa.array([0.0, 0.5, 1.0]))))
        notes.add(STRANGE, true_in(strange), map(str, pc.unique(labels.filter(strange)).to_pylist()))
        return pc.if_else(strange, pa.scalar(None, pa.float64()), labels)

    def count(self, votes: "DuckDBPyConnection", notes: Notes) -> pa.Table:
        rule, share = self.settings.rule, self.settings.share
        desirable = (
            "CASE WHEN wins > 0 THEN true WHEN losses > 0 THEN false END"
            if rule == "ever"
            else f"CASE WHEN share > {share!r} THEN true WHEN share < {share!r} THEN false END"
        )
        enough = f"wins + ties + losses >= {self.settings.min_votes}"
        return votes.sql(
            f"""SELECT place, CASE WHEN {enough} THEN {desirable} END AS desirable, wins, ties, losses
                FROM (SELECT *, (wins + ties / 2) / (wins + ties + losses) AS share
                      FROM (SELECT min(place) AS place, count(*) FILTER (label = 1) AS wins,
                                   count(*) FILTER (label = 0.5) AS ties, count(*) FILTER (label = 0) AS losses
                            FROM votes GROUP BY {KEY}))
                ORDER BY place"""
        ).to_arrow_table()

    def images(self, batch: pa.RecordBatch, rows: pa.Array, items: pa.Array, folder: str) -> Images:
        both = [Images(batch.column(name), folder) for name in self._images]
        sides = pc.add(rows, pc.multiply(items, batch.num_rows))
        return Images.of(
            pa.concat_arrays([each.uris for each in both]).take(sides),
            pa.concat_arrays([each.files for each in both]).take(sides),
        )

    def prompts(self, batch: pa.RecordBatch, rows: pa.Array) -> list[str | None]:
        return prompts_of(batch.column(self._prompt).take(rows))
