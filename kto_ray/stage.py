"""Whose turn the machines have: to make images and label them, to train, or to evaluate.

The loop's two tasks take turns here. They follow each other by themselves where `max_policy_lag` is 0, and share the
stage where it is more. Whatever has to make room for somebody else's turn, or to wake for its own, listens.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

Role = Literal["making", "training", "evaluating"]
Listener = Callable[[frozenset[Role]], Awaitable[None]]
"""Called with the roles that are about to be on stage; their turns begin when it returns."""


class Stage:
    """See the module.

    Args:
        listeners: told of every change, one after the other; one that raises keeps the turn from beginning.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = listeners
        self._turns: Counter[Role] = Counter()
        self._changing = asyncio.Lock()

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

    async def _change(self, role: Role, by: int) -> None:
        async with self._changing:
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
