"""Training from a prepared set: every image exactly once a pass, whatever the ranks, sizes and restarts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kto_ray.config import Train
from kto_ray.config.preparing import StreamSettings as Settings
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.texts import Texts
from kto_ray.prepared import PreparedSet
from kto_ray.train import streaming
from kto_ray.train.batches import Batch
from kto_ray.train.finite import NotFiniteError
from kto_ray.train.streaming import IntervalBatches, Strand, Stream
from tests.counting import counted
from tests.factories import make_set


def encode_prompts(prompts: Sequence[str]) -> Conditioning:
    return Conditioning({"text": torch.tensor([[float(len(prompt))] for prompt in prompts])})


FAMILY = cast(
    Any,
    SimpleNamespace(
        encode_prompts=encode_prompts,
        nothing=lambda: encode_prompts([""]),
        noise=SimpleNamespace(level_draw="uniform"),
        noise_dtype=None,
    ),
)


def stream_of(prepared: PreparedSet, steps: int = 5, shuffle: int = 16, **train: Any) -> Stream:
    config = Train(**({"global_batch": 4, "micro_batch": 4, "gamma": 0.75} | train))
    return Stream(prepared, config, Settings(steps=steps, shuffle=shuffle), seed=3)


def batches_of(stream: Stream, index: int, rank: int = 0, ranks: int = 1) -> IntervalBatches:
    arguments = (stream.train, FAMILY, Texts(lambda: FAMILY), 3, torch.device("cpu"), rank, ranks)
    return stream.interval(index).batches(*arguments)


def numbers(batch: Batch) -> list[int]:
    """Of the images in a batch, by their latents."""
    return [int(value) for value in batch.clean_BCHW[:, 0, 0, 0].tolist()]


def drawn(stream: Stream, intervals: int) -> list[int]:
    """Numbers of all images in the order in which they are drawn."""
    order: list[int] = []
    for index in range(intervals):
        interval = stream.interval(index)
        order += interval.rows[interval.plan_SG].ravel().tolist()
    return order


VERDICTS = [n % 3 == 0 for n in range(60)]


# -- strands ----------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    shuffle=st.integers(1, 30),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_every_row_comes_once_a_pass_however_it_is_asked_for(sizes: list[int], shuffle: int, chunks: list[int]) -> None:
    shard_N = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.arange(len(shard_N))
    strand = Strand(rows, shard_N, shuffle, ("test",))
    taken, start = [], 0
    for count in chunks:
        taken += strand.take(start, count).tolist()
        start += count
    whole = strand.take(0, start)
    assert taken == whole.tolist()
    for first in range(0, start - len(rows) + 1, len(rows)):
        assert sorted(taken[first : first + len(rows)]) == rows.tolist()


def test_a_pass_mixes_few_shards_at_a_time_and_differs_from_the_next() -> None:
    shard_N = np.repeat(np.arange(50), 8)
    strand = Strand(np.arange(400), shard_N, 32, ("test",))
    first, second = strand.take(0, 400), strand.take(400, 400)
    assert not np.array_equal(first, second)
    for start in range(0, 384, 32):
        assert len(set(shard_N[first[start : start + 32]].tolist())) == 4
    assert first.tolist() != sorted(first.tolist())
    assert not np.array_equal(Strand(np.arange(400), shard_N, 32, ("other",)).take(0, 400), first)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_classes_are_drawn_by_gamma_and_none_is_dropped_or_doubled_in_a_pass(tmp_path: Path) -> None:
    stream = stream_of(make_set(tmp_path, VERDICTS), steps=10)
    order = drawn(stream, 20)
    assert len(order) == 20 * 10 * 4
    by_class = {yes: [n for n in order if VERDICTS[n] == yes] for yes in (True, False)}
    assert 0.7 < len(by_class[True]) / len(order) < 0.8
    for yes, those in by_class.items():
        members = [n for n, verdict in enumerate(VERDICTS) if verdict == yes]
        for start in range(0, len(those) - len(members) + 1, len(members)):
            assert sorted(those[start : start + len(members)]) == members
    passes = stream.passes(20)
    assert passes["yes"] == len(by_class[True]) / 20
    assert passes["no"] == len(by_class[False]) / 40


def test_without_gamma_every_image_is_drawn_equally_often(tmp_path: Path) -> None:
    order = drawn(stream_of(make_set(tmp_path, VERDICTS), steps=15, gamma=None), 3)
    assert set(Counter(order).values()) == {3}


def test_an_interval_is_the_same_whoever_asks_and_whatever_was_before(tmp_path: Path) -> None:
    prepared = make_set(tmp_path, VERDICTS)
    stream = stream_of(prepared)
    plans = [stream.interval(index).plan_SG.tolist() for index in range(4)]
    assert stream_of(PreparedSet(prepared.folder, "set")).interval(3).plan_SG.tolist() == plans[3]
    assert plans[0] != plans[1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_what_one_alone_would_take(tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MOST_OF_A_SEGMENT", 8)  # two steps
    stream = stream_of(make_set(tmp_path, VERDICTS))
    shares = [list(batches_of(stream, 1, rank, ranks)) for rank in range(ranks)]
    interval = stream.interval(1)
    together = [[n for rank in range(ranks) for n in numbers(shares[rank][step])] for step in range(5)]
    assert together == interval.rows[interval.plan_SG].tolist()
    noise = [torch.cat([shares[rank][step].noise_BCHW for rank in range(ranks)]) for step in range(5)]
    alone = list(batches_of(stream, 1))
    assert all(torch.equal(one, batch.noise_BCHW) for one, batch in zip(noise, alone, strict=True))
    assert len({batch.noise_BCHW[0, 0, 0, 0].item() for batch in alone}) == 5
    batches = batches_of(stream, 1)
    assert len(batches) == len(list(batches)) == 5
    assert batches.draws_N.tolist() == interval.draws_N.tolist()


def test_batches_have_what_the_set_says_of_their_images(tmp_path: Path) -> None:
    prompts = ["x" * (n + 1) for n in range(60)]
    stream = stream_of(make_set(tmp_path, VERDICTS, prompts=prompts), prompt_dropout=0)
    for batch in batches_of(stream, 0):
        assert batch.desirable_B.tolist() == [VERDICTS[n] for n in numbers(batch)]
        assert batch.text_B.tensors["text"][:, 0].tolist() == [float(n + 1) for n in numbers(batch)]


def test_sizes_never_mix_and_are_drawn_by_how_many_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MOST_OF_A_SEGMENT", 12)
    sizes = [int(n >= 45) for n in range(60)]
    stream = stream_of(make_set(tmp_path, VERDICTS, sizes), steps=40)
    shapes = Counter[tuple[int, ...]]()
    for index in range(5):
        for batch in batches_of(stream, index):
            assert len({sizes[n] for n in numbers(batch)}) == 1
            shapes[tuple(batch.clean_BCHW.shape)] += 1
    assert set(shapes) == {(4, 4, 2, 2), (4, 4, 2, 3)}
    assert 0.6 < shapes[4, 4, 2, 2] / 200 < 0.9


@pytest.mark.parametrize("ranks", [1, 2])
def test_for_samples_that_are_left_out_others_of_their_class_and_size_come(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MOST_OF_A_SEGMENT", 8)
    sizes = [n % 2 for n in range(60)]
    stream = stream_of(make_set(tmp_path, VERDICTS, sizes), on_nonfinite="leave_out", steps=8)
    kinds = [(sizes[n], VERDICTS[n]) for n in range(60)]
    ledgers = []
    for rank in range(ranks):
        batches, plan = batches_of(stream, 0, rank, ranks), stream.interval(0)
        whole = plan.rows[plan.plan_SG]
        given: list[Batch] = []
        for batch in batches:
            given.append(batch)
            if len(given) == 2:
                batches.leave_out(NotFiniteError("loss", samples=[1]))
        assert len(given) == 9  # one was not trained on
        gone = {whole[1, 1]}
        assert {plan.rows[n] for n in batches.left_out} == gone
        trained = [given[0], *given[2:]]
        for step, batch in enumerate(trained):
            share = whole[step][rank * 4 // ranks : (rank + 1) * 4 // ranks].tolist()
            assert not gone & set(numbers(batch))
            assert [kinds[n] for n in numbers(batch)] == [kinds[n] for n in share]
        ledgers.append((batches.draws_N.tolist(), [numbers(batch) for batch in trained]))
    assert all(draws == ledgers[0][0] for draws, _ in ledgers)
    counts = Counter(n for _, shares in ledgers for share in shares for n in share)
    plan = stream.interval(0)
    assert ledgers[0][0] == [counts[n] for n in plan.rows.tolist()]


def test_a_step_that_is_given_up_names_images_of_the_interval(tmp_path: Path) -> None:
    stream = stream_of(make_set(tmp_path, VERDICTS))
    batches, interval = batches_of(stream, 0), stream.interval(0)
    steps = iter(batches)
    next(steps)
    bad = numbers(next(steps))[2]
    with pytest.raises(NotFiniteError) as told:
        batches.leave_out(NotFiniteError("loss", samples=[2]))
    assert told.value.step == 1
    assert interval.rows[told.value.samples].tolist() == [bad]
    steps.close()  # type: ignore[attr-defined]


def test_pairs_are_of_one_prompt_and_size(tmp_path: Path) -> None:
    prompts, sizes = [f"prompt {n // 4}" for n in range(60)], [n // 2 % 2 for n in range(60)]
    verdicts = [n % 2 == 0 for n in range(60)]
    stream = stream_of(make_set(tmp_path, verdicts, sizes, prompts), objective={"kind": "dpo"})
    seen = Counter[str]()
    for index in range(6):
        for batch in batches_of(stream, index):
            for better, worse in zip(numbers(batch)[::2], numbers(batch)[1::2], strict=True):
                assert verdicts[better]
                assert not verdicts[worse]
                assert prompts[better] == prompts[worse]
                assert sizes[better] == sizes[worse]
                seen[prompts[better]] += 1
    assert len(seen) == 15
    assert max(seen.values()) - min(seen.values()) <= 4  # two sizes, each in passes


@pytest.mark.parametrize(
    ("objective", "verdicts", "why"),
    [
        ({}, [True] * 4, "needs both .* 4 desirable and 0 undesirable"),
        ({"kind": "sft"}, [False] * 4, "needs desirable images"),
        ({"kind": "dpo"}, [True, False] * 2, "no prompt has both"),
    ],
)
def test_what_the_data_lacks_is_said(tmp_path: Path, objective: dict[str, Any], verdicts: list[bool], why: str) -> None:
    prepared = make_set(tmp_path, verdicts)
    with pytest.raises(ValueError, match=why):
        stream_of(prepared, objective=objective)


def test_one_class_is_enough_for_who_learns_from_one(tmp_path: Path) -> None:
    order = drawn(stream_of(make_set(tmp_path, VERDICTS), objective={"kind": "sft"}), 4)
    assert all(VERDICTS[n] for n in order)


def test_a_changed_table_is_refused(tmp_path: Path) -> None:
    prepared = make_set(tmp_path, VERDICTS)
    data = prepared.storage.read("samples.parquet")
    prepared.storage.write("samples.parquet", data[:-1] + b"?")
    with pytest.raises(ValueError, match=r"samples\.parquet has changed"):
        _ = PreparedSet(prepared.folder, "set").table


def test_what_training_reads_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """An interval of five steps opens the shards of what it draws, whatever else there is."""
    small, large = (make_set(tmp_path / str(count), [n % 2 == 0 for n in range(count)]) for count in (80, 800))
    reads = []
    for prepared in (small, large):
        stream = stream_of(prepared)
        _ = prepared.table
        with counted() as read:
            list(batches_of(stream, 0))
        reads.append(read.files_read)
    assert reads[1] <= reads[0] + 2
