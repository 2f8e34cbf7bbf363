"""Things that run side by side: what ends them, and which of several errors is said."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest

from kto_ray.concurrency import as_done, foremost, together
from kto_ray.errors import UserError


class Endless:
    """Coroutines that never end by themselves, and whether each was ended."""

    def __init__(self) -> None:
        self.begun, self.ended = 0, 0

    async def run(self) -> int:
        self.begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.ended += 1
        return 0


async def after(event: asyncio.Event, value: int) -> int:
    await event.wait()
    return value


async def fail(error: Exception) -> int:
    raise error


async def test_answers_come_as_they_are_done() -> None:
    events = [asyncio.Event() for _ in range(3)]
    came = []
    async with contextlib.aclosing(as_done(after(event, place) for place, event in enumerate(events))) as answers:
        events[1].set()
        async for answer in answers:
            came.append(answer)
            for event in events[::-1]:
                if not event.is_set():
                    event.set()
                    break
    assert came == [1, 2, 0]


async def first_of(*coroutines: Coroutine[Any, Any, int], then: Exception | None = None) -> int:
    """The first answer; raises `then` in the middle of them, if any."""
    async with contextlib.aclosing(as_done(coroutines)) as answers:
        async for answer in answers:
            if then:
                raise then
            return answer
    raise AssertionError


async def test_an_error_of_one_ends_the_others_before_it_is_raised() -> None:
    endless = Endless()
    with pytest.raises(UserError, match="no"):
        await first_of(endless.run(), endless.run(), fail(UserError("no")))
    assert (endless.begun, endless.ended) == (2, 2)


@pytest.mark.parametrize("then", [None, UserError("mine")])
async def test_what_is_left_is_ended_when_nobody_asks_for_it_any_more(then: UserError | None) -> None:
    endless, event = Endless(), asyncio.Event()
    event.set()
    with pytest.raises(UserError, match="mine") if then else contextlib.nullcontext():
        await first_of(endless.run(), after(event, 1), then=then)
    assert (endless.begun, endless.ended) == (1, 1)


async def test_nothing_is_begun_that_nobody_asks_for() -> None:
    endless = Endless()
    async with contextlib.aclosing(as_done(endless.run() for _ in range(2))):
        pass
    assert endless.begun == 0


async def side_by_side(*coroutines: Coroutine[Any, Any, int]) -> None:
    """The last one in the block, the others as tasks of it."""
    async with together() as group:
        for coroutine in coroutines[:-1]:
            group.create_task(coroutine)
        await asyncio.sleep(0)
        await coroutines[-1]


async def test_a_group_raises_the_one_error_and_ends_the_rest() -> None:
    endless, broken, cause = Endless(), ValueError("broken"), KeyError("why")
    broken.__cause__ = cause
    with pytest.raises(ValueError, match="broken") as raised:
        await side_by_side(endless.run(), fail(broken), endless.run())
    assert raised.value.__cause__ is cause
    assert endless.begun == endless.ended


def test_of_several_errors_it_is_the_user_s_and_the_others_are_noted() -> None:
    inner = ExceptionGroup("inner", [RuntimeError("two"), UserError("what to do")])
    said = foremost(ExceptionGroup("outer", [ValueError("one"), inner, UserError("and this")]))
    assert isinstance(said, UserError)
    assert (str(said), said.__notes__) == (
        "what to do",
        [
            "at the same time: RuntimeError: two",
            "at the same time: ValueError: one",
            "at the same time: UserError: and this",
        ],
    )


async def test_an_error_of_the_block_itself_is_raised_as_it_is() -> None:
    endless = Endless()
    with pytest.raises(UserError, match="mine"):
        await side_by_side(endless.run(), fail(UserError("mine")))
    assert (endless.begun, endless.ended) == (1, 1)


async def test_a_cancelled_group_is_cancelled() -> None:
    endless = Endless()

    task = asyncio.create_task(side_by_side(endless.run(), endless.run()))
    while endless.begun < 2:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert endless.ended == 2
