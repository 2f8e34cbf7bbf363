"""From the lists of all parts to what is in a set, what is left out and why, and which shards are to be made.

A pure function of the lists, the held-out prompts and what was encoded before: `preparing.py` writes the plan down, so
that a preparation that was stopped goes on with the same shards.
"""

import hashlib
import json
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.data.held_out import Apart
from kto_ray.offline.decoding import bucket_of, buckets

SHARD_BYTES = 2**26
"""Of a shard's decoded pixels: that much goes from task to task at once."""
AHEAD = 8
"""Shards that are decoded before whoever takes them is ready."""
MOST_IMAGES = 1024

LEFT_OUT = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("why", pa.string(), nullable=False)],
)
HELD_OUT, NO_VERDICT = "its prompt is held out", "it has no verdict"
CONTRARY = "it is liked and disliked by as many, for one prompt"
ONCE = "it is there more than once; one is kept"
FILTERED = "a filter leaves it out"
"""How reasons of `data.filters` begin."""
IN_WORDS_NO_VERDICT = (HELD_OUT, NO_VERDICT, CONTRARY, ONCE)
"""Reasons that are no fault of the image, besides filters; all others are that it cannot be read, or scored."""


@dataclass(frozen=True)
class SetPlan:
    """What is to be done for a set.

    rows: of the set, in the order of the source: id, prompt, desirable, who, metadata, content, height, width (as they
        will be cut to).
    left_out: rows of `LEFT_OUT`.
    to_encode: what is not encoded yet, in the order of the source: part, row (its number in the part), content, height,
        width, shard (its name).
    """

    rows: pa.Table
    left_out: pa.Table
    to_encode: pa.Table


def plan_set(
    lists: Sequence[pa.Table],
    size: tuple[int, int],
    multiple: int,
    resize: str,
    held_out: Apart,
    encoded: Set[str],
) -> SetPlan:
    """See `SetPlan`.

    Args:
        lists: of `LISTED`, one a part.
        size: height and width of the model's images in pixels.
        multiple: of which sides must be multiples.
        encoded: contents that have latents.
    """
    table = _numbered(lists)
    left = [table.filter(pc.is_valid(table["why"])).select(["id", "why"])]
    table = table.filter(pc.is_null(table["why"])).drop_columns(["why"])

    table = _without(table, held_out.of(table["prompt"].combine_chunks()), HELD_OUT, left)
    table = _without(table, pc.is_null(table["desirable"]), NO_VERDICT, left)

    rows, more = _once(table)
    left += more
    heights, widths = _sizes(rows, size, multiple, resize)
    rows = rows.set_column(rows.column_names.index("height"), "height", heights)
    rows = rows.set_column(rows.column_names.index("width"), "width", widths)
    left_out = pa.concat_tables(part.cast(LEFT_OUT) for part in left)
    return SetPlan(rows.drop_columns(["part", "row"]), left_out, _shards(rows, encoded))


def plan_scoring(
    lists: Sequence[pa.Table],
    size: tuple[int, int],
    multiple: int,
    resize: str,
    held_out: Apart,
    also_with_verdict: bool,
    also_without: bool,
) -> pa.Table:
    """What is to be scored, each image and prompt once, with the columns of `SetPlan.to_encode`.

    Args:
        also_with_verdict: images that have a verdict, ...
        also_without: ... and those that have none.
    """
    table = _numbered(lists)
    table = table.filter(pc.is_null(table["why"]))
    table = table.filter(pc.invert(held_out.of(table["prompt"].combine_chunks())))
    if not also_with_verdict:
        table = table.filter(pc.is_null(table["desirable"]))
    if not also_without:
        table = table.filter(pc.is_valid(table["desirable"]))
    table = table.append_column("place", pa.array(np.arange(table.num_rows)))
    firsts = table.group_by(["content", "prompt"], use_threads=False).aggregate([("place", "min")])
    rows = table.take(firsts["place_min"]).sort_by("place")
    heights, widths = _sizes(rows, size, multiple, resize)
    keys = [json.dumps(pair) for pair in zip(rows["content"].to_pylist(), rows["prompt"].to_pylist(), strict=True)]
    rows = rows.select(["part", "row", "content"]).append_column("height", heights).append_column("width", widths)
    return rows.append_column("shard", _named(rows, keys))


