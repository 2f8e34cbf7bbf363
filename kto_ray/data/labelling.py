"""From rows of any table to rows of `LABELLED`: prompts, images and verdicts out of the columns that hold them.

`table.py` and its relatives say which columns; what is left out is noted in `Notes`, for previews.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.data.columns import is_binary, is_image, is_text
from kto_ray.data.files import resolve
from kto_ray.data.notes import NO_IMAGE, NO_PROMPT, NOT_TEXT, Notes
from kto_ray.data.protocol import LABELLED
from kto_ray.prompt_files import blank

NO_VERDICT = pa.scalar(None, pa.bool_())


def labelled(
    ids: Sequence[str],
    images: "Images",
    prompts: Sequence[str | None],
    verdicts: pa.Array,
    who: pa.Array | None = None,
    metadata: Sequence[str | None] | None = None,
) -> pa.Table:
    """Rows of `LABELLED` of those that have an image and a prompt."""
    rows = len(ids)
    table = pa.table(
        [
            pa.array(ids, pa.string()),
            images.uris,
            images.files,
            pa.array(prompts, pa.string()),
            verdicts if len(verdicts) == rows else pa.repeat(NO_VERDICT, rows),
            pa.nulls(rows, pa.string()) if who is None else _said(pc.cast(who, pa.string())),
            pa.array(metadata or [None] * rows, pa.string()),
        ],
        schema=pa.schema([field.with_nullable(True) for field in LABELLED]),
    )
    there = pc.and_(pc.is_valid(table["prompt"]), pc.or_(pc.is_valid(table["uri"]), pc.is_valid(table["image"])))
    return table.filter(there).cast(LABELLED)


def _said(texts: pa.Array) -> pa.Array:
    """Null where nothing stands."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), pa.scalar(None, pa.string()), texts)


class Images:
    """A column of images: the URIs or the bytes of each row; both null where there is none.

    Args:
        cells: paths or URIs (also data:image/png;base64,...), bytes of files, or bytes with a path as `datasets` has
            them.
        folder: that paths are relative to.
    """

    def __init__(self, cells: pa.Array, folder: str) -> None:
        if pa.types.is_struct(cells.type):
            files = pc.cast(pc.struct_field(cells, "bytes"), pa.binary())
            paths = pc.cast(pc.struct_field(cells, "path"), pa.string())
            self.files = files
            self.uris = _resolved(pc.if_else(pc.is_valid(files), pa.scalar(None, pa.string()), paths), folder)
        elif is_binary(cells.type):
            empty = pc.equal(pc.binary_length(pc.cast(cells, pa.binary())), 0)
            self.files = pc.if_else(empty, pa.scalar(None, pa.binary()), pc.cast(cells, pa.binary()))
            self.uris = pa.nulls(len(cells), pa.string())
        else:
            paths = pc.cast(cells, pa.string())
            inline = pc.fill_null(pc.starts_with(paths, "data:"), False)
            self.files = pa.nulls(len(cells), pa.binary())
            if pc.any(inline).as_py():
                files = (_inline(path) if path else None for path in paths.to_pylist())
                self.files = pa.array(list(files), pa.binary())
            self.uris = _resolved(pc.if_else(inline, pa.scalar(None, pa.string()), paths), folder)

    @classmethod
    def of(cls, uris: pa.Array, files: pa.Array) -> "Images":
        new = cls.__new__(cls)
        new.uris, new.files = uris, files
        return new

    def take(self, places: pa.Array) -> "Images":
        return self.of(self.uris.take(places), self.files.take(places))


def _resolved(paths: pa.Array, folder: str) -> pa.Array:
    return pa.array(
        [resolve(folder, path) if path and path.strip() else None for path in paths.to_pylist()], pa.string()
    )


def _inline(path: str) -> bytes | None:
    """What a URI such as data:image/png;base64,iVBOR... holds; None: it is another, or holds nothing."""
    head, _, content = path.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64")):
        return None
    try:
        return base64.b64decode(content, validate=True) or None
    except ValueError:
        return None


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column can be one of images."""
    return is_image(kind) or is_text(kind)


def prompts_of(cells: pa.Array, notes: Notes | None = None) -> list[str | None]:
    """Prompts; null where there is nothing to read.

    Texts; or conversations as TRL has them, a list of {"role", "content"}: what the user says in them.
    """
    prompts: list[str | None] = []
    empty = odd = 0
    for cell in cells.to_pylist():
        text = _prompt(cell)
        if text is None and cell is not None and not isinstance(cell, str):
            odd += 1
        elif text is None or blank(text):
            empty, text = empty + 1, None
        prompts.append(text)
    if notes:
        notes.add(NO_PROMPT, empty)
        notes.add(NOT_TEXT, odd)
    return prompts


def _prompt(cell: Any) -> str | None:
    if isinstance(cell, str):
        if not cell.startswith(("[", "{")):
            return cell
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return str(cell)
    if isinstance(cell, list) and all(isinstance(turn, Mapping) and "content" in turn for turn in cell):
        said = [turn["content"] for turn in cell if turn.get("role", "user") == "user"]
        return "\n".join(text for text in said if isinstance(text, str)) or None
    return None


def note_images(images: Images, ids: Sequence[str], notes: Notes) -> None:
    absent = pc.and_(pc.is_null(images.uris), pc.is_null(images.files))
    notes.add(NO_IMAGE, pc.sum(pc.cast(absent, pa.int64())).as_py() or 0, _where(absent, ids))


def _where(mask: pa.Array, ids: Sequence[str]) -> Iterator[str]:
    return (name for name, there in zip(ids, mask.to_pylist(), strict=True) if there)


def as_metadata(batch: pa.RecordBatch, columns: Sequence[str]) -> list[str | None] | None:
    """The columns as a JSON object for each row, without those that are null; None where none are kept."""
    if not columns:
        return None
    rows = batch.select(list(columns)).to_pylist()
    return [metadata({name: value for name, value in row.items() if value is not None}) for row in rows]


def metadata(values: Mapping[str, Any]) -> str | None:
    return json.dumps(values, ensure_ascii=False, default=str) if values else None
