"""Records come back from Parquet as they went in; ids and seeds follow from their parts alone."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.records import (
    LABELS,
    Label,
    Place,
    Prompt,
    Sample,
    SampleRecord,
    SampleRequest,
    Verdict,
    derive_seed,
    index_to_table,
    records_to_table,
    scores_to_table,
    table_to_records,
    table_to_scores,
    table_to_verdicts,
    verdicts_to_table,
)
from tests.factories import BASE, make_requests, make_sample, make_samples, make_score, ruined, same_sample


def through_parquet(table: pa.Table, folder: Path) -> pa.Table:
    pq.write_table(table, folder / "table.parquet")
    return pq.read_table(folder / "table.parquet")


def make_records(count: int) -> list[SampleRecord]:
    """One of them of what is no image."""
    samples = make_samples("round-00000", count)
    samples[1] = ruined(samples[1])
    return [sample.record() for sample in samples]


def test_records_survive_parquet_with_their_places_where_they_have_some(tmp_path: Path) -> None:
    records = make_records(3)
    places = [Place(f"part-{row}", row, f"{row}" * 64, "f" * 64) for row in range(3)]
    placed = [dataclasses.replace(record, place=place) for record, place in zip(records, places, strict=True)]
    again = table_to_records(through_parquet(index_to_table(placed), tmp_path))
    assert again == records
    assert [record.place for record in again] == places
    without = table_to_records(through_parquet(records_to_table(placed), tmp_path))
    assert without == records
    assert [record.place for record in without] == [None] * 3


def test_unusual_prompts_survive(tmp_path: Path) -> None:
    prompt = Prompt("ü/1", 'a "red" circle\n\u2028 🟠', {"style": "", "クラス": "x"})
    record = make_sample(SampleRequest.make(3, "evaluation", prompt, 7)).record()
    (again,) = table_to_records(through_parquet(records_to_table([record]), tmp_path))
    assert (again.prompt, again.index, again.stage) == (prompt, 7, "evaluation")


def test_tables_of_older_versions_know_of_no_errors() -> None:
    older = records_to_table(make_records(3)).drop_columns(["error"])
    assert [record.error for record in table_to_records(older)] == [None] * 3


def test_a_sample_is_its_record_and_its_arrays() -> None:
    sample, place = ruined(make_samples("round-00000", 1)[0]), Place("part", 3, "a", "b")
    record = sample.record(place, b"look")
    assert type(record) is SampleRecord
    assert (record.place, record.look) == (place, b"look")
    again = Sample.of(record, sample.latents_CHW, sample.pixels_HWC)
    assert (again.id, again.prompt, again.policy, again.error) == (sample.id, sample.prompt, BASE, sample.error)
    assert again.record() == record
    assert (again.record().place, again.record().look) == (place, b"look")  # kept


def test_scores_survive_parquet_failed_ones_too(tmp_path: Path) -> None:
    scores = [make_score("a", 0.1 + 0.2), make_score("b", None, "ValueError: ü"), make_score("c", -math.pi)]
    assert table_to_scores(through_parquet(scores_to_table(scores), tmp_path)) == scores


def test_every_label_is_listed() -> None:
    assert get_args(Label) == LABELS == ("desirable", "undesirable", "abstain", "failed")


def test_verdicts_survive_parquet(tmp_path: Path) -> None:
    verdicts = [Verdict(f"s{i}", label, "people", "two of three") for i, label in enumerate(LABELS)]
    assert table_to_verdicts(through_parquet(verdicts_to_table(verdicts), tmp_path)) == verdicts


def test_nothing_is_a_table_too(tmp_path: Path) -> None:
    assert table_to_records(through_parquet(records_to_table([]), tmp_path)) == []
    assert table_to_records(through_parquet(index_to_table([]), tmp_path)) == []
    assert table_to_scores(through_parquet(scores_to_table([]), tmp_path)) == []
    assert table_to_verdicts(through_parquet(verdicts_to_table([]), tmp_path)) == []


def test_records_are_frozen_and_pickle() -> None:
    sample = make_samples("round-00000", 1)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.id = "other"  # type: ignore[misc]
    assert same_sample(pickle.loads(pickle.dumps(sample)), sample)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "round-00000", "p0", 0) == derive_seed(0, "round-00000", "p0", 0)
    # A constant, so that another Python version or platform is caught: stored runs depend on it.
    assert derive_seed(1, "a") == 1515775267073163690


def test_seeds_fit_a_signed_64_bit_column_and_hardly_collide() -> None:
    seeds = {derive_seed(0, "round-00000", f"p{i}", j) for i in range(100) for j in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_ids_follow_from_run_seed_stage_prompt_and_index() -> None:
    prompt = Prompt("p", "text")
    request = SampleRequest.make(0, "round-00000", prompt, 0)
    assert request == SampleRequest.make(0, "round-00000", prompt, 0)
    others = [
        SampleRequest.make(1, "round-00000", prompt, 0),
        SampleRequest.make(0, "round-00001", prompt, 0),
        SampleRequest.make(0, "round-00000", Prompt("q", "text"), 0),
        SampleRequest.make(0, "round-00000", prompt, 1),
    ]
    assert len({r.id for r in [request, *others]}) == len({r.seed for r in [request, *others]}) == 5


def test_an_id_begins_with_its_stage() -> None:
    assert all(request.id.startswith("round-00007-") for request in make_requests("round-00007", 3))
