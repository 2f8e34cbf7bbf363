"""The parts in which the samples of a round lie: three files each, written by whoever drew them, and read by row.

    latents/<part>.parquet    one row a sample: its latents
    pixels/<part>.parquet     one row a sample: its pixels
    samples/<part>.parquet    one row a sample: its record, what it looks like, the digests of its arrays

A part is there when its file in `samples/` is, which is written last. Training reads latents, scorers and people
pixels, a resumed run neither. An array is the raw bytes of one cell, with its shape in the file's metadata, in row
groups as small as a reader of single rows asks for. Parquet has no 8-bit numbers; lists of them take four times the
room and ten times the time.

Release 0.1.0 wrote both arrays as tensor columns of one file in `samples/`; those are still read.

Shape suffixes: B rows; C, H, W channels, height, width of latents (CHW) and pixels (HWC).
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kto_ray.errors import UserError
from kto_ray.pictures import look
from kto_ray.records import (
    RECORD_SCHEMA,
    Place,
    Sample,
    SampleRecord,
    records_to_table,
    table_to_records,
)
from kto_ray.storage import Storage

Kind = Literal["latents", "pixels"]
DTYPES: dict[Kind, np.dtype[Any]] = {"latents": np.dtype("<f4"), "pixels": np.dtype("u1")}
SHAPE = b"shape"
ROW_GROUP = 2**16  # bytes of arrays, at least: a reader of single rows reads little more than it needs
PART_SIZE = 64  # samples, at most, for the sake of memory
SMALL = 2**17  # bytes: a file up to this is read at once; its footer alone would be half of it
AT_ONCE = 8  # files that are read side by side, for the sake of storage that answers slowly


def write_part(folder: Storage, samples: Sequence[Sample]) -> list[SampleRecord]:
    """Store samples; gives their records, with their places. The same samples make the same part again.

    Args:
        folder: the round's.
        samples: at least one; all latents of one shape, all pixels of one shape.

    Raises:
        ValueError: no samples, or shapes that differ.
        UserError: it cannot be written.
    """
    shapes = {(sample.latents_CHW.shape, sample.pixels_HWC.shape) for sample in samples}
    if len(shapes) != 1:
        raise ValueError(f"a part needs samples of one shape, at least one, not {sorted(shapes)}")
    arrays: dict[Kind, list[npt.NDArray[Any]]] = {
        "latents": [np.ascontiguousarray(sample.latents_CHW, DTYPES["latents"]) for sample in samples],
        "pixels": [np.ascontiguousarray(sample.pixels_HWC, DTYPES["pixels"]) for sample in samples],
    }
    digests = {kind: [_digest(array) for array in arrays[kind]] for kind in arrays}
    ids = [sample.id for sample in samples]
    # Also of the bytes: who draws the same images again, not to the last bit equal, must not write over these.
    part = hashlib.sha256(json.dumps([ids, digests]).encode()).hexdigest()[:16]
    records = [
        sample.record(
            Place(part, row, digests["latents"][row], digests["pixels"][row]),
            sample.look or look(arrays["pixels"][row]),
        )
        for row, sample in enumerate(samples)
    ]
    _write(folder, part, records, arrays, {})
    return records


def write_latents(
    folder: Storage,
    part: str,
    records: Sequence[SampleRecord],
    latents_BCHW: npt.NDArray[np.float32],
    metadata: Mapping[str, str],
) -> list[SampleRecord]:
    """Store a part of this name that has no pixels, and that may be empty; gives the records, with their places.

    Args:
        metadata: of the file of records.
    """
    latents = [np.ascontiguousarray(latents_CHW, DTYPES["latents"]) for latents_CHW in latents_BCHW]
    placed = [replace(record, place=Place(part, row, _digest(latents[row]), "")) for row, record in enumerate(records)]
    _write(folder, part, placed, {"latents": latents} if latents else {}, metadata)
    return placed


def _write(
    folder: Storage,
    part: str,
    records: Sequence[SampleRecord],
    arrays: Mapping[Kind, Sequence[npt.NDArray[Any]]],
    metadata: Mapping[str, str],
) -> None:
    """The files of a part, that of its records last."""
    table = records_to_table(records)
    for name in ("latents_digest", "pixels_digest"):
        digests = [getattr(record.place, name) for record in records]
        table = table.append_column(name, pa.array(digests, pa.string()))
    table = table.append_column("look", pa.array([record.look for record in records], pa.binary()))
    folder.require_mine()
    folder = folder.unfenced
    ids = [record.id for record in records]
    with ThreadPoolExecutor(max(1, len(arrays))) as pool:
        list(pool.map(lambda kind: folder.write(f"{kind}/{part}.parquet", _file(ids, kind, arrays[kind])), arrays))
    folder.write_table(f"samples/{part}.parquet", table.replace_schema_metadata(metadata) if metadata else table)


def _file(ids: Sequence[str], kind: Kind, arrays: Sequence[npt.NDArray[Any]]) -> bytes:
    """A Parquet file of ids and arrays, as raw bytes."""
    cells = pa.array([memoryview(array.data).cast("B") for array in arrays], pa.binary(arrays[0].nbytes))
    metadata = {SHAPE: json.dumps(arrays[0].shape)}
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"sample_id": ids, kind: cells}).replace_schema_metadata(metadata),
        sink,
        row_group_size=max(1, ROW_GROUP // max(1, arrays[0].nbytes)),
        # Latents are noise to a compressor, and no two arrays are alike.
        compression="zstd" if kind == "pixels" else "none",
        compression_level=1 if kind == "pixels" else None,
        use_dictionary=False,
        write_statistics=False,
    )
    return sink.getvalue()


def read_records(folder: Storage) -> list[SampleRecord]:
    """Records of all samples in the parts of a folder, without reading an array."""
    names = [name.removesuffix(".parquet") for name in folder.names("samples", suffix=".parquet")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [record for records in pool.map(lambda part: _read_records(folder, part), names) for record in records]


def _read_records(folder: Storage, part: str) -> list[SampleRecord]:
    with _opened(folder, f"samples/{part}") as file:
        stored = set(file.schema_arrow.names)
        wanted = [*RECORD_SCHEMA.names, "latents_digest", "pixels_digest", "look"]
        table = file.read(columns=[name for name in wanted if name in stored])
    rows = table.to_pylist()
    return [
        replace(record, place=Place(part, number, row.get("latents_digest", ""), row.get("pixels_digest", "")))
        for number, (record, row) in enumerate(zip(table_to_records(table), rows, strict=True))
    ]


def read_arrays(folder: Storage, kind: Kind, records: Sequence[SampleRecord]) -> npt.NDArray[Any]:
    """Latents float32 (B, C, H, W) or pixels uint8 (B, H, W, 3) of stored samples, in their order; at least one.

    Raises:
        ValueError: they are not what they were when they were stored, by their digests.
        FileNotFoundError: they are not there.
    """
    wanted: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        wanted.setdefault(_place(record).part, []).append(position)

    def read(part: str) -> list[npt.NDArray[Any]]:
        places = [_place(records[position]) for position in wanted[part]]
        rows = [place.row for place in places]
        if not places[0].latents_digest:  # of release 0.1.0
            with _opened(folder, f"samples/{part}") as file:
                return _read_old_rows(file, kind, rows)
        with _opened(folder, f"{kind}/{part}") as file:
            return _read_rows(file, kind, rows)

    arrays: list[Any] = [None] * len(records)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for part, rows in zip(wanted, pool.map(read, wanted), strict=True):
            for position, array in zip(wanted[part], rows, strict=True):
                arrays[position] = array
    for record, array in zip(records, arrays, strict=True):
        digest = getattr(record.place, f"{kind}_digest")
        if digest and _digest(array) != digest:
            raise ValueError(f"{folder}: the {kind} of {record.id} have changed since they were stored")
    return np.stack(arrays)


def _read_rows(file: pq.ParquetFile, kind: Kind, rows: Sequence[int]) -> list[npt.NDArray[Any]]:
    """Reads the row groups in which these rows lie."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    group_of_row = np.repeat(np.arange(len(sizes)), sizes)
    groups = sorted({int(group_of_row[row]) for row in rows})
    there = {int(row): place for place, row in enumerate(np.flatnonzero(np.isin(group_of_row, groups)))}
    cells = file.read_row_groups(groups, columns=[kind]).column(kind).combine_chunks()
    shape = json.loads(file.schema_arrow.metadata[SHAPE])
    return [np.frombuffer(cells[there[row]].as_buffer(), DTYPES[kind]).reshape(shape) for row in rows]


def _read_old_rows(file: pq.ParquetFile, kind: Kind, rows: Sequence[int]) -> list[npt.NDArray[Any]]:
    array_BX = file.read(columns=[kind]).column(kind).combine_chunks().to_numpy_ndarray()
    return [np.ascontiguousarray(array_BX[row]) for row in rows]


def _place(record: SampleRecord) -> Place:
    assert record.place, f"{record.id} is not stored"
    return record.place


@contextlib.contextmanager
def _opened(folder: Storage, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read parts of, whose name goes without its ending.

    Raises:
        ValueError: it is none, or no more.
        FileNotFoundError: it is not there.
        UserError: it cannot be read.
    """
    with folder.open(f"{name}.parquet") as file:
        size = file.size()
        source = pa.BufferReader(file.read()) if size <= SMALL else file
        try:
            with pq.ParquetFile(source, pre_buffer=True) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            # Arrow calls much of what is wrong with bytes an OSError, too; storage that fails has a number for it.
            if getattr(error, "errno", None) is not None:
                raise UserError(f"runs_folder: cannot read {folder}/{name}.parquet: {error}") from error
            raise ValueError(f"{folder}/{name}.parquet has changed since it was stored: {error}") from error


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
