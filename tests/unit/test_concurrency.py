"""Things that run side by side: what ends them, and which of several errors is said."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest

from kto_ray.concurrency import Gathering, as_done, foremost, together
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


# -- what is gathered while something slow runs -----------------------------------------------------------------------


class Disk:
    """Writes words, slowly: each call waits for its turn, and is remembered."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.begun, self.turn = threading.Semaphore(0), threading.Semaphore(0)
        self.errors: list[Exception | None] = []  # of the next calls
        self.running = self.most = 0
        self.threads: set[threading.Thread] = set()

    def write(self, words: Sequence[str]) -> list[str]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.threads.add(threading.current_thread())
        self.calls.append(list(words))
        self.begun.release()
        assert self.turn.acquire(timeout=60)
        self.running -= 1
        if self.errors and (error := self.errors.pop(0)):
            raise error
        return [word.upper() for word in words]

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=60)

    def go(self, times: int = 100) -> None:
        self.turn.release(times)


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.go()


async def begin(store: Gathering[str, str], *words: str) -> "asyncio.Task[Sequence[str]]":
    """Ask for them to be written; returns once they wait for that."""
    task = asyncio.ensure_future(store(words))
    await asyncio.sleep(0)
    return task


async def busy(store: Gathering[str, str], disk: Disk) -> "list[asyncio.Task[Sequence[str]]]":
    """ "a" is being written while "b", "c" and "d" wait."""
    tasks = [await begin(store, "a")]
    await disk.has_begun()
    return [*tasks, await begin(store, "b"), await begin(store, "c", "d")]


async def test_what_comes_meanwhile_goes_into_one_call_and_each_gets_what_is_his(disk: Disk) -> None:
    store = Gathering(disk.write)
    tasks = await busy(store, disk)
    disk.go()
    assert [await task for task in tasks] == [["A"], ["B"], ["C", "D"]]
    assert disk.calls == [["a"], ["b", "c", "d"]]
    assert await store(["e"]) == ["E"]
    assert disk.calls[2:] == [["e"]]
    assert disk.most == 1
    assert threading.main_thread() not in disk.threads


async def test_nothing_is_written_for_nothing(disk: Disk) -> None:
    assert await Gathering(disk.write)([]) == []
    assert disk.calls == []


async def test_who_waits_for_nothing_gets_it_among_others(disk: Disk) -> None:
    store = Gathering(disk.write)
    first = await begin(store, "a")
    await disk.has_begun()
    nothing, other = await begin(store), await begin(store, "b")
    disk.go()
    assert [await task for task in (first, nothing, other)] == [["A"], [], ["B"]]


async def test_an_error_is_everybody_s_who_waits_for_that_call(disk: Disk) -> None:
    store, full = Gathering(disk.write), UserError("no room")
    disk.errors = [None, full, full]
    tasks = await busy(store, disk)
    disk.go()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers == [["A"], full, full]
    disk.errors.clear()
    assert await store(["e"]) == ["E"]


async def test_after_an_error_nobody_is_told_what_was_not_written(disk: Disk) -> None:
    """One call fails and the next does not: whoever is given something, it was written."""
    store, full = Gathering(disk.write), UserError("no room")
    disk.errors = [full]
    tasks = await busy(store, disk)
    disk.go()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers == [full, ["B"], ["C", "D"]]
    assert disk.calls[0] == ["a"]
    assert {word for call in disk.calls[1:] for word in call} == {"b", "c", "d"}
    assert await store(["a"]) == ["A"]


@pytest.mark.parametrize("given_up", [0, 1, 2])
async def test_who_gives_up_loses_nobody_else_s(disk: Disk, given_up: int) -> None:
    """Whether it is being written, or waits first or last."""
    store = Gathering(disk.write)
    tasks = await busy(store, disk)
    tasks[given_up].cancel()
    await asyncio.wait([tasks[given_up]])
    assert tasks[given_up].cancelled()
    tasks.append(await begin(store, "e"))
    disk.go()
    expected = [["A"], ["B"], ["C", "D"], ["E"]]
    for place, task in enumerate(tasks):
        if place != given_up:
            assert await task == expected[place]
    assert await store(["f"]) == ["F"]


async def test_nobody_is_written_beside_another_also_when_one_gave_up() -> None:
    writing, most, go_on = [0], [0], threading.Event()

    def write(items: list[int]) -> list[int]:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        assert go_on.wait(60)
        writing[0] -= 1
        return items

    gather = Gathering(write)
    first = asyncio.create_task(gather([1]))
    while not writing[0]:
        await asyncio.sleep(0.001)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(gather([2]))
    await asyncio.sleep(0.05)  # time enough to begin beside the first
    go_on.set()
    assert await second == [2]
    assert most == [1]


async def test_whoever_settles_waits_for_what_nobody_waits_for_any_more_and_hears_of_its_error(disk: Disk) -> None:
    store = Gathering(disk.write)
    tasks = await busy(store, disk)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    settling = asyncio.create_task(store.settle())
    await asyncio.sleep(0)
    assert not settling.done()
    disk.go()
    await settling
    assert disk.calls == [["a"], ["b", "c", "d"]]

    def refuse(_: list[str]) -> list[str]:
        raise UserError("no room")

    refused = Gathering(refuse)
    task = await begin(refused, "e")
    task.cancel()
    with pytest.raises(UserError, match="no room"):
        await refused.settle()


async def test_what_was_given_is_not_kept_until_the_end() -> None:
    class Given:
        pass

    go_on, given = asyncio.Event(), list[weakref.ref[Given]]()

    async def make(last: bool) -> Given:
        if last:
            await go_on.wait()
        made = Given()
        given.append(weakref.ref(made))
        return made

    async with contextlib.aclosing(as_done(make(last) for last in (False, False, True))) as all_of_them:
        for _ in range(2):
            await anext(all_of_them)
        gc.collect()
        assert [one() for one in given] == [None, None]
        go_on.set()
        await anext(all_of_them)
