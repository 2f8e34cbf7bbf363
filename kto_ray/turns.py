"""What happens to generators and scorers when the stage changes hands: they sleep, or come and go.

    stage.py --who is on stage--> Sharing (colocated): whoever does not draw sleeps; requests wake it
                              --> Breathing (elastic): replicas come before drawing, and go when that pays

`loop.py` gives its stage the listener of the run's placement. Train workers need none: they sleep before they report.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from kto_ray.concurrency import cancelled
from kto_ray.config import RunConfig
from kto_ray.placement import Placement
from kto_ray.stage import DRAWING, Listener, Role, Stage

logger = logging.getLogger(__name__)

PATIENCE_S = 120
"""Who does not sleep after so long is not waited for."""
POLL_S = 0.2


class Sleeps(Protocol):
    """Generators, or scorers."""

    async def sleep(self) -> None:
        """Leave the cards until there is something to do again."""


class Scaled(Sleeps, Protocol):
    """Generators."""

    came_s: float
    """Seconds that the first of them took to come."""

    async def scale(self, replicas: int) -> None:
        """Have so many; returns before they are there."""

    async def running(self) -> int:
        """How many there are."""


class Sharing:
    """Has everybody who draws or scores sleep while nobody draws. Who cannot is said, and the run goes on."""

    def __init__(self, sleepers: Sequence[Sleeps]) -> None:
        self._sleepers = sleepers

    async def __call__(self, roles: frozenset[Role]) -> None:
        if roles and not roles & DRAWING:
            await asyncio.gather(*map(self._sleep, self._sleepers))

    async def _sleep(self, sleeper: Sleeps) -> None:
        who = type(sleeper).__name__.lower()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await sleeper.sleep()
        except TimeoutError:
            logger.warning("%s did not leave their cards within %d s; the run goes on", who, PATIENCE_S)
        except (RayError, RayServeException) as error:
            logger.warning("not all %s left their cards (%s: %s); the run goes on", who, type(error).__name__, error)


class Breathing:
    """Brings replicas before there is something to draw, and lets them go while there is not.

    They go at once where training, when last seen, took longer than replicas took to come back. Else, and as long as
    that is not known, they go once they have been idle for as long as that: at most twice what was needed is lost.

    Args:
        least, most: replicas, while nobody draws and while somebody does.
        tell: is given sentences for the user.
    """

    def __init__(self, generators: Scaled, least: int, most: int, tell: Callable[[str], None]) -> None:
        self._generators, self._least, self._most, self._tell = generators, least, most, tell
        self._wanted = max(1, least)
        self._back_s: float | None = None
        self._training_s: float | None = None
        self._training_since: float | None = None
        self._coming: list[asyncio.Task[None]] = []
        self._going: list[asyncio.Task[None]] = []
        self._told = False

    @property
    def back_s(self) -> float:
        """Seconds that replicas took to come back, when last seen; at first, to come."""
        return self._generators.came_s if self._back_s is None else self._back_s

    async def __call__(self, roles: frozenset[Role]) -> None:
        self._look_at_training("training" in roles)
        if roles & DRAWING:
            await self._have_them_come()
        elif roles and self._wanted > self._least and all(task.done() for task in self._going):
            self._going = [asyncio.create_task(self._let_them_go("training" in roles))]

    def _look_at_training(self, on_stage: bool) -> None:
        if on_stage and self._training_since is None:
            self._training_since = time.monotonic()
        elif not on_stage and self._training_since is not None:
            self._training_s, self._training_since = time.monotonic() - self._training_since, None

    async def _have_them_come(self) -> None:
        await cancelled(self._going)
        if self._wanted < self._most:
            before, self._wanted = self._wanted, self._most
            await self._generators.scale(self._most)
            self._coming = [asyncio.create_task(self._see_them_come(before))]

    async def _see_them_come(self, before: int) -> None:
        began = time.monotonic()
        while await self._generators.running() <= before:
            await asyncio.sleep(POLL_S)
        if before == self._least:
            self._back_s = time.monotonic() - began

    async def _let_them_go(self, training: bool) -> None:
        pays = training and self._training_s is not None and self._training_s > self.back_s
        if not pays:
            await asyncio.sleep(self.back_s)
        await cancelled(self._coming)
        self._wanted = self._least
        try:
            await self._generators.scale(self._least)
        except (RayError, RayServeException) as error:
            self._wanted = self._most
            logger.warning("generators could not be let go (%s: %s); they stay", type(error).__name__, error)
            return
        if self._training_s is not None and not self._told:
            self._told = True
            self._tell(
                f"generators: {self._least} while nobody draws: training took {self._training_s:.1f} s, and they take "
                f"{self.back_s:.1f} s to come back"
            )

    async def close(self) -> None:
        """Do nothing of what was to be done later."""
        await cancelled([*self._coming, *self._going])


def stage_of(
    config: RunConfig, placement: Placement, generators: Scaled, scorers: Sleeps, tell: Callable[[str], None]
) -> Stage:
    """The stage of a run, with whoever has to listen."""
    listeners: list[Listener] = []
    if placement.kind == "colocated":
        listeners = [Sharing([generators, scorers])]
    elif placement.kind == "elastic":
        least, most = placement.replicas
        useful = math.ceil(config.generate.images_per_round / config.generate.batch_size)
        listeners = [Breathing(generators, least, max(least, min(most, useful)), tell)]
    return Stage(listeners, apart=placement.by_turns)
