"""The desk: one async Ray actor a run, where the loop, the page and the operator meet; it owns the queue.

`labeler.py` starts it on the driver's node and hands its handle to the page's replicas (`web/`). It keeps nothing that
does not follow from the database: killed, it is started again by Ray and calls that were under way are repeated, which
`queue.py` and `intake.py` allow. One thread talks to the database, so calls come one after the other.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import pyarrow as pa

from kto_ray.config.people import Human
from kto_ray.people import keeping
from kto_ray.people.access import secret_of
from kto_ray.people.clock import clock_of
from kto_ray.people.intake import Intake
from kto_ray.people.overview import Overview, answers_table, catch_up, export, overview
from kto_ray.people.people import Badge, People, Role
from kto_ray.people.queue import Queue
from kto_ray.people.tables import PATIENCE_S, open_database
from kto_ray.people.tallies import Tallies
from kto_ray.people.terms import Judged, NewItem, Offer, Progress, Standing
from kto_ray.people.votes import Outcomes, Vote, Votes

Result = TypeVar("Result")
NEWS_S = 10.0
"""Who waits for news is answered after so long without any: time alone changes things, too."""


@dataclass(frozen=True)
class Turn:
    """What the page needs to go on: where things stand, and images to show, those held already first."""

    progress: Progress
    offers: list[Offer]


class Desk:
    """See the module; methods that take a badge raise Refused.

    Args:
        url: of the database.
        run: whose it is.
        max_policy_lag: of the run.
    """

    def __init__(self, url: str, run: str, settings: Human, max_policy_lag: int) -> None:
        self.engine = open_database(url, run, PATIENCE_S)
        self.clock = clock_of(self.engine)
        self.intake = Intake(self.engine, settings, self.clock)
        self.queue = Queue(self.engine, settings, self.clock, max_policy_lag)
        self.people = People(self.engine, settings, self.clock)
        self.votes = Votes(self.engine, settings, self.clock)
        self.settings, self.max_policy_lag, self.tallies = settings, max_policy_lag, Tallies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._revision = secrets.randbits(32)  # differs from that of the actor before
        self._changed = asyncio.Condition()
        self._sent = Outcomes()

    async def _do(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def _change(self, work: Callable[..., Result], *arguments: Any) -> Result:
        result = await self._do(work, *arguments)
        async with self._changed:
            self._revision += 1
            self._changed.notify_all()
        return result

    # -- for the loop

    async def secret(self) -> str:
        """What links are signed with."""
        return await self._do(secret_of, self.engine)

    async def badge_of(self, name: str, role: Role = "labeler") -> Badge:
        """One that works: made if there is none."""
        found = await self._do(self.people.badges_of, name)
        return found[0] if found else await self._do(self.people.admit, name, role)

    async def able(self) -> int:
        """How many people can label: not excluded, with a link that works."""
        everybody = await self._do(self.people.everybody)
        return sum(p.role == "labeler" and bool(p.links) and p.excluded_why is None for p in everybody)

    async def add(self, stage: str, number: int, new: Sequence[NewItem]) -> None:
        await self._change(self.intake.add, stage, number, new)

    async def add_gold(self, new: Sequence[NewItem]) -> None:
        await self._do(self.intake.add_gold, new)

    async def finish(self, stage: str, number: int) -> None:
        await self._change(self.intake.finish, stage, number)

    async def standing(self, stage: str, revision: int | None = None) -> tuple[int, Standing]:
        """Where a round stands, and the revision of that; waits for another than `revision`, up to `NEWS_S`."""
        try:
            async with asyncio.timeout(NEWS_S), self._changed:
                await self._changed.wait_for(lambda: self._revision != revision)
        except TimeoutError:
            pass
        now = self._revision
        return now, await self._do(self.intake.standing, stage)

    async def seal(self, stage: str, withdraw: bool = False) -> list[Judged]:
        """Seal a round, and delete the images that nobody will be shown any more; see `keeping.py`."""
        judged = await self._change(self.intake.seal, stage, withdraw)
        spare = await self._do(keeping.spare, self.engine, self.max_policy_lag, self.clock())
        for start in range(0, len(spare), keeping.BATCH):
            await self._do(keeping.drop, self.engine, spare[start : start + keeping.BATCH])
        return judged

    async def answers(self, stage: str) -> pa.Table:
        """Everything that was said on the samples whose label went into this round; see `ANSWER_SCHEMA`."""
        return await self._do(answers_table, self.engine, stage)

    async def announce(self, names: Mapping[str, str]) -> dict[str, str]:
        """Names under which samples are published, by their ids; those that are not yet."""
        return await self._do(self.votes.announce, names)

    async def is_out(self, names: Sequence[str]) -> None:
        await self._do(self.votes.is_out, names)

    async def position(self) -> str | None:
        """How far votes were read."""
        return await self._do(self.votes.position)

    async def take(self, new: Sequence[Vote], position: str | None = None) -> Outcomes:
        """Count votes that were read up to a position."""
        return await self._change(self.votes.take, new, position)

    async def end(self, ended: bool) -> None:
        await self._change(self.intake.end, ended)

    # -- for labelers

    async def turn(self, badge: str, count: int) -> Turn:
        """Up to `count` images to judge."""
        offers = await self._do(self.queue.lease, badge, count)
        return Turn(await self._do(self.queue.progress, badge), offers)

    async def answer(self, badge: str, item: str, answer: str, seconds: float | None, count: int) -> Turn:
        """Take an answer, and give the next images."""
        await self._change(self.queue.answer, badge, item, answer, seconds)
        return await self.turn(badge, count)

    async def extend(self, badge: str, keys: Sequence[str]) -> list[str]:
        return await self._do(self.queue.extend, badge, keys)

    async def release(self, badge: str, keys: Sequence[str]) -> None:
        await self._do(self.queue.release, badge, keys)

    async def undo(self, badge: str, item: str) -> Offer:
        return await self._change(self.queue.undo, badge, item)

    async def image(self, badge: str, item: str) -> bytes:
        """PNG."""
        return await self._do(self.queue.image, badge, item)

    async def role(self, badge: str) -> tuple[str, Role]:
        """Name and role of whoever has this badge."""
        return await self._do(self.people.whose, badge)

    # -- for an application

    async def send(self, badge: str, new: Sequence[Vote]) -> Outcomes:
        """Count votes of its users."""
        outcomes = await self._change(self.votes.send, badge, new)
        self._sent.update(outcomes)
        return outcomes

    async def sent(self) -> Outcomes:
        """What became of votes that were sent since this was last asked for."""
        sent, self._sent = self._sent, Outcomes()
        return sent

    # -- for the operator

    async def overview(self, badge: str) -> Overview:
        await self._do(self.people.require_operator, badge)
        while await self._do(catch_up, self.engine, self.tallies):  # long when it begins: others may call in between
            pass
        return await self._do(overview, self.engine, self.settings, badge, self.clock, self.tallies)

    async def export(self, badge: str) -> pa.Table:
        return await self._do(export, self.engine, badge, self.clock)

    async def exclude(self, badge: str, name: str) -> None:
        """Raises UserError when there is nobody of this name."""
        await self._do(self.people.require_operator, badge)
        await self._change(self.people.exclude, name, "by the operator")

    async def include(self, badge: str, name: str) -> None:
        """Raises UserError when there is nobody of this name."""
        await self._do(self.people.require_operator, badge)
        await self._change(self.people.include, name)


class _Remote:
    """Calls an actor as if it were the object itself: calls of its methods are awaited the same way."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Callable[..., Any]:
        remote: Callable[..., Any] = getattr(self._handle, name).remote
        return remote


def remote_desk(handle: Any) -> Desk:
    """The desk behind an actor's handle. What a method raises is raised as a subclass that Ray makes of it."""
    return cast(Desk, _Remote(handle))
