"""Numbers that are not finite: the step is not taken, on no rank, and who is to blame is known by name."""

import asyncio
import copy
import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from kto_ray.errors import UserError
from kto_ray.storage import Storage
from kto_ray.train.batches import RoundBatches, RoundData
from kto_ray.train.coordinator import Coordinator, GaveUp, RoundTask, TrainingReport
from kto_ray.train.finite import NotFiniteError
from kto_ray.train.learner import Learner
from kto_ray.train.worker import commit_checkpoint, not_finite_sentence
from tests.unit.test_learner import latents, make_learner, make_round

RUINED = (3, 11)
VALUES = {"nan": np.nan, "infinity": np.inf, "overflow": 1e30}
"""The last is finite by itself, but its square is not."""


def ruined_round(value: float = np.nan, index: int = 0) -> RoundData:
    data = make_round(index)
    for sample in RUINED:
        latents(data)[sample, 0, 0, 0] = value
    return data


def train(learner: Learner, data: RoundData) -> tuple[dict[str, float], list[int], list[int]]:
    """Figures, draws, and samples that were left out."""
    left_out: list[int] = []
    figures, draws_N = learner.train_round(data, on_left_out=left_out.extend)
    return figures, draws_N.tolist(), left_out


def moments(learner: Learner) -> list[torch.Tensor]:
    state = learner.optimizer.state_dict()["state"]
    return [value for entry in state.values() for value in entry.values()]


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize("reference_point", ["batch_kl", "noise_mean"])
def test_the_step_is_not_taken_and_names_the_samples_to_blame(
    tiny_sd1_folder: Path, value: float, micro_batch: int, reference_point: str
) -> None:
    settings: dict[str, Any] = {"global_batch": 16, "micro_batch": micro_batch, "gamma": 0.5}
    settings |= {"reference_point": reference_point}
    learner = make_learner(tiny_sd1_folder, **settings)
    learner.train_round(make_round(1))
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(NotFiniteError) as caught:
        learner.train_round(ruined_round(value))
    assert (caught.value.step, caught.value.what) == (0, "denoising error")
    assert set(caught.value.samples) == set(RUINED) & set(caught.value.drawn) != set()
    assert learner.policy.proves(before["policy"])
    after = learner.state_dict()
    assert after["scheduler"] == before["scheduler"]
    for name, entry in before["optimizer"]["state"].items():
        assert all(torch.equal(entry[key], after["optimizer"]["state"][name][key]) for key in entry)
    # And what comes next is as if nothing had been tried.
    undisturbed = make_learner(tiny_sd1_folder, **settings)
    undisturbed.load_state_dict(before)
    assert learner.train_round(make_round(2))[0] == undisturbed.train_round(make_round(2))[0]


def test_or_the_samples_to_blame_are_left_out_of_the_round(tiny_sd1_folder: Path) -> None:
    learners = [make_learner(tiny_sd1_folder, on_nonfinite="leave_out", epochs=2) for _ in range(2)]
    (figures, draws, left_out), again = (train(learner, ruined_round()) for learner in learners)
    assert left_out == list(RUINED)
    assert figures["left_out"] == 2
    assert [draws[sample] for sample in RUINED] == [0, 0]
    assert sum(draws) == 4 * 8
    assert np.isfinite(list(figures.values())).all()
    assert all(
        bool(value.isfinite().all()) for value in [*learners[0].policy.tensors().values(), *moments(learners[0])]
    )
    assert again == (figures, draws, left_out)
    assert learners[0].policy.proves(learners[1].policy.tensors())


def test_nobody_is_left_out_of_a_sound_round(tiny_sd1_folder: Path) -> None:
    strict, lenient = (make_learner(tiny_sd1_folder, on_nonfinite=choice) for choice in ("stop", "leave_out"))
    assert train(strict, make_round()) == train(lenient, make_round())
    assert strict.policy.proves(lenient.policy.tensors())


def test_a_round_of_which_nothing_is_left_stops(tiny_sd1_folder: Path) -> None:
    data = make_round()
    latents(data)[:] = np.nan
    with pytest.raises(NotFiniteError):
        train(make_learner(tiny_sd1_folder, on_nonfinite="leave_out"), data)


def test_a_gradient_that_no_single_sample_spoils_stops_whatever_is_wanted(tiny_sd1_folder: Path) -> None:
    learner = make_learner(tiny_sd1_folder, on_nonfinite="leave_out")
    learner.policy.parameters()[0].register_hook(lambda gradient: gradient * float("inf"))
    before = learner.policy.tensors()
    with pytest.raises(NotFiniteError) as caught:
        train(learner, make_round())
    assert (caught.value.what, caught.value.step, caught.value.samples) == ("gradient norm", 0, [])
    assert caught.value.drawn
    assert learner.policy.proves(before)


