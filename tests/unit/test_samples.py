"""Samples on their way: a sequence of records, and their pixels from wherever they still are."""

import asyncio
import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ray import exceptions

from kto_ray import parts, samples
from kto_ray.parts import write_part
from kto_ray.records import Sample, SampleRecord
from kto_ray.samples import Samples
from kto_ray.storage import Storage
from tests.factories import make_samples

Pixels = npt.NDArray[np.uint8]


class Reference:
    """To pixels in Ray's object store; or they are lost, or the store says something else."""

    def __init__(self, pixels_BHWC: Pixels | None, error: Exception | None = None) -> None:
        self.pixels_BHWC, self.error, self.asked = pixels_BHWC, error, 0

    def __await__(self) -> Generator[Any, None, tuple[bytes, tuple[int, ...]]]:
        self.asked += 1
        yield from asyncio.sleep(0).__await__()
        if self.error:
            raise self.error
        assert self.pixels_BHWC is not None
        return self.pixels_BHWC.tobytes(), self.pixels_BHWC.shape


LOST = exceptions.OwnerDiedError("aa", None, "")


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def whole() -> list[Sample]:
    return make_samples("round-00000", 5)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[Reference]:
    """What was put into Ray's object store."""
    references: list[Reference] = []

    def put_one(pixels_BHWC: Pixels) -> Reference:
        references.append(Reference(pixels_BHWC.copy()))
        return references[-1]

    monkeypatch.setattr(samples, "_put", put_one)
    return references


def pixels_of(whole: Sequence[Sample]) -> Pixels:
    return np.stack([sample.pixels_HWC for sample in whole])


def ids(these: Sequence[SampleRecord]) -> list[str]:
    return [sample.id for sample in these]


async def shows(these: Samples, whole: Sequence[Sample]) -> bool:
    """Whether they are these samples, with their pixels, which nobody can change."""
    pixels_BHWC = await these.pixels_BHWC()
    assert pixels_BHWC.dtype == np.uint8
    assert not pixels_BHWC.flags.writeable
    return ids(these) == ids(whole) and np.array_equal(pixels_BHWC, pixels_of(whole))


# -- a sequence -------------------------------------------------------------------------------------------------------


def test_they_are_a_sequence_of_records(whole: list[Sample]) -> None:
    these = Samples.of(whole)
    records = [sample.record() for sample in whole]
    assert len(these) == 5
    assert list(these) == [these[place] for place in range(5)] == records
    assert these[-1] == records[-1]
    assert (records[2] in these, make_samples("round-00001", 1)[0].record() in these) == (True, False)
    assert these.prompts == [sample.prompt for sample in whole]
    assert not any(isinstance(record, Sample) for record in these)  # their pixels are in no record
    with pytest.raises(IndexError):
        these[5]
    assert (bool(these), bool(Samples.of([]))) == (True, False)


@pytest.fixture(params=["here", "stored", "in the object store", "lost"])
def these(request: pytest.FixtureRequest, whole: list[Sample], folder: Storage) -> Samples:
    """The same samples, with their pixels in each of the places where they may be."""
    if request.param == "here":
        return Samples.of(whole)
    reference = {
        "stored": None,
        "in the object store": Reference(pixels_of(whole)),
        "lost": Reference(None, LOST),
    }[request.param]
    return Samples(write_part(folder, whole), folder, reference)


async def test_pixels_come_from_wherever_they_are(these: Samples, whole: list[Sample]) -> None:
    assert await shows(these, whole)
    assert await shows(these, whole)


@pytest.mark.parametrize("part", [slice(1, 4), slice(None, None, -2), slice(4, None), slice(None)])
async def test_a_slice_has_its_own_pixels(these: Samples, whole: list[Sample], part: slice) -> None:
    assert await shows(these[part], whole[part])
    assert await shows(these[part][:1], whole[part][:1])


@pytest.mark.parametrize("places", [[0], [3, 1], [0, 1, 2, 3, 4]])
async def test_some_of_them_have_their_own_pixels(these: Samples, whole: list[Sample], places: list[int]) -> None:
    some = these.only({whole[place].id for place in places} | {"another"})
    assert await shows(some, [whole[place] for place in sorted(places)])


