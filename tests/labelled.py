"""Labelled images for tests of their sources: small files in their true formats, and what a source gives of them."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from kto_ray.data.protocol import LABELLED, Source
from kto_ray.errors import UserError

Row = dict[str, Any]


def image_bytes(color: str = "red", kind: str = "png", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes())


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(source: Source) -> list[Row]:
    """All that it gives; each part by a copy that knows nothing but its settings, as in a task of Ray Data."""
    tables = list(source.tables())
    for table in tables:
        assert table.schema == LABELLED
        assert table.num_rows
    parts = pickle.loads(pickle.dumps(source.parts()))
    assert len({part.name for part in parts}) == len(parts)
    apart = [table for part in reversed(parts) for table in pickle.loads(pickle.dumps(source)).read(part)]
    rows = pa.concat_tables([LABELLED.empty_table(), *tables]).to_pylist()
    key = "id"
    assert sorted(pa.concat_tables([LABELLED.empty_table(), *apart]).to_pylist(), key=lambda row: row[key]) == sorted(
        rows, key=lambda row: row[key]
    )
    assert len({row["id"] for row in rows}) == len(rows)
    assert all((row["uri"] is None) != (row["image"] is None) for row in rows)
    for part in parts:
        if part.rows is not None and part.rows:
            assert sum(table.num_rows for table in source.read(part)) <= part.rows
    return rows


def counts_of(source: Source) -> tuple[int, int, int]:
    """Desirable, undesirable and without verdict, by the preview; which is what the rows say, too."""
    preview, rows = source.preview(), rows_of(source)
    assert preview.verdicts is not None
    assert preview.rows == len(rows)
    told = tuple(preview.verdicts[name] for name in ("desirable", "undesirable", "none"))
    assert told == tuple(sum(row["desirable"] is verdict for row in rows) for verdict in (True, False, None))
    assert preview.first.to_pylist() == rows[: preview.first.num_rows]
    return told  # type: ignore[return-value]


def refusal(source: Source) -> str:
    """What it says when it is asked for a preview, and for its rows, too."""
    with pytest.raises(UserError) as caught:
        source.preview()
    with pytest.raises(UserError):
        list(source.tables())
    return str(caught.value)
