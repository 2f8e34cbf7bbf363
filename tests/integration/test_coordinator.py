"""The coordinator as an actor whose process is killed: nobody who waits in it notices; on a Ray of its own."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from kto_ray.train.coordinator import GaveUp, RoundTask, TrainingReport, start_coordinator

PATIENCE_S = 120
REPORT = TrainingReport(1, {"loss": 0.5}, {f"round-00000-{place:030}": 1 for place in range(10_000)})


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def coordinator() -> Iterator[Any]:
    actor = start_coordinator()
    yield actor
    ray.kill(actor)


def processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::Coordinator" in " ".join(process.cmdline()):
                found.append(process)
    return found


async def kill(coordinator: Any) -> None:
    """The process, not the actor; returns when Ray has started it again."""
    await coordinator.progress.remote()
    (before,) = processes()
    before.kill()
    await coordinator.progress.remote()
    assert before not in processes()


async def within(reference: Any) -> Any:
    return await asyncio.wait_for(reference, PATIENCE_S)


async def settled(*references: Any) -> None:
    """Wait a moment; none of these is answered by then."""
    done, _ = ray.wait(list(references), timeout=0.3)
    assert not done


async def test_a_round_that_is_waited_for_is_handed_over_again(coordinator: Any) -> None:
    report = coordinator.train.remote(RoundTask(0))
    await settled(report)
    await kill(coordinator)
    for _ in range(2):  # ranks
        assert await within(coordinator.next_round.remote(0)) == RoundTask(0)
    await kill(coordinator)  # while the workers train
    following = coordinator.next_round.remote(1, REPORT)
    assert await within(report) == REPORT
    await kill(coordinator)
    coordinator.train.remote(RoundTask(1, train=False))
    assert await within(following) == RoundTask(1, train=False)


async def test_a_report_that_nobody_has_fetched_is_given_again(coordinator: Any) -> None:
    following = coordinator.next_round.remote(1, REPORT)
    await settled(following)
    await kill(coordinator)
    assert await within(coordinator.train.remote(RoundTask(0))) == REPORT
    await within(coordinator.wait_workers.remote())


async def test_that_the_workers_give_up_is_said_again(coordinator: Any) -> None:
    giving_up = coordinator.give_up.remote("the disk is full")
    await settled(giving_up)
    await kill(coordinator)
    assert await within(coordinator.train.remote(RoundTask(0))) == GaveUp("the disk is full")
    await within(giving_up)


async def test_that_there_is_no_more_is_said_again(coordinator: Any) -> None:
    following = coordinator.next_round.remote(1, REPORT)
    assert await within(coordinator.train.remote(RoundTask(0))) == REPORT
    coordinator.close.remote()
    assert await within(following) is None
    await kill(coordinator)
    assert await within(coordinator.next_round.remote(1)) is None  # a rank that had no answer yet


async def test_it_lives_with_the_driver(coordinator: Any) -> None:
    await coordinator.progress.remote()
    actor: Any = ray.get_runtime_context()
    node = ray._private.state.actors(coordinator._actor_id.hex())["Address"]["NodeID"]
    assert node == actor.get_node_id()
