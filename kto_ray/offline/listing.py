"""The first look at a source's images: what their bytes are, how large they are, and which cannot be had at all.

Every part of a source is listed once, by a task of Ray Data, and its list kept; `planning.py` decides from all lists
together which images are in the set. An image is known by the SHA-256 of its file, wherever that lies. No pixel is
decoded here, so that what is wrong with a source shows before an accelerator is asked for.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kto_ray.data.files import read_bytes
from kto_ray.data.protocol import Part, Source
from kto_ray.offline.decoding import UnreadableError, upright_size
from kto_ray.storage import Storage

AT_ONCE = 16  # images that a task fetches side by side, for the sake of storage that answers slowly

LISTED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("desirable", pa.bool_()),
        pa.field("who", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("content", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("why", pa.string()),
    ]
)
"""A row of `LABELLED` each, in its order: `content` the SHA-256 of the image file, `height` and `width` of the image as
it is shown; or `why` there is none."""


def fetch(row: Mapping[str, Any]) -> bytes:
    """The image file of a row of `LABELLED`.

    Raises:
        UnreadableError: it cannot be had.
    """
    if row["image"] is not None:
        data: bytes = row["image"]
        return data
    try:
        return read_bytes(row["uri"])
    except FileNotFoundError as error:
        raise UnreadableError("there is no such file") from error
    except OSError as error:
        raise UnreadableError(f"the file cannot be read: {error.strerror or error}") from error


def fetched(table: pa.Table) -> Iterator[tuple[dict[str, Any], bytes | UnreadableError]]:
    """Rows with their image files, or why there is none, in order; a few are fetched ahead."""

    def get(row: dict[str, Any]) -> bytes | UnreadableError:
        try:
            return fetch(row)
        except UnreadableError as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for batch in table.to_batches(max_chunksize=4 * AT_ONCE):
            rows = batch.to_pylist()
            yield from zip(rows, pool.map(get, rows), strict=True)


def list_table(table: pa.Table) -> pa.Table:
    """Rows of `LISTED` for rows of `LABELLED`."""
    rows = []
    for row, file in fetched(table):
        listed = {name: row[name] for name in ("id", "prompt", "desirable", "who", "metadata")}
        try:
            if isinstance(file, UnreadableError):
                raise file
            height, width = upright_size(file)
            content = hashlib.sha256(file).hexdigest()
            rows.append(listed | {"content": content, "height": height, "width": width, "why": None})
        except UnreadableError as error:
            rows.append(listed | {"content": None, "height": None, "width": None, "why": str(error)})
    return pa.Table.from_pylist(rows, LISTED)


class ListPart:
    """A stage of Ray Data: lists the part of each row ("part", its number) and keeps the list in `folder`."""

    def __init__(self, source: Source, parts: Mapping[int, Part], folder: Storage) -> None:
        self.source, self.parts, self.folder = source, parts, folder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["part"])
        tables = [list_table(table) for table in self.source.read(self.parts[number])]
        listed = pa.concat_tables([LISTED.empty_table(), *tables])
        sink = io.BytesIO()
        pq.write_table(listed, sink, compression="zstd")
        self.folder.write(name_of(number), sink.getvalue())
        return {"part": number, "images": listed.num_rows}


def name_of(part: int) -> str:
    """Of the file that has a part's list."""
    return f"{part:06}.parquet"
