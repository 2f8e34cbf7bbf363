"""Whether the event loop gets its turn: how long it was kept from it at most, and by what.

    watching thread --beat--> event loop --answer--> watching thread
                        \\--> no answer within the limit: what the loop's thread is doing now is the cause

A debug hook. With `KTO_RAY_STALLS=0.05` in its environment a driver says every stall of more than 50 ms, with the stack
of its event loop; tests and benchmarks ask a `StallMeter`. Where a stack ends in `select` the loop had nothing in hand:
the machine was too busy to wake it, or another thread kept the interpreter. What other threads were at is said then.
"""

import asyncio
import concurrent.futures.thread
import contextlib
import logging
import os
import selectors
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType

from kto_ray.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = "KTO_RAY_STALLS"
BEAT_S = 0.005
FRAMES = 12  # of a stack, the innermost
WAITING = f'"{selectors.__file__}"'
IDLE = (threading.__file__, concurrent.futures.thread.__file__, selectors.__file__)
"""Where threads are that wait."""
UNKNOWN = "unknown: whatever it was kept all other threads from running, too\n"


@dataclass(frozen=True)
class Stall:
    """A time in which the event loop did not get its turn.

    Args:
        seconds: may have been up to `BEAT_S` more.
        stack: of the loop's thread when the limit had passed; empty for what was shorter.
    """

    seconds: float = 0.0
    stack: str = ""

    @property
    def at_work(self) -> bool:
        """Whether something ran on the loop, as far as that is known of what was longer than the limit."""
        return bool(self.stack) and not self.stack.rpartition("  File ")[2].startswith(WAITING)


class StallMeter:
    """Measures the event loop that enters it, as an async context.

    Args:
        limit_s: what takes longer is looked into.
        tell: called with each of those, in the watching thread.
    """

    def __init__(self, limit_s: float = 0.05, tell: Callable[[Stall], None] | None = None) -> None:
        self.limit_s, self._tell = limit_s, tell
        self.longest = Stall()
        self.longest_at_work = Stall()
        """Of those longer than the limit."""
        self.stalls = 0
        """How many took longer than the limit."""
        self.beats = 0
        """How many times the loop answered."""
        self._ended = threading.Event()

    async def __aenter__(self) -> "StallMeter":
        arguments = asyncio.get_running_loop(), threading.get_ident()
        self._thread = threading.Thread(target=self._watch, args=arguments, name="stalls", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        await asyncio.to_thread(self._thread.join)  # not here: it may still wait for an answer

    def _watch(self, loop: asyncio.AbstractEventLoop, thread_id: int) -> None:
        while not self._ended.wait(BEAT_S):
            answered, answer = list[float](), threading.Event()

            def here(answered: list[float] = answered, answer: threading.Event = answer) -> None:
                answered.append(time.monotonic())
                answer.set()

            began = time.monotonic()
            try:
                loop.call_soon_threadsafe(here)
            except RuntimeError:
                return  # the loop was closed before the context was left
            found = "" if answer.wait(self.limit_s) else _stack_of(thread_id)
            if answer.is_set():
                found = ""  # what was seen, if anything, came after the stall
            answer.wait()
            seconds = answered[0] - began
            self._count(Stall(seconds, (found or UNKNOWN) if seconds > self.limit_s else ""))

    def _count(self, stall: Stall) -> None:
        self.beats += 1
        if stall.seconds > self.longest.seconds:
            self.longest = stall
        if stall.stack:
            self.stalls += 1
            if stall.at_work and stall.seconds > self.longest_at_work.seconds:
                self.longest_at_work = stall
            if self._tell:
                self._tell(stall)


def _stack_of(thread_id: int) -> str:
    """Of a thread; where it waits, with the last line of each other thread that does not."""
    frames = sys._current_frames()
    if thread_id not in frames:
        return UNKNOWN
    stack = "".join(traceback.format_stack(frames[thread_id], FRAMES))
    if not Stall(stack=stack).at_work:
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame and thread.ident not in (thread_id, threading.get_ident()):
                path, line, function, _ = traceback.extract_stack(frame, 1)[0]
                if path not in IDLE:
                    stack += f"thread {thread.name}: {path}, line {line}, in {function}\n"
    return stack


@contextlib.asynccontextmanager
async def stalls_said() -> AsyncIterator[None]:
    """Where the environment asks for it, say the stalls of the event loop meanwhile.

    Raises:
        UserError: it does not give a number of seconds.
    """
    if not (value := os.environ.get(VARIABLE)):
        yield
        return
    try:
        limit_s = float(value)
    except ValueError:
        limit_s = 0.0
    if not 0 < limit_s < float("inf"):
        raise UserError(f"{VARIABLE}: {value!r} is not a number of seconds above 0; give for instance 0.05")

    def say(stall: Stall) -> None:
        logger.warning("the event loop did not get its turn for %.3f s:\n%s", stall.seconds, stall.stack)

    async with StallMeter(limit_s, say) as meter:
        yield
    if meter.stalls:
        logger.warning(
            "stalls of more than %g s: %d, at most %.3f s, and %.3f s with something at work on the loop",
            *(limit_s, meter.stalls, meter.longest.seconds, meter.longest_at_work.seconds),
        )
