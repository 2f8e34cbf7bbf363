"""Whose turn the machines have: to draw and score images, to wait for people's verdicts, to train, or to evaluate.

The loop's two tasks take turns here. They follow each other by themselves where `max_policy_lag` is 0, and share the
stage where it is more. Whatever has to make room for somebody else's turn, or to wake for its own, listens.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

Role = Literal["making", "judging", "training", "evaluating"]
Listener = Callable[[frozenset[Role]], Awaitable[None]]
"""Called with the roles that are about to be on stage; their turns begin when it returns. Where nobody is, somebody
will be in a moment."""
DRAWING: frozenset[Role] = frozenset({"making", "evaluating"})
"""Roles that need images drawn and scored."""


class Stage:
    """See the module.

    Args:
        listeners: told of every change, one after the other; one that raises keeps the turn from beginning.
        apart: nobody trains while anybody draws, and the other way round; who comes second waits.
    """

    def __init__(self, listeners: Sequence[Listener] = (), apart: bool = False) -> None:
        self._listeners, self._apart = listeners, apart
        self._turns: Counter[Role] = Counter()
        self._changing = asyncio.Condition()

    @property
    def roles(self) -> frozenset[Role]:
        """Who is on stage."""
        return frozenset(role for role, turns in self._turns.items() if turns)

    @contextlib.asynccontextmanager
    async def turn(self, role: Role) -> AsyncIterator[None]:
        """Be on stage for as long as the context lasts."""
        await self._change(role, 1)
        try:
            yield
        finally:
            await self._change(role, -1)

    def _has_room(self, role: Role) -> bool:
        rivals: frozenset[Role] = DRAWING if role == "training" else frozenset({"training"})
        return not self._apart or role == "judging" or not self.roles & rivals

    async def _change(self, role: Role, by: int) -> None:
        async with self._changing:
            if by > 0:
                await self._changing.wait_for(lambda: self._has_room(role))
            before = self.roles
            self._turns[role] += by
            if self.roles == before:
                return
            try:
                for listen in self._listeners:
                    await listen(self.roles)
            except BaseException:
                self._turns[role] -= max(by, 0)  # who is refused has no turn; who leaves has left
                raise
            finally:
                self._changing.notify_all()
