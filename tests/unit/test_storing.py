"""What a replica draws is stored before it answers: in few files, whoever waits, and however often it is drawn."""

import asyncio
import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kto_ray.errors import UserError
from kto_ray.generate import storing
from kto_ray.generate.storing import Storing
from kto_ray.parts import PART_SIZE, read_arrays, read_records, write_part
from kto_ray.records import Sample, SampleRecord
from kto_ray.rounds import Round
from kto_ray.storage import Storage
from tests.factories import make_samples, same_sample

ROUND = "rounds/00000"


class Shelf:
    """Ray's object store, in this process: takes pixels, and gives the place of them on it."""

    def __init__(self) -> None:
        self.put: list[npt.NDArray[np.uint8]] = []

    def put_pixels(self, samples: Sequence[Sample]) -> int | None:
        if not samples:
            return None
        self.put.append(np.stack([sample.pixels_HWC for sample in samples]))
        return len(self.put) - 1


class Gate:
    """Holds every write of a part until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        monkeypatch.setattr(storing, "write_part", self._held)

    def _held(self, folder: Storage, samples: Sequence[Sample]) -> list[SampleRecord]:
        self.begun.set()
        assert self.open.wait(60)
        return write_part(folder, samples)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf = Shelf()
    monkeypatch.setattr(storing, "put_pixels", shelf.put_pixels)
    return shelf


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def parts_of(records: Sequence[SampleRecord]) -> set[str]:
    return {record.place.part for record in records if record.place}


def read(folder: Storage, records: Sequence[SampleRecord]) -> list[Sample]:
    arrays = zip(read_arrays(folder, "latents", records), read_arrays(folder, "pixels", records), strict=True)
    return [Sample.of(record, *both) for record, both in zip(records, arrays, strict=True)]


async def test_the_answer_comes_when_all_is_stored(run: Storage, shelf: Shelf, gate: Gate) -> None:
    samples = make_samples("round-00000", 3)
    answering = asyncio.create_task(Storing(run)(ROUND, samples))
    await asyncio.to_thread(gate.begun.wait)
    await asyncio.sleep(0.05)  # if it could answer, it would by now
    assert not answering.done()
    gate.open.set()
    records, pixels = await answering
    assert [record.id for record in records] == [sample.id for sample in samples]
    assert read_records(run / ROUND) == records
    assert all(map(same_sample, read(run / ROUND, records), samples))
    np.testing.assert_array_equal(shelf.put[pixels], np.stack([sample.pixels_HWC for sample in samples]))


async def test_what_comes_while_a_part_is_written_lies_in_one(run: Storage, shelf: Shelf, gate: Gate) -> None:
    samples, store = make_samples("round-00000", 8), Storing(run)
    first = asyncio.create_task(store(ROUND, samples[:2]))
    await asyncio.to_thread(gate.begun.wait)
    others = [asyncio.create_task(store(ROUND, samples[start : start + 2])) for start in (2, 4, 6)]
    while len(shelf.put) < 4:
        await asyncio.sleep(0.01)
    gate.open.set()
    answers = [await task for task in (first, *others)]
    records = [record for those, _ in answers for record in those]
    assert [len(those) for those, _ in answers] == [2] * 4
    assert [record.id for record in records] == [sample.id for sample in samples]  # each has its own
    assert all(map(same_sample, read(run / ROUND, records), samples))
    assert parts_of(records[:2]) & parts_of(records[2:]) == set()
    assert len(parts_of(records[2:])) == len((run / ROUND).names("samples")) - 1 == 1
    for (_, pixels), start in zip(answers, (0, 2, 4, 6), strict=True):
        np.testing.assert_array_equal(shelf.put[pixels], np.stack([s.pixels_HWC for s in samples[start : start + 2]]))


@pytest.mark.usefixtures("shelf")
async def test_parts_are_no_larger_than_they_may_be(run: Storage) -> None:
    samples = make_samples("round-00000", 2 * PART_SIZE + 1)
    records, _ = await Storing(run)(ROUND, samples)
    assert len(parts_of(records)) == 3
    assert all(map(same_sample, read(run / ROUND, records), samples))


@pytest.mark.usefixtures("shelf")
async def test_folders_and_sizes_do_not_share_a_part(run: Storage, gate: Gate) -> None:
    """An evaluation and a round are drawn by the same replicas."""
    store, samples = Storing(run), make_samples("round-00000", 4)
    held_out = make_samples("evaluation", 2)
    small = [dataclasses.replace(sample, pixels_HWC=sample.pixels_HWC[:8]) for sample in samples[2:]]
    first = asyncio.create_task(store(ROUND, samples[:1]))
    await asyncio.to_thread(gate.begun.wait)
    asked = ((ROUND, samples[1:2]), ("evaluations/00000", held_out), (ROUND, small))
    others = [asyncio.create_task(store(folder, those)) for folder, those in asked]
    await asyncio.sleep(0)
    gate.open.set()
    await first
    for (folder, those), other in zip(asked, others, strict=True):
        records, _ = await other
        assert [record.id for record in records] == [sample.id for sample in those]
        assert all(map(same_sample, read(run / folder, records), those))
    assert len((run / ROUND).names("samples")) == 3
    assert {record.id for record in read_records(run / "evaluations/00000")} == {sample.id for sample in held_out}


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize("at_once", [True, False])
async def test_an_image_that_is_drawn_again_is_one_sample(run: Storage, gate: Gate, at_once: bool) -> None:
    """Its first answer was lost, and it comes again alone or in other company, while that is still being stored."""
    store, samples = Storing(run), make_samples("round-00000", 4)
    lost = asyncio.create_task(store(ROUND, samples[:3]))
    await asyncio.to_thread(gate.begun.wait)
    if not at_once:
        gate.open.set()
        await lost
    others = [asyncio.create_task(store(ROUND, those)) for those in (samples[:3], samples[1:])]
    await asyncio.sleep(0)
    gate.open.set()
    for those, answer in zip((samples[:3], samples[1:]), await asyncio.gather(*others), strict=True):
        assert all(map(same_sample, read(run / ROUND, answer[0]), those))
    round_ = Round(run / ROUND, "round-00000")
    assert [record.id for record in round_.records()] == [sample.id for sample in samples]
    assert all(map(same_sample, round_.samples(), samples))


async def test_where_there_is_no_image_nothing_is_stored(run: Storage, shelf: Shelf) -> None:
    assert await Storing(run)(ROUND, []) == ([], None)
    assert (run.names(), shelf.put) == ([], [])


@pytest.mark.usefixtures("shelf")
async def test_what_cannot_be_stored_is_no_answer_and_the_next_is(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, samples, write = Storing(run), make_samples("round-00000", 4), Storage.write

    def full(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(UserError, match="no room"):
        await store(ROUND, samples[:2])
    assert read_records(run / ROUND) == []
    monkeypatch.setattr(Storage, "write", write)
    records, _ = await store(ROUND, samples[2:])
    assert {record.id for record in records} == {sample.id for sample in samples[2:]}


async def test_who_gives_up_takes_nobody_else_s_images_along(run: Storage, shelf: Shelf, gate: Gate) -> None:
    store, samples = Storing(run), make_samples("round-00000", 6)
    tasks = [asyncio.create_task(store(ROUND, samples[:2]))]
    await asyncio.to_thread(gate.begun.wait)
    tasks += [asyncio.create_task(store(ROUND, samples[start : start + 2])) for start in (2, 4)]
    while len(shelf.put) < 3:
        await asyncio.sleep(0.01)
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    gate.open.set()
    for task, start in ((tasks[0], 0), (tasks[2], 4)):
        records, _ = await task
        assert all(map(same_sample, read(run / ROUND, records), samples[start : start + 2]))
