"""Ranks or ratings of several images of a prompt, as ImageRewardDB and the HPD sets have them.

    image_path,prompt,rank                      a row an image: compared with all others of its prompt
    images/7.webp,a cat,1

    {"prompt": "a cat", "image_path": ["7.jpg", "8.jpg"], "human_preference": [1, 0]}
    {"prompt": "a cat", "image_path": ["7.jpg", "8.jpg", "9.jpg"], "rank": [2, 1, 3]}
                                                a row a prompt: compared with the others of the row

Of a prompt's images a share is desirable (`top`), a share undesirable (`bottom`), both of at least one image, and those
between have no verdict. Images of equal score stay together; those that would be both, as where all are equal, have no
verdict either. Sources: Xu et al., "ImageReward", arXiv 2304.05977; Wu et al., "HPS v2", arXiv 2306.09341.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.config.data import RatingsData
from kto_ray.data.columns import FoundColumns, find_columns, is_text
from kto_ray.data.labelling import Images, prompts_of
from kto_ray.data.notes import FILTERED, Notes
from kto_ray.data.table import expressions, files_of
from kto_ray.data.tally import ITEMS, TallySource, place, true_in
from kto_ray.data.verdicts import Expression

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NO_SCORE = "images without a rank or rating are left out"
UNEVEN = "rows with another number of images than of ranks or ratings are left out"


class RatingsSource(TallySource):
    """See the module."""

    def __init__(self, settings: RatingsData) -> None:
        self.settings = settings
        super().__init__("ratings", files_of(settings, "data.sources (ratings)"))

    @cached_property
    def _columns(self) -> FoundColumns:
        named = {name: getattr(self.settings, name) for name in ("prompt", "image", "score")}
        return find_columns(self.rows.schema(), named, self.where, self.field)

    @cached_property
    def _where(self) -> Expression | None:
        (found,) = expressions(self.rows, self.field, {"where": self.settings.where})
        return found

    @cached_property
    def _low_is_better(self) -> bool:
        better = self.settings.better
        return "rank" in self._columns["score"].lower() if better is None else better == "low"

    @property
    def columns(self) -> Mapping[str, str]:
        return {**self._columns.of, "better": "low" if self._low_is_better else "high"}

    @property
    def light(self) -> Sequence[str]:
        """Of the images, how many there are in a row, where it may be several."""
        schema, image = self.rows.schema(), self._columns["image"]
        kind = schema.field(image).type
        several = [image] if is_text(kind) or pa.types.is_list(kind) else []
        looked_at = self._where.columns(schema) if self._where else []
        return list(dict.fromkeys([self._columns["prompt"], self._columns["score"], *several, *looked_at]))

    @property
    def heavy(self) -> Sequence[str]:
        return [self._columns["prompt"], self._columns["image"]]

    def votes(self, part: int, first: int, batch: pa.RecordBatch, notes: Notes) -> pa.Table:
        prompts = prompts_of(batch.column(self._columns["prompt"]), notes)
        scores = batch.column(self._columns["score"]).to_pylist()
        wanted = [True] * batch.num_rows
        if self._where:
            mask = pc.fill_null(self._where(batch), False)
            notes.add(FILTERED, batch.num_rows - true_in(mask))
            wanted = mask.to_pylist()
        image = self._columns["image"]
        images = batch.column(image).to_pylist() if image in batch.schema.names else [None] * batch.num_rows
        rows, items, groups, values = list[int](), list[int](), list[str](), list[float]()
        for number, (prompt, cell, score) in enumerate(zip(prompts, images, scores, strict=True)):
            if prompt is None or not wanted[number]:
                continue
            several, of_each = _several(cell), _several(score)
            if of_each is None:
                pairs: list[tuple[int, Any]] = [(0, score)]
            elif several is None or len(several) != len(of_each) or len(of_each) >= ITEMS:
                notes.add(UNEVEN, 1, [prompt])
                continue
            else:
                pairs = list(enumerate(of_each))
            for item, value in pairs:
                if (figure := _number(value)) is None:
                    notes.add(NO_SCORE, 1, [prompt])
                    continue
                rows.append(first + number)
                items.append(item)
                groups.append(prompt if of_each is None else f"{part}:{first + number}")
                values.append(-figure if self._low_is_better else figure)
        return pa.table({"place": place(part, rows, items), "prompt": pa.array(groups, pa.string()), "good": values})

    def count(self, votes: "DuckDBPyConnection", notes: Notes) -> pa.Table:
        top, bottom, least = self.settings.top, self.settings.bottom, self.settings.min_images
        sign = "-" if self._low_is_better else ""
        # rank() counts those that are strictly better, or worse, and one more.
        return votes.sql(
            f"""SELECT place, CASE WHEN images < {least} OR good_enough = bad_enough THEN NULL
                                   ELSE good_enough END AS desirable,
                       {sign}good AS score, better + 1 AS rank, images
                FROM (SELECT *, better < greatest(1, round({top!r} * images)) AS good_enough,
                             worse < greatest(1, round({bottom!r} * images)) AS bad_enough
                      FROM (SELECT *, count(*) OVER (PARTITION BY prompt) AS images,
                                   rank() OVER (PARTITION BY prompt ORDER BY good DESC) - 1 AS better,
                                   rank() OVER (PARTITION BY prompt ORDER BY good) - 1 AS worse FROM votes))
                ORDER BY place"""
        ).to_arrow_table()

    def images(self, batch: pa.RecordBatch, rows: pa.Array, items: pa.Array, folder: str) -> Images:
        cells = batch.column(self._columns["image"])
        if pa.types.is_list(cells.type):
            offsets = cells.offsets.take(rows)
            return Images(cells.values, folder).take(pc.add(offsets, items))
        if is_text(cells.type):
            chosen = (
                (_several(cell) or [cell])[item]
                for cell, item in zip(cells.take(rows).to_pylist(), items.to_pylist(), strict=True)
            )
            return Images(pa.array(list(chosen), pa.string()), folder)
        return Images(cells, folder).take(rows)

    def prompts(self, batch: pa.RecordBatch, rows: pa.Array) -> list[str | None]:
        return prompts_of(batch.column(self._columns["prompt"]).take(rows))


def _several(cell: Any) -> list[Any] | None:
    """A cell that is a list, also as JSON; None: one value."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    return cell if isinstance(cell, list) else None


def _number(value: Any) -> float | None:
    """A finite number; None: there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number and abs(number) != float("inf") else None
