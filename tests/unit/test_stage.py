"""Turns on the machines: who is on stage, and who is told of it when."""

import asyncio

import pytest

from kto_ray.stage import Role, Stage


async def test_listeners_hear_of_a_change_before_a_turn_begins() -> None:
    heard: list[frozenset[Role]] = []

    async def listen(roles: frozenset[Role]) -> None:
        await asyncio.sleep(0)
        heard.append(roles)

    stage = Stage([listen])
    async with stage.turn("making"):
        assert heard == [{"making"}]
        async with stage.turn("making"), stage.turn("training"):
            assert stage.roles == heard[-1] == {"making", "training"}
        assert stage.roles == heard[-1] == {"making"}
    assert heard[-1] == stage.roles == frozenset()
    assert len(heard) == 4  # a second turn of the same role changes nothing


async def test_changes_follow_each_other() -> None:
    inside = 0

    async def listen(_roles: frozenset[Role]) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        await asyncio.sleep(0.01)
        inside -= 1

    stage = Stage([listen])

    async def turn(role: Role) -> None:
        async with stage.turn(role):
            await asyncio.sleep(0.01)

    await asyncio.gather(turn("making"), turn("training"), turn("evaluating"))
    assert not stage.roles


async def test_who_is_refused_has_no_turn() -> None:
    async def refuse(roles: frozenset[Role]) -> None:
        if "training" in roles:
            raise RuntimeError("no room")

    stage = Stage([refuse])
    with pytest.raises(RuntimeError, match="no room"):
        async with stage.turn("training"):
            pytest.fail("the turn began")
    assert not stage.roles
    async with stage.turn("making"):
        assert stage.roles == {"making"}


async def test_who_shares_cards_by_turns_waits_for_the_other() -> None:
    stage, order = Stage(apart=True), list[str]()

    async def turn(role: Role, enough: asyncio.Event) -> None:
        async with stage.turn(role):
            order.append(role)
            await enough.wait()
        order.append(f"{role} is over")

    drawn, trained = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(turn("making", drawn))
        group.create_task(turn("evaluating", drawn))
        await asyncio.sleep(0)
        group.create_task(turn("training", trained))
        async with stage.turn("judging"):  # people need no card
            await asyncio.sleep(0.01)
            assert order == ["making", "evaluating"]
        drawn.set()
        await asyncio.sleep(0.01)
        assert stage.roles == {"training"}
        group.create_task(turn("making", drawn))
        await asyncio.sleep(0.01)
        assert stage.roles == {"training"}
        trained.set()
    assert order[-2:] == ["making", "making is over"]
    assert not stage.roles
