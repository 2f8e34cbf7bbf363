"""The driver's side of training, with a coordinator of this process and a Ray Train that does what it is told."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.storage import Storage
from kto_ray.train import job
from kto_ray.train.coordinator import Coordinator, RoundTask, TrainingReport
from kto_ray.train.job import Training
from kto_ray.train.moving import TakenAway
from kto_ray.train.watching import Watching


class Remote:
    """A coordinator that is called as an actor is."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.coordinator, name)

        class Method:
            remote = staticmethod(lambda *arguments: asyncio.create_task(method(*arguments)))

        return Method


class Trainer:
    """Its `fit` lasts until it is told how it ends."""

    def __init__(self, *_: Any, torch_config: TorchConfig, **__: Any) -> None:
        self.told, self.outcome, self.torch_config = threading.Event(), None, torch_config

    def fit(self) -> Any:
        self.told.wait()
        if self.outcome:
            raise self.outcome
        return "done"

    def end(self, error: Exception | None = None) -> None:
        self.outcome = error
        self.told.set()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    trainers = []

    def make(train: dict[str, Any] | None = None, **cluster: Any) -> tuple[Training, Coordinator, Any]:
        coordinator = Coordinator()
        monkeypatch.setattr(job, "start_coordinator", lambda: Remote(coordinator))
        monkeypatch.setattr(job, "TorchTrainer", Trainer)
        monkeypatch.setattr("ray.cancel", lambda task: task.cancel())
        monkeypatch.setattr("kto_ray.cluster.missing_resources", lambda *_: "2 GPU asked for")
        config = RunConfig.model_validate({"cluster": cluster, "train": train or {}})
        training = Training(config, Storage("memory://run"))
        training.start()
        trainers.append(training._trainer)
        return training, coordinator, training._trainer

    yield make
    for trainer in trainers:
        trainer.end()


async def worker(coordinator: Coordinator, version: int = 0) -> None:
    """Reports each round with its next question."""
    report = None
    while (task := await coordinator.next_round(version, report)) is not None:
        version = task.round_index + 1
        report = TrainingReport(version, {}, {})


@pytest.mark.parametrize(
    ("device", "gpus", "backend"), [("cpu", 1, "gloo"), ("auto", 0, "gloo"), ("auto", 1, None), ("cuda", 1, None)]
)
async def test_workers_that_compute_on_the_cpu_talk_by_gloo_whatever_they_ask_for(
    make: Any, device: str, gpus: int, backend: str | None
) -> None:
    _, _, trainer = make({"device": device, "resources": {"num_gpus": gpus}})
    assert trainer.torch_config.backend == backend  # None: what Ray Train takes for a GPU


async def test_many_rounds_leave_nothing_behind(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    training, coordinator, trainer = make()
    working = asyncio.create_task(worker(coordinator))
    for index in range(200):
        assert (await training.train(RoundTask(index))).version == index + 1
    assert len(asyncio.all_tasks()) < 5
    trainer.end(RuntimeError("of Ray Train"))
    await asyncio.wait([training._ended])
    working.cancel()
    del training
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_what_ends_the_workers_ends_the_wait_for_them(make: Any) -> None:
    training, _, trainer = make()
    waiting = asyncio.create_task(training.train(RoundTask(0)))
    await asyncio.sleep(0)
    trainer.end(RuntimeError("max_failures"))
    with pytest.raises(RuntimeError, match="max_failures"):
        await waiting
    with pytest.raises(RuntimeError, match="max_failures"):
        await training.train(RoundTask(1))


async def test_workers_that_end_in_the_middle_are_an_error(make: Any) -> None:
    training, _, trainer = make()
    trainer.end()
    with pytest.raises(RuntimeError, match="ended although the run goes on"):
        await training.train(RoundTask(0))


async def test_workers_that_give_up_end_the_run_with_their_sentence(make: Any) -> None:
    training, coordinator, trainer = make()
    ranks = [asyncio.create_task(coordinator.give_up(why)) for why in ("the disk is full", "of another rank")]
    await asyncio.sleep(0)
    assert not any(rank.done() for rank in ranks)  # the coordinator may yet be started again
    training_ends = asyncio.create_task(training.train(RoundTask(0)))
    await asyncio.gather(*ranks)
    assert not training_ends.done()  # Ray must not be shut down while `fit()` comes out of it
    trainer.end()
    with pytest.raises(UserError, match="the disk is full"):
        await training_ends


async def test_closing_lets_the_workers_end(make: Any) -> None:
    training, coordinator, trainer = make()
    working = asyncio.create_task(worker(coordinator))
    await training.train(RoundTask(0))
    closing = asyncio.create_task(training.close())
    await working
    assert not closing.done()
    trainer.end()
    await closing


async def test_a_failure_is_said_once_whenever_it_comes(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also of workers that never asked for a round, and while no round is waited for."""
    training, coordinator, _ = make()
    watching = Watching(Remote(coordinator))
    watching.after_exception(None, {0: RuntimeError("at the start")})
    for index, word in enumerate(("while waiting", "again")):
        waiting = asyncio.create_task(training.train(RoundTask(index)))
        await asyncio.sleep(0.01)
        watching.after_exception(None, {0: RuntimeError(word)})
        while word not in caplog.text:
            await asyncio.sleep(0.01)
        working = asyncio.create_task(worker(coordinator, index))
        await waiting
        working.cancel()
    said = [record.args[0] for record in caplog.records if "the train workers failed" in record.getMessage()]
    assert said == ["rank 0: at the start", "rank 0: while waiting", "rank 0: again"]


async def test_workers_that_are_taken_away_have_not_failed(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Ray Train tells of them until all have ended, and another one may have failed because they were gone."""
    training, coordinator, _ = make()
    watching = Watching(Remote(coordinator))
    waiting = asyncio.create_task(training.train(RoundTask(0)))
    for error in (TakenAway("the node of rank 1 goes"), RayActorError(None, "taken along", False, True)):
        for _ in range(3):
            watching.after_exception(None, {0: RuntimeError("connection reset"), 1: error})
        while str(error) not in caplog.text:
            await asyncio.sleep(0.01)
    assert caplog.text.count("the train workers move, from the last checkpoint: the node of rank 1 goes") == 1
    assert "failed" not in caplog.text
    working = asyncio.create_task(worker(coordinator))
    assert (await waiting).version == 1
    working.cancel()


async def test_the_wait_after_a_failure_is_not_silent(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    training, coordinator, _ = make(wait_s=0.05)
    first = asyncio.create_task(coordinator.next_round(0))
    waiting = asyncio.create_task(training.train(RoundTask(0)))
    await first
    assert "still waiting" not in caplog.text
    Watching(Remote(coordinator)).after_exception(None, {1: ValueError("later"), 0: RuntimeError("pages\nnode 7 went")})
    while "still waiting for train workers after 0 s: 2 GPU asked for" not in caplog.text:
        await asyncio.sleep(0.01)
    assert "the train workers failed (rank 0: node 7 went); they start again from the last checkpoint" in caplog.text
    working = asyncio.create_task(worker(coordinator))
    assert (await waiting).version == 1
    working.cancel()
