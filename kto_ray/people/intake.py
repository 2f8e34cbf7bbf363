"""Rounds on their way through people, as the loop sees them: images come in, the round is finished, and sealed.

The other side of the same tables is `queue.py`, where people take images and answer. `desk.py` has both, and is who
calls them; a crash at any point leaves the state before or after a call, and calls may be repeated.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import and_, exists, func, select

from kto_ray.config.people import Human
from kto_ray.people.people import works
from kto_ray.people.settling import COUNTS, OPEN, STANDS
from kto_ray.people.tables import answers, badges, images, items, labelers, meta, rounds
from kto_ray.people.terms import Judged, NewItem, Standing
from kto_ray.people.transactions import Transactions
from kto_ray.records import derive_seed

SHOWN = 20
"""Answers that a verdict's rule names."""
ITEM_FIELDS = ("sample_id", "prompt_id", "prompt", "policy_version", "needed", "expected")


class Intake(Transactions):
    """See the module. Every method is one transaction."""

    def add(self, stage: str, number: int, new: Sequence[NewItem]) -> None:
        """Ask people about images of a round; those that are here already stay as they are."""

        def work(connection: sa.Connection) -> None:
            if not connection.scalar(select(exists().where(rounds.c.stage == stage))):
                connection.execute(rounds.insert().values(stage=stage, number=number))
            self._insert(connection, new, stage=stage, number=number)

        self._do(work)

    def add_gold(self, new: Sequence[NewItem]) -> None:
        """Mix in images with known answers; those that are here already stay."""
        self._do(lambda connection: self._insert(connection, new))

    def _insert(self, connection: sa.Connection, new: Sequence[NewItem], **common: Any) -> None:
        ids = [item.sample_id for item in new]
        known = set(connection.scalars(select(items.c.sample_id).where(items.c.sample_id.in_(ids))))
        for item in new:
            if item.sample_id in known:
                continue
            known.add(item.sample_id)
            values = {name: getattr(item, name) for name in ITEM_FIELDS}
            key = secrets.token_hex(8)
            shuffle = derive_seed("shuffle", item.sample_id) / 2**63
            connection.execute(items.insert().values(id=key, shuffle=shuffle, **values, **common))
            connection.execute(images.insert().values(item=key, png=item.png))

    def finish(self, stage: str, number: int) -> None:
        """No more images of this round will come."""

        def work(connection: sa.Connection) -> None:
            now = self.clock()
            if connection.scalar(select(exists().where(rounds.c.stage == stage))):
                ended = func.coalesce(rounds.c.finished_at, now)
                connection.execute(rounds.update().where(rounds.c.stage == stage).values(finished_at=ended))
            else:  # nothing of it went to people
                connection.execute(rounds.insert().values(stage=stage, number=number, finished_at=now))

        self._do(work)

    def standing(self, stage: str) -> Standing:
        def work(connection: sa.Connection) -> Standing:
            round_ = connection.execute(select(rounds).where(rounds.c.stage == stage)).one_or_none()
            asked, judged = counts_of(connection, stage)
            said = select(func.count()).select_from(answers.join(items)).where(items.c.stage == stage, COUNTS)
            works_now = exists().where(works(self.clock()), badges.c.labeler == labelers.c.id)
            able = (labelers.c.role == "labeler", labelers.c.excluded_at.is_(None), works_now)
            people = connection.scalar(select(func.count()).where(*able)) or 0
            theirs = (answers.c.item == items.c.id, answers.c.labeler == labelers.c.id, STANDS)
            has_said = exists().where(*theirs).correlate(items, labelers)
            done_with = ~exists().where(*able, ~has_said)  # everybody who could answer has said or skipped
            passed = select(func.count()).where(items.c.stage == stage, OPEN, done_with)
            left = connection.scalar(passed) or 0 if people else 0
            target = target_of(self.settings, asked, finished=round_ is not None and round_.finished_at is not None)
            sealed = round_ is not None and round_.sealed_at is not None
            return Standing(
                asked,
                judged,
                passed=left,
                answers=connection.scalar(said) or 0,
                labelers=people,
                enough=sealed or (target is not None and judged + left >= target),
            )

        return self._do(work)

    def seal(self, stage: str, withdraw: bool = False) -> list[Judged]:
        """Fix everything that is judged as part of this round, late answers on earlier rounds included.

        Called again, it gives the same.

        Args:
            withdraw: ask no more about images of this round that are not judged; else they stay open.
        """

        def work(connection: sa.Connection) -> list[Judged]:
            sealed_at = connection.scalar(select(rounds.c.sealed_at).where(rounds.c.stage == stage))
            if sealed_at is None:
                judged = and_(items.c.label.is_not(None), items.c.sealed_in.is_(None), items.c.stage.is_not(None))
                connection.execute(items.update().where(judged).values(sealed_in=stage))
                if withdraw:
                    connection.execute(items.update().where(items.c.stage == stage, OPEN).values(sealed_in=stage))
                connection.execute(rounds.update().where(rounds.c.stage == stage).values(sealed_at=self.clock()))
            said: dict[str, list[str]] = {}
            rows = connection.execute(
                select(answers.c.item, labelers.c.name, answers.c.answer)
                .select_from(answers.join(items).join(labelers))
                .where(items.c.sealed_in == stage, COUNTS)
                .order_by(labelers.c.name)
            )
            for item, name, answer in rows:
                said.setdefault(item, []).append(f"{name} {answer}")
            rule = self.settings.overlap.rule
            fixed = select(items).where(items.c.sealed_in == stage, items.c.label.is_not(None))
            return [
                Judged(
                    row.sample_id,
                    row.label,
                    rule=f"{rule}@1(of {row.needed}): {_told(said[row.id])}",
                    policy_version=row.policy_version,
                )
                for row in connection.execute(fixed.order_by(items.c.sample_id))
            ]

        return self._do(work)

    def end(self, ended: bool = True) -> None:
        """Tell people that the run has ended, or goes on."""

        def work(connection: sa.Connection) -> None:
            connection.execute(meta.delete().where(meta.c.key == "ended"))
            if ended:
                connection.execute(meta.insert().values(key="ended", value="yes"))

        self._do(work)


def _told(said: Sequence[str]) -> str:
    """Who said what, of the first few where there are many."""
    more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
    return ", ".join([*said[:SHOWN], *more])


def counts_of(connection: sa.Connection, stage: str) -> tuple[int, int]:
    """Images of a round that people were asked about, and those that are judged."""
    asked, judged = connection.execute(
        select(func.count(), func.count(items.c.label)).where(items.c.stage == stage)
    ).one()
    return asked, judged


def target_of(settings: Human, asked: int, finished: bool) -> int | None:
    """How many judged images are enough; None while it is not known how many there will be."""
    if not finished:
        return None
    least = asked if settings.min_labels is None else settings.min_labels
    return min(asked, least) if isinstance(least, int) else math.ceil(round(least * asked, 6))