async def test_none_of_them_are_samples_too(these: Samples) -> None:
    assert ids(these.only(set())) == ids(these[:0]) == []


async def test_all_of_them_need_not_be_fetched_anew(whole: list[Sample], folder: Storage) -> None:
    reference = Reference(pixels_of(whole))
    these = Samples(write_part(folder, whole), folder, reference)
    for kind in ("samples", "pixels"):
        for name in folder.names(kind):
            folder.delete(f"{kind}/{name}")
    assert await shows(these.only(set(ids(whole))), whole)
    assert await these.only(set(ids(whole))).reference() is reference


# -- lost and changed -------------------------------------------------------------------------------------------------


async def test_what_is_lost_is_asked_for_once(whole: list[Sample], folder: Storage) -> None:
    reference = Reference(None, LOST)
    these = Samples(write_part(folder, whole), folder, reference)
    assert await shows(these, whole)
    assert await shows(these, whole)
    assert reference.asked == 1


async def test_other_errors_of_the_object_store_are_raised(whole: list[Sample], folder: Storage) -> None:
    these = Samples(write_part(folder, whole), folder, Reference(None, exceptions.RaySystemError(ValueError("odd"))))
    with pytest.raises(exceptions.RaySystemError, match="odd"):
        await these.pixels_BHWC()


@pytest.mark.parametrize("reference", [None, Reference(None, LOST)])
async def test_stored_pixels_that_have_changed_are_not_given(
    whole: list[Sample], folder: Storage, reference: Reference | None
) -> None:
    these = Samples(write_part(folder, whole), folder, reference)
    (name,) = folder.names("pixels")
    data = bytearray(folder.read(f"pixels/{name}"))
    data[len(data) // 3] ^= 1
    folder.write(f"pixels/{name}", bytes(data))
    for ask in (these.pixels_BHWC, these.reference):
        with pytest.raises(ValueError, match="changed since"):
            await ask()


# -- references for scorers -------------------------------------------------------------------------------------------


async def test_the_reference_is_that_of_the_replica(whole: list[Sample], folder: Storage, put: list[Reference]) -> None:
    reference = Reference(pixels_of(whole))
    assert await Samples(write_part(folder, whole), folder, reference).reference() is reference
    assert put == []


async def test_without_one_pixels_are_put_once_for_all_scorers(
    these: Samples, whole: list[Sample], put: list[Reference]
) -> None:
    these.lost(await these.reference())
    put.clear()
    references = await asyncio.gather(*(these.reference() for _ in range(3)))
    assert references == put * 3
    np.testing.assert_array_equal(put[0].pixels_BHWC, pixels_of(whole))
    assert await these.reference() is put[0]


async def test_a_reference_that_is_lost_is_made_anew_once(
    whole: list[Sample], folder: Storage, put: list[Reference]
) -> None:
    """Every scorer that was given it finds out for itself, and not at the same time."""
    first = Reference(None, LOST)
    these = Samples(write_part(folder, whole), folder, first)
    assert [await these.reference() for _ in range(3)] == [first] * 3
    these.lost(first)
    second = await these.reference()
    assert second is not first
    these.lost(first)
    assert await these.reference() is second
    these.lost(second)
    third = await these.reference()
    assert put == [second, third]
    assert await shows(these, whole)


async def test_who_gives_up_waiting_takes_nobody_else_s_reference_along(
    whole: list[Sample], folder: Storage, put: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, read = threading.Event(), threading.Event(), parts.read_arrays

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go.wait(60)
        return read(*arguments)

    monkeypatch.setattr(samples, "read_arrays", slow)
    these = Samples(write_part(folder, whole), folder)
    impatient, patient = (asyncio.create_task(these.reference()) for _ in range(2))
    await asyncio.to_thread(begun.wait)
    impatient.cancel()
    await asyncio.wait([impatient])
    go.set()
    assert [await patient] == put
