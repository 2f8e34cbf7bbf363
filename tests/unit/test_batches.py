"""Where batches come from: each rank reads the latents of its own share of a round, once, and nothing else."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kto_ray.config import RunConfig, Train, from_tree
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.texts import Texts
from kto_ray.records import PolicyRef, Sample, Score, Verdict
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.train.batches import Batch, LatentsInMemory, RoundBatches, RoundData
from kto_ray.train.coordinator import RoundTask
from kto_ray.train.finite import NotFiniteError
from kto_ray.train.worker import read_round
from tests.counting import counted
from tests.factories import make_samples, make_verdict

SAMPLES = 32
LATENT = 4 * 64 * 64 * 4  # bytes
FOOTERS = 2 * 2**17  # of the files of a round, in which it says what is in them


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


def make_round(store: RoundStore, index: int, verdicts: Sequence[Verdict] = ()) -> list[Sample]:
    """A sealed round with large latents in two parts; of its own samples all but the first three get a verdict."""
    round_, rng = store.round(index), np.random.default_rng(index)
    samples = [
        replace(sample, latents_CHW=rng.normal(size=(4, 64, 64)).astype(np.float32))
        for sample in make_samples(round_.stage, SAMPLES + 3, PolicyRef(index, "d" * 64))
    ]
    round_.add_samples(samples[:20])
    round_.add_samples(samples[20:])
    round_.add_verdicts([make_verdict(sample.id, place % 3 > 0) for place, sample in enumerate(samples[3:])])
    round_.add_verdicts(verdicts)
    round_.add_scores([Score(sample.id, "shapes", "1", index + rng.random(), None) for sample in samples])
    round_.seal()
    return samples


@pytest.fixture
def store(tmp_path: Path) -> RoundStore:
    return RoundStore(Storage(str(tmp_path)))


def stored_data(store: RoundStore, index: int = 0, lag: int = 0) -> RoundData:
    _, data = read_round(store, RoundTask(index), index, RunConfig(max_policy_lag=lag))
    assert data is not None
    return data


def batches_of(data: RoundData, rank: int = 0, ranks: int = 1, **train: Any) -> RoundBatches:
    config = Train(**({"global_batch": 8, "epochs": 1} | train))
    return RoundBatches(data, config, FAMILY, Texts(lambda: FAMILY), 5, torch.device("cpu"), rank=rank, ranks=ranks)


def latents_of(samples: Sequence[Sample]) -> npt.NDArray[np.float32]:
    return np.stack([sample.latents_CHW for sample in samples])


def places_of(batches: Sequence[Batch], latents_NCHW: npt.NDArray[np.float32]) -> list[int]:
    """Which of these latents were in the batches."""
    places = {latents_CHW.tobytes(): place for place, latents_CHW in enumerate(latents_NCHW)}
    return [places[clean_CHW.numpy().tobytes()] for batch in batches for clean_CHW in batch.clean_BCHW]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_reads_the_latents_of_its_share_and_nothing_else(store: RoundStore, ranks: int) -> None:
    trained = latents_of(make_round(store, 0)[3:])
    seen: list[int] = []
    for rank in range(ranks):
        data = stored_data(store)
        with counted() as read:
            batches = batches_of(data, rank, ranks)
            drawn = places_of(list(batches), trained)
        assert len(drawn) == SAMPLES / ranks
        own = len(set(drawn)) * LATENT
        assert own <= read.read < 1.1 * own + FOOTERS
        with counted() as again:
            assert places_of(list(batches), trained) == drawn
        assert again.files_read == 0
        seen += drawn
    assert np.bincount(seen, minlength=SAMPLES).tolist() == batches.draws_N.tolist()


def test_a_worker_reads_no_latents_before_it_knows_its_share(store: RoundStore) -> None:
    make_round(store, 0)
    with counted() as read:
        stored_data(store)
    assert read.read < LATENT


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_stored_latents_train_as_those_in_memory(store: RoundStore, rank: int, ranks: int) -> None:
    """To the last bit, and also after samples were left out, for which others come in."""
    samples = make_round(store, 0)
    stored = stored_data(store)
    memory = replace(stored, latents=LatentsInMemory(latents_of(samples[3:])))
    given = []
    for data in (stored, memory):
        batches, taken = batches_of(data, rank, ranks, on_nonfinite="leave_out"), []
        for batch in batches:
            taken.append(batch)
            if len(taken) in (1, 3):
                batches.leave_out(NotFiniteError("loss", samples=[0, 5]))
        assert len(batches.left_out) == 4
        given.append((taken, batches.draws_N.tolist()))
    (ours, our_draws), (theirs, their_draws) = given
    assert our_draws == their_draws
    assert len(ours) == len(theirs) == SAMPLES // 8 + 2
    for our, their in zip(ours, theirs, strict=True):
        for name in ("clean_BCHW", "noise_BCHW", "level_B", "desirable_B"):
            assert torch.equal(getattr(our, name), getattr(their, name))
        assert torch.equal(our.text_B.tensors["text"], their.text_B.tensors["text"])


def test_for_samples_that_are_left_out_only_others_are_read(store: RoundStore) -> None:
    trained = latents_of(make_round(store, 0)[3:])
    planned = set(places_of(list(batches_of(stored_data(store), 1, 4)), trained))
    batches = batches_of(stored_data(store), 1, 4, on_nonfinite="leave_out")
    taking = iter(batches)
    first = set(places_of([next(taking)], trained))
    with counted() as read:
        batches.leave_out(NotFiniteError("loss", samples=range(8)))
        later = set(places_of(list(taking), trained))
    assert first < planned
    assert not first & later
    new = len(later - planned) * LATENT
    assert 0 < new <= read.read < 1.1 * new + FOOTERS < len(later) * LATENT + FOOTERS


def test_samples_whose_verdict_came_late_are_read_from_their_own_round(store: RoundStore) -> None:
    early = make_round(store, 0)
    late = make_round(store, 1, verdicts=[make_verdict(sample.id) for sample in early[:2]])
    trained = latents_of([*early[:2], *late[3:]])
    batches = batches_of(stored_data(store, 1, lag=1), global_batch=2, epochs=2, gamma=0.7)
    assert {0, 1} < set(places_of(list(batches), trained))


def test_latents_that_have_changed_are_not_trained_on(store: RoundStore) -> None:
    make_round(store, 0)
    folder = store.round(0).storage
    for name in folder.names("latents"):
        data = bytearray(folder.read(f"latents/{name}"))
        data[len(data) // 2] ^= 1
        folder.write(f"latents/{name}", bytes(data))
    with pytest.raises(ValueError, match="changed since they were stored"):
        batches_of(stored_data(store))


@pytest.mark.parametrize("table", ["samples", "verdicts"])
def test_a_round_whose_tables_have_changed_is_not_trained_on(store: RoundStore, table: str) -> None:
    make_round(store, 0)
    folder = store.round(0).storage
    data = bytearray(folder.read(f"{table}.parquet"))
    data[len(data) // 2] ^= 1
    folder.write(f"{table}.parquet", bytes(data))
    with pytest.raises(ValueError, match=rf"{table}\.parquet has changed since the round was sealed"):
        stored_data(store)


def test_pairs_of_scores_read_the_scores_of_each_samples_own_round(store: RoundStore) -> None:
    """One scorer: its scores as they are; what was drawn a round earlier has its score there."""
    late = [make_verdict(sample.id, True) for sample in make_round(store, 0)[:3]]
    make_round(store, 1, late)
    said = {score.sample_id: score.value for index in range(2) for score in store.round(index).scores()}
    objective = {"kind": "dpo", "pairs": "scores"}
    config = from_tree({"max_policy_lag": 1, "generate": {"images_per_prompt": 4}, "train": {"objective": objective}})
    ids, data = read_round(store, RoundTask(1), 1, config)
    assert data is not None
    assert data.values_N is not None
    assert data.values_N.tolist() == [said[id_] for id_ in ids]
    assert set(ids) > {verdict.sample_id for verdict in late}