def test_ruined_weights_are_found_before_and_after_the_steps(tiny_sd1_folder: Path) -> None:
    learner = make_learner(tiny_sd1_folder, on_nonfinite="leave_out")

    def ruin(step: int, steps: int) -> None:
        if step == steps:
            with torch.no_grad():
                learner.policy.parameters()[0].fill_(torch.nan)

    for data in (make_round(0), make_round(1)):
        with pytest.raises(NotFiniteError, match="weights") as caught:
            learner.train_round(data, ruin)
        assert caught.value.step is None


def ruin_on_rank(rank: int, ranks: int, folder: Path, scratch: Path) -> None:
    """What a worker process does: the same ruined round with both choices."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/init", rank=rank, world_size=ranks)
    settings: dict[str, Any] = {"wrap": DistributedDataParallel, "rank": rank, "ranks": ranks, "micro_batch": 4}
    strict = make_learner(folder, **settings)
    before = strict.policy.tensors()
    with pytest.raises(NotFiniteError) as caught:
        # The sample lies on one rank only.
        strict.train_round(ruined_round())
    lenient = make_learner(folder, on_nonfinite="leave_out", **settings)
    _, draws, left_out = train(lenient, ruined_round())
    outcome = {
        "error": (caught.value.what, caught.value.step, caught.value.samples, caught.value.drawn),
        "finite": all(bool(tensor.isfinite().all()) for tensor in strict.policy.tensors().values()),
        "untouched": caught.value.step != 0 or strict.policy.proves(before),
        "draws": draws,
        "left_out": left_out,
        "weights": lenient.policy.tensors(),
    }
    torch.save(outcome, scratch / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_ranks_raise_and_leave_out_alike(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    arguments = (2, tiny_sd1_folder, tmp_path)
    torch.multiprocessing.spawn(ruin_on_rank, arguments, nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    weights = [outcome.pop("weights") for outcome in (first, second)]
    assert first == second
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert first["finite"]
    assert first["untouched"]
    what, _, samples, drawn = first["error"]
    assert what == "denoising error"
    assert set(samples) == set(RUINED) & set(drawn) != set()
    assert set(first["left_out"]) <= set(RUINED)
    assert [first["draws"][sample] for sample in first["left_out"]] == [0] * len(first["left_out"])


def test_the_sentence_names_round_step_samples_and_what_to_change() -> None:
    run, ids = Storage("/runs/demo"), [f"round-00003-{place:02}" for place in range(40)]
    said = not_finite_sentence(NotFiniteError("denoising error", 5, [7, 2], range(8)), 3, ids, run)
    assert "round 3, step 5: the denoising error is not finite" in said
    assert "policy 3 is the last good one" in said
    assert "round-00003-02, round-00003-07. Give the same command with train.on_nonfinite=leave_out" in said
    nobody = not_finite_sentence(NotFiniteError("gradient norm", 0, [], range(30)), 3, ids, run)
    assert "No single sample is to blame" in nobody
    assert "round-00003-19 and 10 more" in nobody
    assert "kto-ray rewind /runs/demo --to 3 train.learning_rate=" in nobody
    assert "kto-ray rewind /runs/demo" in not_finite_sentence(NotFiniteError("weights"), 3, ids, run)


# What a restart would find again


@pytest.mark.parametrize("where", ["torch.save", "ray.train.report"])
def test_a_disk_that_is_full_is_a_sentence(
    tiny_sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(where, full)
    report = TrainingReport(1, {}, {})
    with pytest.raises(UserError, match=r"checkpoint of policy 1 .*No space left on device"):
        commit_checkpoint(make_learner(tiny_sd1_folder), 1, report, Storage(str(tmp_path)))


async def test_the_first_reason_to_give_up_ends_every_wait() -> None:
    coordinator = Coordinator()
    waits = [asyncio.create_task(coordinator.train(RoundTask(0))), asyncio.create_task(coordinator.wait_workers())]
    for why in ("the disk is full", "something else"):
        await asyncio.wait_for(coordinator.give_up(why), 60)
    assert (await asyncio.wait_for(asyncio.gather(*waits), 60))[0] == GaveUp("the disk is full")


def test_all_of_a_round_s_prompts_never_go_through_the_text_encoder_at_once(
    tiny_sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(tiny_sd1_folder)
    encode, sizes = learner.family.encode_prompts, list[int]()

    def spy(texts: Sequence[str]) -> Any:
        sizes.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(learner.family, "encode_prompts", spy)
    data = make_round(samples=100)
    many = replace(data, prompts=[f"a red circle {place}" for place in range(100)])
    batches = RoundBatches(many, learner.config, learner.family, learner.texts, 0, torch.device("cpu"))
    assert sum(sizes) == 101
    assert max(sizes) <= 48
    for name, tensor_PX in encode(["", *sorted(many.prompts)]).tensors.items():
        torch.testing.assert_close(batches.text_P.tensors[name], tensor_PX)
