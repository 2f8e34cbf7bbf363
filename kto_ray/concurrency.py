"""Tasks that end with the block that began them, and the one error that is said of several.

Whoever runs things side by side does it with these: nothing goes on after an error, and callers see a plain exception.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from kto_ray.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@contextlib.asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """An `asyncio.TaskGroup` that raises one error of its tasks as it is, and no ExceptionGroup.

    Of several errors it is the first, or the first UserError, which is the one that says what to do.
    """
    failed: BaseExceptionGroup[BaseException] | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as error:
        failed = error
    if failed is not None:
        raise foremost(failed)


def foremost(error: BaseException) -> BaseException:
    """The error that a group of errors is about; others are noted on it. Any other exception is itself."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    errors = [foremost(one) for one in error.exceptions]
    first = next((one for one in errors if isinstance(one, UserError)), errors[0])
    for other in errors:
        if other is not first:
            first.add_note(f"at the same time: {type(other).__name__}: {other}")
    return first


async def as_done(coroutines: Iterable[Coroutine[Any, Any, T]]) -> AsyncGenerator[T, None]:
    """Run coroutines side by side and give what they return as they end, in any order.

    Iterate within `contextlib.aclosing`: closing cancels those that have not ended, and waits for them.
    """
    # No TaskGroup: the error of a task would cancel whoever iterates, wherever it is at that moment.
    pending = {asyncio.create_task(coroutine) for coroutine in coroutines}
    done: set[asyncio.Task[T]] = set()
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            while done:
                yield await done.pop()  # what was given is kept by nobody here
    finally:
        await cancelled([*pending, *done])


async def cancelled(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until they have ended; what else may be wrong with them has been said."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Gathering(Generic[T, R]):
    """Gives what comes at the same moment to one call of a slow function, which runs in a thread, one at a time.

    What comes while it runs waits for the next call: the slower storage answers, the more goes into a file.

    Args:
        write: gives something for each of the items, in order. What it raises reaches all whose items it was given.
    """

    def __init__(self, write: Callable[[list[T]], Sequence[R]]) -> None:
        self._write = write
        self._lock = asyncio.Lock()
        self._next = _Gathered[T, R]()
        self._writing: set[asyncio.Task[Sequence[R]]] = set()

    async def __call__(self, items: Sequence[T]) -> Sequence[R]:
        """Returns when the items are written, with what was given for them. Raises what writing raises."""
        gathered, start = self._next, len(self._next.items)
        gathered.items += items
        if gathered.writing is None:
            gathered.writing = asyncio.create_task(self._give(gathered))
            self._writing.add(gathered.writing)
            gathered.writing.add_done_callback(self._writing.discard)
        given = await asyncio.shield(gathered.writing)  # others may wait for it, too
        return given[start : start + len(items)]

    async def settle(self) -> None:
        """Wait for what is being written, also for those who wait no more. Raises what writing raises."""
        await asyncio.gather(*self._writing)

    async def _give(self, gathered: "_Gathered[T, R]") -> Sequence[R]:
        async with self._lock:
            self._next = _Gathered()
            return await asyncio.to_thread(self._write, gathered.items) if gathered.items else []


@dataclass
class _Gathered(Generic[T, R]):
    items: list[T] = field(default_factory=list)
    writing: "asyncio.Task[Sequence[R]] | None" = None


@contextlib.asynccontextmanager
async def all_closed(*parts: Any) -> AsyncIterator[None]:
    """Close parts at the end of the block, in this order, each whatever comes of the others.

    What goes wrong in closing is said; it hides no error of the block.
    """
    async with contextlib.AsyncExitStack() as stack:
        for part in reversed(parts):
            stack.push_async_callback(_close, part)
        yield


async def _close(part: Any) -> None:
    try:
        closing = part.close()
        if inspect.isawaitable(closing):
            await closing
    except Exception:
        logger.exception("%s could not be closed", type(part).__name__)
