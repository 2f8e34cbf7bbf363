"""Whole files or none, local and remote alike; what cannot be written is said in the user's words."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from kto_ray.errors import UserError
from kto_ray.storage import Storage

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(params=["local", "file-uri", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return Storage(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}/run")
    uris = {
        "local": str(tmp_path / "a run, 100% #1 ü"),
        "file-uri": f"file://{tmp_path}/run",
        "memory": f"memory:/{tmp_path}/run",
    }
    return Storage(uris[request.param])


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_was_written_is_read(storage: Storage) -> None:
    storage.write("deep/down/file.bin", b"\x00\xff" * 1000)
    storage.write_json("facts.json", {"a": [1, 2.5, None, "ü"]})
    assert storage.read("deep/down/file.bin") == b"\x00\xff" * 1000
    assert storage.read_json("facts.json") == {"a": [1, 2.5, None, "ü"]}


def test_tables_come_back_whole_or_by_column(storage: Storage) -> None:
    table = pa.table({"sample_id": ["a", "b"], "seed": [1, 2**62], "prompt": ["ü", ""]})
    digest = storage.write_table("part.parquet", table)
    assert storage.read_table("part.parquet").equals(table)
    assert storage.read_table("part.parquet", ["seed"]).column_names == ["seed"]
    assert digest == hashlib.sha256(storage.read("part.parquet")).hexdigest()


def test_a_file_is_read_in_parts(storage: Storage) -> None:
    data = bytes(range(256)) * 1000
    storage.write("deep/file.bin", data)
    with storage.open("deep/file.bin") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read(500) == data[-1000:-500]
        file.seek(70_000)
        assert file.read(1000) == data[70_000:71_000]


def test_an_empty_table_is_a_table(storage: Storage) -> None:
    storage.write_table("none.parquet", pa.table({"sample_id": [], "draws": []}))
    assert storage.read_table("none.parquet")["sample_id"].to_pylist() == []


def test_a_file_is_replaced_as_a_whole(storage: Storage) -> None:
    storage.write("file", b"a long old content")
    storage.write("file", b"new")
    assert storage.read("file") == b"new"


def test_existence(storage: Storage) -> None:
    assert not storage.exists("folder/file")
    storage.write("folder/file", b"")
    assert storage.exists("folder/file")
    assert storage.exists("folder")
    assert not storage.exists("folder/file2")


def test_a_missing_file_is_file_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("missing")
    with pytest.raises(FileNotFoundError):
        storage.read_json("missing.json")
    with pytest.raises(FileNotFoundError):
        storage.open("missing.bin")


def test_names_are_sorted_and_filtered_and_may_be_none(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.names("parts") == []
    for name in ("parts/b.parquet", "parts/a.parquet", "parts/c.txt", "other"):
        storage.write(name, b"")
    assert storage.names("parts") == ["a.parquet", "b.parquet", "c.txt"]
    assert storage.names("parts", suffix=".parquet") == ["a.parquet", "b.parquet"]
    assert storage.names() == ["other", "parts"]


def test_a_subfolder_is_a_storage(storage: Storage) -> None:
    (storage / "rounds" / "00001").write("file", b"x")
    assert storage.read("rounds/00001/file") == b"x"


def test_it_pickles_by_its_uri(storage: Storage) -> None:
    storage.write("file", b"x")
    again = pickle.loads(pickle.dumps(storage))
    assert again.read("file") == b"x"
    assert (again.uri, str(again)) == (storage.uri, storage.uri)


def test_local_paths_are_known_and_remote_ones_are_not(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).local == tmp_path
    assert Storage(f"file://{tmp_path}").local == tmp_path
    assert Storage("memory://somewhere").local is None


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write("file", b"x")
    assert (tmp_path / "runs" / "file").read_bytes() == b"x"


@pytest.mark.usefixtures("s3_bucket")
def test_a_bucket_that_is_not_there_is_told_in_a_sentence() -> None:
    run = Storage("s3://no-such-bucket/runs") / "demo"
    assert not run.exists("config.yaml")
    with pytest.raises(UserError, match=r"runs_folder: .* there is no bucket 'no-such-bucket'; make it first"):
        run.require_room(1)
    with pytest.raises(UserError, match=r"runs_folder: cannot write s3://no-such-bucket/runs/demo/.*NO_SUCH_BUCKET"):
        run.write("file", b"x")


@pytest.mark.usefixtures("s3_bucket")
def test_a_server_that_cannot_be_reached_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"runs_folder: cannot read s3://bucket/runs/demo.*can it be reached from here"):
        (Storage("s3://bucket/runs") / "demo").exists("config.yaml")


def test_a_uri_that_nothing_opens_is_refused() -> None:
    with pytest.raises(UserError, match=r"runs_folder: cannot open 'bogus://here'.*bogus"):
        Storage("bogus://here").write("file", b"")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(UserError) as caught:
        storage.write("file", b"new")
    assert "runs_folder" in str(caught.value)
    assert f"{tmp_path}/file" in str(caught.value)
    assert "No space left" in str(caught.value)
    assert "has room" in str(caught.value)
    assert storage.read("file") == b"old"
    assert storage.names() == ["file"]


class BreakingFile(io.BytesIO):
    """A stream that takes half of what it is given, and keeps that when it is closed."""

    def __init__(self, keep: Callable[[bytes], None]) -> None:
        super().__init__()
        self.keep = keep

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        raise OSError("connection lost")

    def close(self) -> None:
        if not self.closed:
            self.keep(self.getvalue())
        super().close()


class BreakingFileSystem(MemoryFileSystem):
    """Real files behind a connection that breaks."""

    protocol = "breaking"
    store: ClassVar[dict[str, Any]] = {}
    breaks = True
    pipe_file = AbstractFileSystem.pipe_file

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "wb" or not self.breaks:
            return super()._open(path, mode, **options)
        return BreakingFile(lambda data: super(BreakingFileSystem, self)._open(path, "wb", data=data))


@pytest.fixture
def breaking(tmp_path: Path) -> Storage:
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    return Storage(f"breaking:/{tmp_path}")


def test_a_write_that_breaks_off_leaves_nothing(breaking: Storage) -> None:
    with pytest.raises(UserError, match=r"runs_folder: cannot write breaking:.*/parts/a.parquet: connection lost"):
        breaking.write("parts/a.parquet", b"a whole file")
    assert not breaking.exists("parts/a.parquet")
    assert breaking.names("parts") == []


def test_a_write_that_breaks_off_leaves_the_old_file(breaking: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BreakingFileSystem, "breaks", False)
    breaking.write("file", b"old")
    monkeypatch.setattr(BreakingFileSystem, "breaks", True)
    with pytest.raises(UserError, match="connection lost"):
        breaking.write("file", b"a new file")
    assert breaking.read("file") == b"old"


def test_a_half_written_file_is_not_listed_as_a_part(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("parts/a.parquet", b"x")
    (tmp_path / "parts" / "b.parquet.4711.part").write_bytes(b"half")  # left by a killed process
    assert storage.names("parts", suffix=".parquet") == ["a.parquet"]


def test_room_is_proved_without_a_trace(storage: Storage) -> None:
    storage.require_room(1)
    assert storage.names() == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file, not a folder")
    with pytest.raises(UserError) as caught:
        Storage(str(tmp_path / "occupied" / "run")).require_room(1)
    assert "runs_folder" in str(caught.value)
    assert str(tmp_path / "occupied") in str(caught.value)
    assert "can be written" in str(caught.value)


def test_too_little_room_is_told_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 10**10 - 10**9, 10**9))
    Storage(str(tmp_path)).require_room(10**9)
    with pytest.raises(UserError) as caught:
        Storage(str(tmp_path)).require_room(3 * 10**9)
    assert "runs_folder" in str(caught.value)
    assert "1.00 GB free" in str(caught.value)
    assert "3.00 GB" in str(caught.value)
    assert "make room" in str(caught.value)


def test_json_is_valid_whatever_figures_come(storage: Storage) -> None:
    value = {
        "fit": [math.nan, 1.5, {"cut": math.inf}],
        "loss": np.float64("nan"),
        "name": "NaN",
        "pair": (1, -math.inf),
    }
    storage.write_json("figures.json", value)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = storage.read("figures.json").decode()
    expected = {"fit": [None, 1.5, {"cut": None}], "loss": None, "name": "NaN", "pair": [1, None]}
    assert json.loads(text, parse_constant=refuse) == storage.read_json("figures.json") == expected
