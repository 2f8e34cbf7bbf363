"""Who sleeps, and who comes and goes, when the stage changes hands."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RayServeException

from kto_ray import turns
from kto_ray.config import from_tree
from kto_ray.placement import as_configured
from kto_ray.stage import Stage
from kto_ray.turns import Breathing, Sharing, stage_of


class Generators:
    """Come after a while, unless they never do; and keep a list of what they were told."""

    came_s = 0.2

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[Any] = []
        self.error = error
        self.there, self.asked = 1, 0

    async def sleep(self) -> None:
        if self.error:
            raise self.error
        self.told.append("sleep")

    async def scale(self, replicas: int) -> None:
        if self.error and not replicas:
            raise self.error
        self.told.append(replicas)
        if replicas < self.there:
            self.there = replicas

    async def running(self) -> int:
        self.asked += 1
        return self.there


async def until(there: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not there():
            await asyncio.sleep(0.01)


async def test_who_draws_sleeps_while_others_train_and_while_people_judge() -> None:
    generators, scorers = Generators(), Generators()
    stage = Stage([Sharing([generators, scorers])], apart=True)
    async with stage.turn("evaluating"), stage.turn("making"):
        pass
    assert generators.told == []  # whoever draws wakes by drawing; between two turns nobody moves
    async with stage.turn("training"):
        assert generators.told == scorers.told == ["sleep"]
    async with stage.turn("judging"):
        assert generators.told == ["sleep", "sleep"]
        async with stage.turn("evaluating"):
            assert generators.told == ["sleep", "sleep"]


@pytest.mark.parametrize("error", [ActorDiedError(), RayServeException("gone"), None])
async def test_who_does_not_sleep_costs_no_run(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    generators, scorers = Generators(error), Generators()
    if error is None:
        monkeypatch.setattr(turns, "PATIENCE_S", 0)
        monkeypatch.setattr(generators, "sleep", asyncio.Event().wait)
    async with Stage([Sharing([generators, scorers])]).turn("training"):
        assert "generators" in caplog.text
        assert "the run goes on" in caplog.text


def breathing(generators: Generators, least: int = 0) -> tuple[Stage, Breathing, list[str]]:
    said: list[str] = []
    listener = Breathing(generators, least, 4, said.append)
    return Stage([listener]), listener, said


async def test_generators_go_once_training_is_known_to_take_longer_than_they_take_to_come_back() -> None:
    generators = Generators()
    stage, listener, said = breathing(generators)
    async with stage.turn("making"):
        assert generators.told == [4]
    async with stage.turn("training"):  # nobody knows how long
        assert generators.told == [4]
        await until(lambda: generators.told == [4, 0])
    assert said == []
    async with stage.turn("making"):
        assert generators.told == [4, 0, 4]
        await until(lambda: generators.asked)
        generators.there = 4
        await until(lambda: listener.back_s != generators.came_s)
    generators.came_s = 1000  # what is measured counts
    async with stage.turn("training"):
        await until(lambda: generators.told == [4, 0, 4, 0])
    assert "generators: 0 while nobody draws: training took 0." in said[0]
    async with stage.turn("training"):
        pass
    assert len(said) == 1
    await listener.close()


async def test_they_stay_where_training_is_over_before_they_would_be_back() -> None:
    generators = Generators()
    generators.came_s = 1000
    stage, listener, said = breathing(generators)
    for _ in range(3):
        async with stage.turn("making"):
            pass
        async with stage.turn("training"):
            await asyncio.sleep(0.02)
    assert generators.told == [4]
    assert not said
    await listener.close()


async def test_they_stay_while_somebody_draws_beside_the_training() -> None:
    generators = Generators()
    generators.came_s = 0
    stage, listener, _ = breathing(generators)
    async with stage.turn("making"), stage.turn("training"):
        await asyncio.sleep(0.05)
        assert generators.told == [4]
    await listener.close()


async def test_people_may_take_their_time() -> None:
    generators = Generators()
    generators.came_s = 0
    stage, listener, _ = breathing(generators, least=1)
    async with stage.turn("making"):
        pass
    async with stage.turn("judging"):
        await until(lambda: generators.told == [4, 1])
    await listener.close()


async def test_generators_that_cannot_be_let_go_stay_and_are_asked_for_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    generators = Generators(RayServeException("no controller"))
    generators.came_s = 0
    stage, listener, _ = breathing(generators)
    async with stage.turn("making"):
        pass
    async with stage.turn("training"):
        await until(lambda: "generators could not be let go" in caplog.text)
    async with stage.turn("making"):
        assert generators.told == [4]
    await listener.close()


@pytest.mark.parametrize(
    ("placement", "listeners", "apart"), [("separate", 0, False), ("colocated", 1, True), ("elastic", 1, False)]
)
async def test_every_placement_has_its_stage(placement: Any, listeners: int, apart: bool) -> None:
    config = from_tree({"generate": {"images_per_round": 24, "batch_size": 8, "max_replicas": 10}})
    generators = Generators()
    stage = stage_of(config, as_configured(config, placement), generators, generators, print)
    assert (len(stage._listeners), stage._apart) == (listeners, apart)
    async with stage.turn("making"):
        assert generators.told == ([3] if placement == "elastic" else [])  # as many as have something to draw
