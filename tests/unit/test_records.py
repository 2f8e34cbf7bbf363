"""Records come back from Parquet as they went in; ids and seeds follow from their parts alone."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.records import (
    LABELS,
    Label,
    Prompt,
    Sample,
    SampleRequest,
    Verdict,
    derive_seed,
    samples_to_table,
    scores_to_table,
    table_to_samples,
    table_to_scores,
    table_to_verdicts,
    tensor_column,
    verdicts_to_table,
)
from tests.factories import make_requests, make_sample, make_samples, make_score, ruined, same_sample


def through_parquet(table: pa.Table, folder: Path) -> pa.Table:
    pq.write_table(table, folder / "table.parquet")
    return pq.read_table(folder / "table.parquet")


def test_samples_survive_parquet(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 5)
    again = table_to_samples(through_parquet(samples_to_table(samples), tmp_path))
    assert all(same_sample(a, b) for a, b in zip(samples, again, strict=True))


def scattered(sample: Sample) -> Sample:
    """The same sample in arrays that are not in C order, as a transposed tensor gives them."""
    latents_CHW = np.ascontiguousarray(sample.latents_CHW.transpose(1, 2, 0)).transpose(2, 0, 1)
    pixels_HWC = np.asfortranarray(sample.pixels_HWC)
    assert not latents_CHW.flags.c_contiguous
    assert not pixels_HWC.flags.c_contiguous
    return dataclasses.replace(sample, latents_CHW=latents_CHW, pixels_HWC=pixels_HWC)


@pytest.mark.parametrize("count", [1, 3])
def test_memory_order_of_arrays_does_not_matter(tmp_path: Path, count: int) -> None:
    samples = make_samples("round-00000", count)
    again = table_to_samples(through_parquet(samples_to_table([scattered(s) for s in samples]), tmp_path))
    assert all(same_sample(a, b) for a, b in zip(samples, again, strict=True))


def test_views_into_a_larger_array_are_stored_as_they_look(tmp_path: Path) -> None:
    sample = make_samples("round-00000", 1)[0]
    view = dataclasses.replace(sample, pixels_HWC=sample.pixels_HWC[::-1, ::2], latents_CHW=sample.latents_CHW[::-1])
    (again,) = table_to_samples(through_parquet(samples_to_table([view]), tmp_path))
    assert same_sample(view, again)


def test_tables_in_several_chunks_read_as_one() -> None:
    samples = make_samples("round-00000", 4)
    table = pa.concat_tables([samples_to_table(samples[:1]), samples_to_table(samples[1:])])
    assert tensor_column(table, "latents").shape == (4, 4, 2, 3)
    assert [s.id for s in table_to_samples(table)] == [s.id for s in samples]
    assert [s.id for s in table_to_samples(table.slice(1, 2))] == [s.id for s in samples[1:3]]


def test_unusual_prompts_survive(tmp_path: Path) -> None:
    prompt = Prompt("ü/1", 'a "red" circle\n\u2028 🟠', {"style": "", "クラス": "x"})
    sample = make_sample(SampleRequest.make(3, "evaluation", prompt, 7))
    (again,) = table_to_samples(through_parquet(samples_to_table([sample]), tmp_path))
    assert (again.prompt, again.index, again.stage) == (prompt, 7, "evaluation")


def test_a_table_of_samples_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        samples_to_table([])


def test_samples_of_different_sizes_do_not_share_a_table() -> None:
    one, other = make_samples("round-00000", 2)
    with pytest.raises(ValueError, match="shape"):
        samples_to_table([one, dataclasses.replace(other, pixels_HWC=other.pixels_HWC[:4])])


def test_scores_survive_parquet_failed_ones_too(tmp_path: Path) -> None:
    scores = [make_score("a", 0.1 + 0.2), make_score("b", None, "ValueError: ü"), make_score("c", -math.pi)]
    assert table_to_scores(through_parquet(scores_to_table(scores), tmp_path)) == scores


def test_every_label_is_listed() -> None:
    assert get_args(Label) == LABELS == ("desirable", "undesirable", "abstain", "failed")


def test_verdicts_survive_parquet(tmp_path: Path) -> None:
    verdicts = [Verdict(f"s{i}", label, "people", "two of three") for i, label in enumerate(LABELS)]
    assert table_to_verdicts(through_parquet(verdicts_to_table(verdicts), tmp_path)) == verdicts


def test_no_scores_and_no_verdicts_are_tables_too(tmp_path: Path) -> None:
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


def test_why_a_sample_is_no_image_survives_parquet_and_older_tables_know_of_none(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 3)
    samples[1] = ruined(samples[1])
    table = through_parquet(samples_to_table(samples), tmp_path)
    again = table_to_samples(table)
    assert [sample.error for sample in again] == [None, samples[1].error, None]
    assert np.isnan(again[1].latents_CHW).all()
    assert [sample.error for sample in table_to_samples(table.drop_columns(["error"]))] == [None] * 3
