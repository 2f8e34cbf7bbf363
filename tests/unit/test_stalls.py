"""The meter of the event loop's stalls: what keeps the loop from its turn is named, and nothing else."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from kto_ray import stalls
from kto_ray.errors import UserError
from kto_ray.stalls import UNKNOWN, Stall, StallMeter, stalls_said

LONG_S = 600.0
"""Longer than any machine takes to give a thread its turn."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the watching thread has looked at the loop's thread while that was in `hold_the_loop`."""
    seen, stack_of = threading.Event(), stalls._stack_of

    def looking(thread_id: int) -> str:
        stack = stack_of(thread_id)
        if hold_the_loop.__name__ in stack:
            seen.set()
        return stack

    monkeypatch.setattr(stalls, "_stack_of", looking)
    return seen


def hold_the_loop(until: threading.Event) -> None:
    """As reading a large file does, or hashing it."""
    while not until.is_set():
        time.sleep(0.2)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def test_what_holds_the_loop_is_named(seen: threading.Event) -> None:
    told: list[Stall] = []
    async with StallMeter(0.05, told.append) as meter:
        hold_the_loop(seen)
        await until(lambda: any("hold_the_loop" in stall.stack for stall in told))
    assert meter.stalls == len(told)
    assert meter.longest.seconds == max(stall.seconds for stall in told) > 0.05
    assert meter.longest_at_work.seconds == max(stall.seconds for stall in told if stall.at_work) > 0.05


async def test_an_idle_loop_has_no_stall() -> None:
    async with StallMeter(LONG_S) as meter:
        await until(lambda: meter.beats >= 10)
    assert (meter.stalls, meter.longest.stack) == (0, "")
    assert 0 < meter.longest.seconds < LONG_S


async def test_a_busy_thread_beside_the_loop_is_none(seen: threading.Event) -> None:
    beside = threading.Event()
    async with StallMeter(LONG_S) as meter:
        working = asyncio.create_task(asyncio.to_thread(hold_the_loop, beside))
        await until(lambda: meter.beats >= 10)
        beside.set()
        await working
    assert (meter.stalls, seen.is_set()) == (0, False)


def wait_idly(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def test_a_loop_that_has_nothing_in_hand_is_not_at_work_and_busy_threads_are_said() -> None:
    loop, until = asyncio.new_event_loop(), threading.Event()
    idle = threading.Thread(target=wait_idly, args=[loop])
    busy = threading.Thread(target=hold_the_loop, args=[until], name="busy")
    for thread in (idle, busy):
        thread.start()
    try:
        while not ("in select" in (stack := stalls._stack_of(idle.ident or 0)) and "thread busy: " in stack):
            time.sleep(0.001)
        assert "in hold_the_loop" in stack
        assert "MainThread" not in stack  # which is the one that looks
        assert not Stall(1.0, stack).at_work
        assert Stall(1.0, stalls._stack_of(busy.ident or 0)).at_work
    finally:
        until.set()
        loop.call_soon_threadsafe(loop.stop)
        for thread in (idle, busy):
            thread.join()


async def test_a_stall_that_ended_before_anybody_could_look_has_no_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, answered, told = threading.Event(), threading.Event(), list[Stall]()

    def too_late(_: int) -> str:
        looking.set()
        answered.wait()
        return "what came after it"

    monkeypatch.setattr(stalls, "_stack_of", too_late)
    async with StallMeter(0.05, told.append):
        hold_the_loop(looking)
        await asyncio.sleep(0)  # the loop answers
        answered.set()
        await until(lambda: bool(told))
    assert told[0].stack == UNKNOWN


async def test_so_has_one_in_which_no_thread_ran_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(threading.Event):
        """What comes of waiting while something holds the interpreter: the answer is there by then."""

        def wait(self, timeout: float | None = None) -> bool:
            return super().wait()

    told: list[Stall] = []
    async with StallMeter(0.05, told.append) as meter:
        await until(lambda: meter.beats > 0)
        monkeypatch.setattr(threading, "Event", Late)
        while UNKNOWN not in {stall.stack for stall in told}:
            time.sleep(0.1)
            await asyncio.sleep(0.001)
        monkeypatch.undo()


async def test_the_watching_thread_ends_with_the_context_and_hides_no_error() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with StallMeter() as meter:
            raise ValueError("mine")
    assert not meter._thread.is_alive()


async def test_a_driver_says_its_stalls_where_the_environment_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seen: threading.Event
) -> None:
    monkeypatch.setenv("KTO_RAY_STALLS", "0.05")
    async with stalls_said():
        hold_the_loop(seen)
        await until(lambda: "did not get its turn" in caplog.text)
    assert "in hold_the_loop" in caplog.text
    assert "stalls of more than 0.05 s: " in caplog.text


async def test_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KTO_RAY_STALLS", raising=False)
    async with stalls_said():
        assert "stalls" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("value", ["yes", "0", "-1", "nan", "inf"])
async def test_a_limit_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KTO_RAY_STALLS", value)
    with pytest.raises(UserError, match=f"KTO_RAY_STALLS: '{value}' is not a number of seconds above 0"):
        async with stalls_said():
            pass
