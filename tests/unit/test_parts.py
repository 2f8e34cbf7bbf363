"""Samples come back from their parts bit for bit, nothing else than is asked for is read, and nothing half written."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_ray.errors import UserError
from kto_ray.parts import Kind, read_arrays, read_records, write_part
from kto_ray.pictures import look
from kto_ray.records import Place, Prompt, Sample, SampleRecord, SampleRequest
from kto_ray.storage import Storage
from tests.counting import counted
from tests.factories import make_sample, make_samples, ruined

OLD = Path(__file__).parents[1] / "data" / "run-0.1.0" / "rounds" / "00000"


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "local" else f"memory:/{tmp_path}")


def read(folder: Storage, records: Sequence[SampleRecord]) -> list[Sample]:
    arrays = zip(read_arrays(folder, "latents", records), read_arrays(folder, "pixels", records), strict=True)
    return [Sample.of(record, *both) for record, both in zip(records, arrays, strict=True)]


def same(ours: Sequence[Sample], theirs: Sequence[Sample]) -> bool:
    """In every field and bit, whatever numbers the bits are."""

    def bits(sample: Sample) -> tuple[object, ...]:
        arrays = (sample.latents_CHW, sample.pixels_HWC)
        return (sample.record(), *((array.dtype, array.shape, array.tobytes()) for array in arrays))

    return [bits(sample) for sample in ours] == [bits(sample) for sample in theirs]


def in_order(records: Sequence[SampleRecord]) -> list[SampleRecord]:
    return sorted(records, key=lambda record: record.id)


def place(record: SampleRecord) -> Place:
    assert record.place is not None
    return record.place


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_samples_come_back_as_they_were(folder: Storage, count: int) -> None:
    samples = make_samples("round-00000", count)
    written = write_part(folder, samples)
    found = read_records(folder)
    assert found == written == [sample.record() for sample in samples]
    assert [record.place for record in found] == [record.place for record in written]
    assert [record.look for record in found] == [look(sample.pixels_HWC) for sample in samples]
    assert same(read(folder, found), samples)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_bits_come_back(data: st.DataObject) -> None:
    """Infinities, NaNs of every kind and negative zeros are bits, too; shapes are those of any model."""
    folder = Storage(f"memory://parts-{data.draw(st.uuids())}")
    sides, count = st.integers(1, 9), data.draw(st.integers(1, 4))
    latents_shape = data.draw(st.tuples(st.integers(1, 16), sides, sides))
    pixels_shape = (*data.draw(st.tuples(sides, sides)), 3)
    samples = [
        dataclasses.replace(
            sample,
            latents_CHW=np.frombuffer(
                data.draw(st.binary(min_size=4 * (n := int(np.prod(latents_shape))), max_size=4 * n)), "<f4"
            ).reshape(latents_shape),
            pixels_HWC=np.frombuffer(
                data.draw(st.binary(min_size=(m := int(np.prod(pixels_shape))), max_size=m)), "u1"
            ).reshape(pixels_shape),
        )
        for sample in make_samples("round-00000", count)
    ]
    assert same(read(folder, write_part(folder, samples)), samples)


def scattered(sample: Sample) -> Sample:
    """The same sample in arrays that are not in C order, as a transposed tensor gives them."""
    latents_CHW = np.ascontiguousarray(sample.latents_CHW.transpose(1, 2, 0)).transpose(2, 0, 1)
    pixels_HWC = np.asfortranarray(sample.pixels_HWC)
    assert not latents_CHW.flags.c_contiguous
    assert not pixels_HWC.flags.c_contiguous
    return dataclasses.replace(sample, latents_CHW=latents_CHW, pixels_HWC=pixels_HWC)


def view(sample: Sample) -> Sample:
    return dataclasses.replace(sample, pixels_HWC=sample.pixels_HWC[::-1, ::2], latents_CHW=sample.latents_CHW[::-1])


@pytest.mark.parametrize("changed", [scattered, view])
@pytest.mark.parametrize("count", [1, 3])
def test_memory_order_of_arrays_does_not_matter(
    folder: Storage, count: int, changed: Callable[[Sample], Sample]
) -> None:
    samples = [changed(sample) for sample in make_samples("round-00000", count)]
    records = write_part(folder, samples)
    assert same(read(folder, records), samples)
    plain = [
        dataclasses.replace(
            s, latents_CHW=np.ascontiguousarray(s.latents_CHW), pixels_HWC=np.ascontiguousarray(s.pixels_HWC)
        )
        for s in samples
    ]
    assert [record.place for record in write_part(folder, plain)] == [record.place for record in records]


def test_what_is_no_image_says_why_and_keeps_its_numbers(folder: Storage) -> None:
    samples = make_samples("round-00000", 3)
    samples[1] = ruined(samples[1])
    write_part(folder, samples)
    found = read_records(folder)
    assert [record.error for record in found] == [None, samples[1].error, None]
    assert same(read(folder, found), samples)


def test_unusual_prompts_survive(folder: Storage) -> None:
    prompt = Prompt("ü/1", 'a "red" circle\n\u2028 🟠', {"style": "", "クラス": "x"})
    write_part(folder, [make_sample(SampleRequest.make(3, "evaluation", prompt, 7))])
    (record,) = read_records(folder)
    assert (record.prompt, record.index, record.stage) == (prompt, 7, "evaluation")


def test_rows_are_found_in_any_order_and_number_over_several_parts(folder: Storage) -> None:
    """Also where a part has more rows than are read at once."""
    samples = make_samples("round-00000", 150)
    records = in_order([*write_part(folder, samples[:140]), *write_part(folder, samples[140:])])
    assert len({place(record).part for record in records}) == 2
    for rows in ([0], [149], [70, 3, 149, 139, 3, 145, 60], range(150)):
        assert same(read(folder, [records[row] for row in rows]), [samples[row] for row in rows])


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_part_needs_samples_of_one_shape(folder: Storage) -> None:
    one, other = make_samples("round-00000", 2)
    for samples in (
        [],
        [one, dataclasses.replace(other, pixels_HWC=other.pixels_HWC[:4])],
        [one, dataclasses.replace(other, latents_CHW=other.latents_CHW[:, :1])],
    ):
        with pytest.raises(ValueError, match="samples of one shape, at least one"):
            write_part(folder, samples)
    assert (folder.names(), read_records(folder)) == ([], [])


def test_the_same_samples_make_the_same_part_again(folder: Storage) -> None:
    samples = make_samples("round-00000", 4)

    def files() -> dict[str, bytes]:
        return {
            f"{kind}/{name}": folder.read(f"{kind}/{name}") for kind in folder.names() for name in folder.names(kind)
        }

    first = write_part(folder, samples[:3])
    before = files()
    again = write_part(folder, samples[:3])
    assert [record.place for record in again] == [record.place for record in first]
    assert files() == before
    assert len(before) == 3
    write_part(folder, samples[1:])
    assert files().keys() > before.keys()
    # Drawn again, and not to the last bit the same: what was there stays as it was.
    other = dataclasses.replace(samples[0], latents_CHW=samples[0].latents_CHW * np.float32(1.0000001))
    write_part(folder, [other, *samples[1:3]])
    assert {name: files()[name] for name in before} == before


@pytest.mark.parametrize("written", [0, 1])
def test_a_part_of_which_not_all_was_written_is_none(
    folder: Storage, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed between its files leaves no record of samples whose arrays are not there."""
    samples, write, done = make_samples("round-00000", 4), Storage.write, 0
    write_part(folder, samples[:1])

    def full(storage: Storage, name: str, data: bytes) -> None:
        nonlocal done
        if done == written:
            raise UserError("no room")
        done += 1
        write(storage, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        with pytest.raises(UserError, match="no room"):
            write_part(folder, samples[1:])
    assert [record.id for record in read_records(folder)] == [samples[0].id]
    write_part(folder, samples[1:])
    assert same(read(folder, in_order(read_records(folder))), samples)


# -- reading ----------------------------------------------------------------------------------------------------------


def large(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        dataclasses.replace(
            sample,
            latents_CHW=rng.normal(size=(4, 64, 64)).astype(np.float32),
            pixels_HWC=rng.integers(0, 256, (128, 128, 3), np.uint8),
        )
        for sample in make_samples("round-00000", count)
    ]


def test_records_are_read_without_arrays(folder: Storage) -> None:
    samples = large(24)
    for start in range(0, 24, 12):
        write_part(folder, samples[start : start + 12])
    with counted() as count:
        records = in_order(read_records(folder))
    assert [record.id for record in records] == [sample.id for sample in samples]
    arrays = sum(sample.latents_CHW.nbytes + sample.pixels_HWC.nbytes for sample in samples)
    assert count.read < 0.05 * arrays + 2 * 2**16  # of two files the last 64 KiB, where it says what is in them
    assert count.files_read == 2


def test_arrays_are_read_without_the_other_kind_and_the_other_rows(folder: Storage) -> None:
    samples = large(32)
    records = write_part(folder, samples)
    some = [records[place] for place in (30, 5, 17, 6)]
    wanted_bytes: dict[Kind, int] = {"latents": 4 * 65536, "pixels": 4 * 49152}
    for kind, wanted in wanted_bytes.items():
        with counted() as count:
            read_arrays(folder, kind, some)
        assert wanted * 0.9 < count.read < wanted * 1.7  # pixels share their row groups, two and two
        assert count.files_read == 1


def test_arrays_that_have_changed_are_not_given(folder: Storage) -> None:
    samples = make_samples("round-00000", 3)
    records = write_part(folder, samples)
    for changed, kind in (
        (dataclasses.replace(samples[1], latents_CHW=samples[1].latents_CHW + 1), "latents"),
        (dataclasses.replace(samples[1], pixels_HWC=np.bitwise_not(samples[1].pixels_HWC)), "pixels"),
    ):
        (record, *_) = write_part(folder, [samples[0], changed, samples[2]])
        exchanged = folder.read(f"{kind}/{place(record).part}.parquet")
        folder.write(f"{kind}/{place(records[0]).part}.parquet", exchanged)
        with pytest.raises(ValueError, match=f"the {kind} of {samples[1].id} have changed since they were stored"):
            read(folder, records)
        assert same(read(folder, [records[0], records[2]]), [samples[0], samples[2]])
        write_part(folder, samples)


def test_arrays_that_are_gone_are_not_found(folder: Storage) -> None:
    records = write_part(folder, make_samples("round-00000", 3))
    folder.delete(f"pixels/{place(records[0]).part}.parquet")
    assert len(read_arrays(folder, "latents", records)) == 3
    with pytest.raises(FileNotFoundError):
        read_arrays(folder, "pixels", records)


def test_parts_of_release_0_1_0_are_read(tmp_path: Path) -> None:
    """Their arrays lie beside their records; what they are was taken down when that release was the newest."""
    shutil.copytree(OLD, tmp_path / "round")
    folder = Storage(str(tmp_path / "round"))
    records = in_order(read_records(folder))
    assert len({record.id for record in records}) == 16
    samples = read(folder, records[::-1])[::-1]
    assert {(s.latents_CHW.dtype.str, s.pixels_HWC.dtype.str) for s in samples} == {("<f4", "|u1")}
    assert all(same(read(folder, [record]), [sample]) for record, sample in zip(records, samples, strict=True))
    first = samples[0]
    digests = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (first.latents_CHW, first.pixels_HWC)]
    assert (first.id, first.prompt.text) == ("round-00000-0a6cffbb2d8df385", "a yellow cross on brown")
    assert digests == ["bc75a539a8540097", "73fbb15b48ddde08"]
    new = Storage(str(tmp_path / "new"))
    assert same(read(new, write_part(new, samples)), samples)
