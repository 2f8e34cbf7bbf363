"""The queue of images that people judge: a state machine in SQL transactions, whose clock never goes back.

An item is open until it has as many answers as it needs, then judged, and sealed with a round: until the seal people
may change their minds, after it nothing changes. Here people take images and answer; the loop's side of the same tables
is `intake.py`. `desk.py` has both for a run, and is who calls them; a crash at any point leaves the state before or
after a call, and calls may be repeated.

    open --answers--> judged --seal--> sealed
      ^                  |
      +-- undo, exclude -+
"""

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import and_, exists, func, or_, select

from kto_ray.config.people import Human
from kto_ray.people.intake import counts_of, target_of
from kto_ray.people.keeping import HAS_IMAGE, timely
from kto_ray.people.people import OPERATOR, Refused, bearer, doubt, exclude, known_answers
from kto_ray.people.settling import COUNTS, OPEN, STANDS, make_void, settle
from kto_ray.people.tables import answers, images, items, leases, meta, rounds
from kto_ray.people.terms import ANSWERS, Offer, Progress
from kto_ray.people.transactions import Transactions
from kto_ray.records import derive_seed

UNDOABLE = 10
"""So many of their latest answers people can take back."""


class Queue(Transactions):
    """See the module. Every method is one transaction.

    Args:
        max_policy_lag: items that could no longer be trained on are not offered.

    Raises (from the methods that take a badge): Refused.
    """

    def __init__(self, engine: sa.Engine, settings: Human, clock: Callable[[], float], max_policy_lag: int = 0) -> None:
        super().__init__(engine, settings, clock)
        self.max_policy_lag = max_policy_lag

    def lease(self, badge: str, count: int = 1) -> list[Offer]:
        """Up to `count` images for this labeler: those already leased first, in the order in which they were."""

        def work(connection: sa.Connection) -> list[Offer]:
            now, me = self.clock(), self._labeler(connection, badge)
            held = (leases.c.labeler == me, leases.c.expires_at > now, OPEN)
            offers = select(items.c.id, items.c.prompt, leases.c.expires_at).select_from(leases.join(items))
            offers = offers.where(*held).order_by(leases.c.id).limit(count)
            found = connection.execute(offers).all()
            if len(found) < count:
                for key in self._choose(connection, me, now, count - len(found)):
                    self._grant(connection, me, key, now)
                found = connection.execute(offers).all()
            return [Offer(*row) for row in found]

        return self._do(work)

    def _choose(self, connection: sa.Connection, me: int, now: float, count: int) -> list[str]:
        mine = or_(
            exists().where(answers.c.item == items.c.id, answers.c.labeler == me, STANDS),
            exists().where(leases.c.item == items.c.id, leases.c.labeler == me, leases.c.expires_at > now),
        )
        wanted = (
            select(items.c.id)
            .where(items.c.stage.is_not(None), OPEN, ~mine, self._free(me, now))
            .where(timely(connection, self.max_policy_lag), HAS_IMAGE)
            .order_by(items.c.number.desc(), self._said().desc(), items.c.shuffle)
            .limit(count)
        )
        keys = list(connection.scalars(wanted))
        if not keys or not self.settings.gold.file:
            return keys
        unseen = select(items.c.id).where(items.c.expected.is_not(None), ~mine).order_by(items.c.shuffle).limit(count)
        gold = list(connection.scalars(unseen))
        seen = sum(
            connection.scalar(select(func.count()).where(table.c.labeler == me)) or 0 for table in (answers, leases)
        )
        mixed: list[str] = []
        for place in range(len(keys)):
            # By chance, or people would find out that it is every tenth.
            is_gold = gold and derive_seed("gold", me, seen + place) / 2**63 < self.settings.gold.share
            mixed.append(gold.pop(0) if is_gold else keys.pop(0))
        return mixed

    def _said(self) -> sa.ScalarSelect[int]:
        return select(func.count()).where(answers.c.item == items.c.id, COUNTS).scalar_subquery()

    def _free(self, me: int, now: float) -> sa.ColumnElement[bool]:
        """Whether an item needs an answer that nobody else is about to give."""
        looking = select(func.count()).where(
            leases.c.item == items.c.id, leases.c.labeler != me, leases.c.expires_at > now
        )
        return self._said() + looking.scalar_subquery() < items.c.needed

    def _grant(self, connection: sa.Connection, me: int, item: str, now: float) -> float:
        expires_at = now + self.settings.lease_s
        connection.execute(leases.delete().where(leases.c.item == item, leases.c.labeler == me))
        connection.execute(leases.insert().values(item=item, labeler=me, at=now, expires_at=expires_at))
        return expires_at

    def answer(self, badge: str, item: str, answer: str, seconds: float | None = None) -> None:
        """Take an answer, once: the same one again changes nothing.

        An answer to a lease that has ended still counts if nobody else has the image by now.

        Args:
            seconds: that the person took, if it is known.

        Raises:
            Refused: no such answer, item or lease; the image is somebody else's now or the round is sealed; or it was
                answered otherwise before.
        """

        def work(connection: sa.Connection) -> None:
            now, me = self.clock(), self._labeler(connection, badge)
            if answer not in ANSWERS:
                raise Refused("verdict", f"{answer!r} is no answer; say one of {', '.join(ANSWERS)}")
            row = self._item(connection, item)
            before = self._my_answer(connection, me, item)
            if before is not None and before.void is None:
                if before.answer == answer:
                    return
                raise Refused("answered", f"you said {before.answer} before; take that back first")
            lease = connection.execute(
                select(leases).where(leases.c.item == item, leases.c.labeler == me)
            ).one_or_none()
            if lease is None:
                raise Refused("lease", "this image was not given to you; ask for one first")
            if row.sealed_in is not None:
                raise Refused("sealed", "this image's round is sealed; nothing in it changes any more")
            late = lease.expires_at <= now
            if late and row.expected is None and not self._is_free(connection, me, item, now):
                raise Refused("taken", "you had this image for too long; somebody else has it now")
            connection.execute(leases.delete().where(leases.c.id == lease.id))
            connection.execute(
                answers.insert().values(item=item, labeler=me, answer=answer, seconds=seconds, at=now, late=late)
            )
            settle(connection, self.settings.overlap, [item])
            judged_gold = row.expected is not None and self.settings.gold.action == "exclude"
            if judged_gold and (why := doubt(self.settings, known_answers(connection, me))):
                exclude(connection, self.settings, me, why, now)

        self._do(work)

    def extend(self, badge: str, keys: Sequence[str]) -> list[str]:
        """Look at images for longer; gives those that are (still, or again) this labeler's."""

        def work(connection: sa.Connection) -> list[str]:
            now, me = self.clock(), self._labeler(connection, badge)
            rows = connection.execute(
                select(leases.c.item, leases.c.expires_at, items.c.expected)
                .select_from(leases.join(items))
                .where(leases.c.labeler == me, leases.c.item.in_(keys), OPEN)
            ).all()
            kept = [
                row.item
                for row in rows
                if row.expires_at > now or row.expected is not None or self._is_free(connection, me, row.item, now)
            ]
            mine = and_(leases.c.labeler == me, leases.c.item.in_(kept))
            connection.execute(leases.update().where(mine).values(at=now, expires_at=now + self.settings.lease_s))
            return kept

        return self._do(work)

    def release(self, badge: str, keys: Sequence[str]) -> None:
        """Give images back unanswered, for somebody else to have."""

        def work(connection: sa.Connection) -> None:
            me = self._labeler(connection, badge)
            connection.execute(leases.delete().where(leases.c.labeler == me, leases.c.item.in_(keys)))

        self._do(work)

    def undo(self, badge: str, item: str) -> Offer:
        """Take back the answer on an item, one of the latest ten, and get the image again."""

        def work(connection: sa.Connection) -> Offer:
            now, me = self.clock(), self._labeler(connection, badge)
            row = self._item(connection, item)
            before = self._my_answer(connection, me, item)
            latest = select(answers.c.id).where(answers.c.labeler == me).order_by(answers.c.id.desc()).limit(UNDOABLE)
            if before is None or before.void == "excluded" or before.id not in connection.scalars(latest).all():
                raise Refused("undo", f"only your latest {UNDOABLE} answers can be taken back")
            if row.sealed_in is not None:
                raise Refused("sealed", "this image's round is sealed; nothing in it changes any more")
            if not connection.scalar(select(exists().where(images.c.item == item))):
                raise Refused("undo", "this image is too old to be judged again")
            make_void(connection, answers.c.id == before.id, "undone")
            settle(connection, self.settings.overlap, [item])
            # Asked for again after the image went to somebody else: it is theirs now.
            if row.expected is None and not self._is_free(connection, me, item, now):
                raise Refused("taken", "somebody else has this image now")
            return Offer(item, row.prompt, self._grant(connection, me, item, now))

        return self._do(work)

    def progress(self, badge: str) -> Progress:
        def work(connection: sa.Connection) -> Progress:
            me = self._labeler(connection, badge)
            newest = connection.execute(select(rounds).order_by(rounds.c.number.desc()).limit(1)).one_or_none()
            asked, judged = counts_of(connection, newest.stage) if newest else (0, 0)
            finished = newest is not None and newest.finished_at is not None
            ended = connection.scalar(select(exists().where(meta.c.key == "ended")))
            said = select(func.count()).where(answers.c.labeler == me, STANDS)
            return Progress(
                round=newest.number if newest else None,
                asked=asked,
                judged=judged,
                target=target_of(self.settings, asked, finished),
                waits_for="nothing"
                if ended
                else "training"
                if newest and newest.sealed_at is not None
                else "people"
                if finished
                else "images",
                answers=connection.scalar(said) or 0,
                undoable=self._undoable(connection, me),
            )

        return self._do(work)

    def _undoable(self, connection: sa.Connection, me: int) -> tuple[str, ...]:
        rows = connection.execute(
            select(answers.c.item, answers.c.void, items.c.sealed_in, HAS_IMAGE.label("has_image"))
            .select_from(answers.join(items))
            .where(answers.c.labeler == me)
            .order_by(answers.c.id.desc())
            .limit(UNDOABLE)
        )
        return tuple(row.item for row in rows if row.void is None and row.sealed_in is None and row.has_image)

    def image(self, badge: str, item: str) -> bytes:
        """The PNG of an item that this labeler was given, or has answered; of any item, for the operator."""

        def work(connection: sa.Connection) -> bytes:
            who = bearer(connection, badge, self.clock())
            seen = or_(
                sa.literal(who.role == OPERATOR),
                exists().where(leases.c.item == item, leases.c.labeler == who.id),
                exists().where(answers.c.item == item, answers.c.labeler == who.id),
            )
            png = connection.scalar(select(images.c.png).where(images.c.item == item, seen))
            if png is None:
                raise Refused("item", "there is no such image, or it was not given to you")
            return bytes(png)

        return self._do(work)

    # -- helpers --------------------------------------------------------------------------------------------------

    def _labeler(self, connection: sa.Connection, badge: str) -> int:
        """Whose badge it is, who must be somebody that labels."""
        row = bearer(connection, badge, self.clock())
        if row.role == OPERATOR:
            raise Refused("operator", "this is the operator's link; answers are given with a labeler's")
        if row.role != "labeler":
            raise Refused("application", "this is the application's token; it sends votes, and is asked nothing")
        if row.excluded_at is not None:
            raise Refused("excluded", "your answers are no longer asked for; thank you")
        return int(row.id)

    def _item(self, connection: sa.Connection, item: str) -> Any:
        row = connection.execute(select(items).where(items.c.id == item)).one_or_none()
        if row is None:
            raise Refused("item", "there is no such image")
        return row

    def _my_answer(self, connection: sa.Connection, me: int, item: str) -> Any:
        """The latest on this item, void or not; None: there is none."""
        mine = select(answers).where(answers.c.item == item, answers.c.labeler == me)
        return connection.execute(mine.order_by(answers.c.id.desc()).limit(1)).one_or_none()

    def _is_free(self, connection: sa.Connection, me: int, item: str, now: float) -> bool:
        return bool(connection.scalar(select(exists().where(items.c.id == item, self._free(me, now)))))