def _numbered(lists: Sequence[pa.Table]) -> pa.Table:
    """All rows of all lists, with the number of their part and theirs in it."""
    numbers = [np.arange(listed.num_rows) for listed in lists]
    parts = np.repeat(np.arange(len(lists)), [len(rows) for rows in numbers])
    table = pa.concat_tables(lists)
    table = table.append_column("part", pa.array(parts, pa.int32()))
    return table.append_column("row", pa.array(np.concatenate([*numbers, np.zeros(0)]), pa.int32()))


def _without(table: pa.Table, mask: pa.ChunkedArray, why: str, left: list[pa.Table]) -> pa.Table:
    left.append(_because(table.filter(mask), why))
    return table.filter(pc.invert(mask))


def _because(table: pa.Table, why: str) -> pa.Table:
    return pa.table({"id": table["id"], "why": pa.array([why] * table.num_rows, pa.string())})


def _once(table: pa.Table) -> tuple[pa.Table, list[pa.Table]]:
    """Each image and prompt once, at its first place, with the verdict of most; and what is left out for it."""
    table = table.append_column("place", pa.array(np.arange(table.num_rows)))
    keys = ["content", "prompt"]
    counts = table.group_by(keys, use_threads=False).aggregate(
        [("desirable", "sum"), ("desirable", "count"), ("place", "min")]
    )
    yes = pc.multiply(counts["desirable_sum"].cast(pa.int64()), 2)
    even = pc.equal(yes, counts["desirable_count"])
    first = table.take(counts["place_min"])
    first = first.set_column(
        first.column_names.index("desirable"), "desirable", pc.greater(yes, counts["desirable_count"])
    )
    repeated = np.ones(table.num_rows, np.bool_)
    repeated[counts["place_min"].to_numpy()] = False
    left = [_because(table.filter(pa.array(repeated)), ONCE), _because(first.filter(even), CONTRARY)]
    return first.filter(pc.invert(even)).sort_by("place").drop_columns(["place"]), left


def _sizes(rows: pa.Table, size: tuple[int, int], multiple: int, resize: str) -> tuple[pa.Array, pa.Array]:
    """To which height and width each image is cut; the same image always to the same."""
    if resize == "crop":
        heights, widths = (np.full(rows.num_rows, side) for side in size)
    else:
        sizes = buckets(*size, multiple)
        shown = list(zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True))
        bucket = {one: bucket_of(*one, sizes) for one in set(shown)}
        heights, widths = np.array([bucket[one] for one in shown], np.int64).reshape(-1, 2).T
    return pa.array(heights, pa.int32()), pa.array(widths, pa.int32())


def _shards(rows: pa.Table, encoded: Set[str]) -> pa.Table:
    """Of what is to be encoded, the first row that has it, and its shard: images of one part and size."""
    places = np.flatnonzero([content not in encoded for content in rows["content"].to_pylist()])
    rows = rows.take(places).select(["part", "row", "content", "height", "width"])
    first = np.sort(np.unique(np.array(rows["content"].to_pylist(), dtype=object), return_index=True)[1])
    rows = rows.take(first)
    return rows.append_column("shard", _named(rows, rows["content"].to_pylist()))


def _named(rows: pa.Table, keys: Sequence[str]) -> pa.Array:
    """The shard of each row, of one part and size, named after the keys of all that are in it."""
    members: dict[tuple[int, int, int], list[int]] = {}
    columns = (rows[name].to_pylist() for name in ("part", "height", "width"))
    for place, alike in enumerate(zip(*columns, strict=True)):
        members.setdefault(alike, []).append(place)
    shard = [""] * rows.num_rows
    for (_, height, width), those in members.items():
        count = images_of_a_shard(height, width)
        for start in range(0, len(those), count):
            group = those[start : start + count]
            named = json.dumps([keys[place] for place in group])
            for place in group:
                shard[place] = hashlib.sha256(named.encode()).hexdigest()[:16]
    return pa.array(shard, pa.string())


def images_of_a_shard(height: int, width: int) -> int:
    return max(1, min(MOST_IMAGES, SHARD_BYTES // (height * width * 3)))
