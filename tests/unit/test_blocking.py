"""The finder of calls that keep an event loop waiting: what is made on the loop's thread is found, with who made it."""

import asyncio
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.rounds import Round
from kto_ray.storage import Storage
from tests.blocking import LARGE, BlockingCall, blocking_calls
from tests.factories import make_samples

SHA256 = hashlib.sha256  # as it was imported


async def test_every_storage_call_on_the_loop_is_found_once(
    tmp_path: Path, calls_on_the_loop: list[BlockingCall]
) -> None:
    storage = Storage(str(tmp_path))
    assert calls_on_the_loop == []
    storage.write_json("facts.json", {})
    assert storage.read_json("facts.json") == {}
    assert (storage / "below").names() == []
    assert [call.what for call in calls_on_the_loop] == [
        "Storage.write_json facts.json",
        "Storage.read_json facts.json",
        "Storage.names",
    ]
    assert all(call.where.startswith("test_blocking.py:") for call in calls_on_the_loop)


async def test_it_says_which_line_of_the_package_it_was(tmp_path: Path, calls_on_the_loop: list[BlockingCall]) -> None:
    round_ = Round(Storage(str(tmp_path)), "round-00000")
    calls_on_the_loop.clear()
    round_.add_samples(make_samples("round-00000", 2))
    assert calls_on_the_loop
    (write,) = (call for call in calls_on_the_loop if call.what.startswith("Storage.write_table samples/"))
    by = r"parts.py:\d+ _write < parts.py:\d+ write_part < rounds.py:\d+ add_samples"
    assert re.fullmatch(rf"Storage.write_table samples/\w+.parquet by {by}", str(write))


async def test_what_runs_in_a_thread_is_not(tmp_path: Path, calls_on_the_loop: list[BlockingCall]) -> None:
    def work() -> None:
        round_ = Round(Storage(str(tmp_path)), "round-00000")
        round_.add_samples(make_samples("round-00000", 2))
        round_.seal()
        hashlib.sha256(bytes(LARGE + 1))

    await asyncio.to_thread(work)
    assert calls_on_the_loop == []


def test_nor_what_is_called_without_a_loop(tmp_path: Path, calls_on_the_loop: list[BlockingCall]) -> None:
    Round(Storage(str(tmp_path)), "round-00000").add_samples(make_samples("round-00000", 2))
    assert calls_on_the_loop == []


def in_pieces(data: bytes) -> Any:
    digest = hashlib.sha256()
    for start in range(0, len(data), LARGE + 1):
        digest.update(data[start : start + LARGE + 1])
    return digest


@pytest.mark.parametrize("digest", [lambda data: hashlib.sha256(data), in_pieces])
async def test_hashing_much_is_found_and_gives_the_same(
    digest: Callable[[bytes], Any], calls_on_the_loop: list[BlockingCall]
) -> None:
    long, short = bytes(range(256)) * 64, b"an id"
    assert digest(short).hexdigest() == SHA256(short).hexdigest()
    assert calls_on_the_loop == []
    assert digest(long).hexdigest() == SHA256(long).hexdigest()
    assert {call.what for call in calls_on_the_loop} == {"hashlib.sha256"}


async def test_parquet_is_found_without_storage_too(calls_on_the_loop: list[BlockingCall]) -> None:
    sink, table = io.BytesIO(), pa.table({"a": [1, 2]})
    pq.write_table(table, sink)
    assert pq.read_table(pa.BufferReader(sink.getvalue())).equals(table)
    assert pq.ParquetFile(io.BytesIO(sink.getvalue())).read().equals(table)
    assert [call.what for call in calls_on_the_loop] == [
        "parquet.write_table",
        "parquet.read_table",
        "parquet.ParquetFile.__init__",
        "parquet.ParquetFile.read",
    ]


async def test_nothing_stays_watched(tmp_path: Path) -> None:
    before = dict(vars(Storage)), hashlib.sha256, pq.write_table
    with blocking_calls() as calls:
        assert (dict(vars(Storage)), hashlib.sha256, pq.write_table) != before
    assert (dict(vars(Storage)), hashlib.sha256, pq.write_table) == before
    Storage(str(tmp_path)).write("file", b"")
    assert calls == []
