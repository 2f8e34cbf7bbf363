"""Who may label: people and the operator, the badges behind their links, and who is excluded.

`queue.py` asks `bearer` who is calling; `kto-ray labelers` and the operator's page work on `People`, in the same
database as the queue and while it runs.
"""

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import and_, func, select

from kto_ray.config.people import Human
from kto_ray.errors import UserError
from kto_ray.people.settling import COUNTS, STANDS, make_void, settle
from kto_ray.people.tables import answers, badges, in_transaction, items, labelers, leases

Role = Literal["labeler", "operator", "application"]
OPERATOR = "operator"
"""Name and role of whoever runs it all."""

AboutWho = Literal["badge", "expired", "revoked", "excluded", "operator", "application"]
AboutWhat = Literal["verdict", "item", "lease", "taken", "answered", "sealed", "undo"]


class Refused(Exception):  # noqa: N818  a clean answer, not a fault
    """What somebody asked for cannot be done; `why` is a word for programs, the message is for people."""

    def __init__(self, why: AboutWho | AboutWhat, message: str) -> None:
        super().__init__(why, message)
        self.why, self.message = why, message


@dataclass(frozen=True)
class Badge:
    """What a link stands for; `access.py` signs it. `expires_at`: seconds since 1970."""

    id: str
    expires_at: float


@dataclass(frozen=True)
class Person:
    """A labeler, the operator, or the application. `links` work: neither revoked nor expired; `answers` stand: not
    taken back."""

    name: str
    role: Role
    links: int
    answers: int
    excluded_why: str | None


def bearer(connection: sa.Connection, badge: str, now: float) -> sa.Row[Any]:
    """Whose badge it is: a row of `labelers`. Raises Refused: unknown, revoked or expired."""
    found = connection.execute(
        select(badges.c.expires_at, badges.c.revoked_at, labelers)
        .select_from(badges.join(labelers))
        .where(badges.c.id == badge)
    ).one_or_none()
    if found is None:
        raise Refused("badge", "this link is not known here")
    if found.revoked_at is not None:
        raise Refused("revoked", "this link was revoked; ask the operator for a new one")
    if found.expires_at <= now:
        raise Refused("expired", "this link has expired; ask the operator for a new one")
    return found


def require_operator(connection: sa.Connection, badge: str, now: float) -> None:
    """Raises Refused when a badge is not the operator's."""
    if bearer(connection, badge, now).role != OPERATOR:
        raise Refused("operator", "this is for the operator only")


def works(now: float) -> sa.ColumnElement[bool]:
    """Whether a badge opens the page."""
    return and_(badges.c.revoked_at.is_(None), badges.c.expires_at > now)


def exclude(connection: sa.Connection, settings: Human, labeler: int, why: str, now: float) -> None:
    """Take somebody's answers out of all that is not sealed, and ask no more."""
    connection.execute(labelers.update().where(labelers.c.id == labeler).values(excluded_at=now, excluded_why=why))
    connection.execute(leases.delete().where(leases.c.labeler == labeler))
    open_items = select(items.c.id).where(items.c.sealed_in.is_(None), items.c.expected.is_(None))
    taken_out = and_(answers.c.labeler == labeler, STANDS, answers.c.item.in_(open_items))
    touched = connection.scalars(select(answers.c.item).where(taken_out)).all()
    make_void(connection, taken_out, "excluded")
    settle(connection, settings.overlap, touched)


def known_answers(connection: sa.Connection, labeler: int) -> Counter[bool]:
    """How many images of gold somebody has judged right (True) and wrong (False)."""
    of_gold = (answers.c.labeler == labeler, items.c.expected.is_not(None), COUNTS)
    right = select(answers.c.answer == items.c.expected).select_from(answers.join(items)).where(*of_gold)
    return Counter(bool(value) for value in connection.scalars(right))


def doubt(settings: Human, known: Counter[bool]) -> str | None:
    """Why somebody's answers on gold make the others doubtful; None: they do not."""
    gold, total = settings.gold, known.total()
    if total < gold.least or known[True] >= gold.limit * total:
        return None
    return f"{known[True]} of {total} known answers right"


class People:
    """See the module.

    Raises (from the methods that take a name): UserError, when nobody has it.
    """

    def __init__(self, engine: sa.Engine, settings: Human, clock: Callable[[], float]) -> None:
        self.engine, self.settings, self.clock = engine, settings, clock

    def admit(self, name: str, role: Role = "labeler", days: float | None = None) -> Badge:
        """A new badge for somebody, who need not be known before; earlier ones go on working.

        Args:
            days: for which it works; None: `link_days`.

        Raises:
            UserError: a name that cannot be shown in a line, or that is the operator's.
        """
        if not name.strip() or not name.isprintable() or len(name) > 80:
            raise UserError(f"name: {name!r} must be 1 to 80 printable characters")
        if (name == OPERATOR) != (role == "operator"):
            raise UserError(f"name: {OPERATOR!r} is the name of whoever runs this; give labelers another")
        days = self.settings.link_days if days is None else days

        def work(connection: sa.Connection) -> Badge:
            badge = Badge(secrets.token_urlsafe(16), self.clock() + days * 24 * 3600)
            labeler = connection.scalar(select(labelers.c.id).where(labelers.c.name == name))
            if labeler is None:
                adding = labelers.insert().values(name=name, role=role).returning(labelers.c.id)
                labeler = connection.scalar(adding)
            values = {"id": badge.id, "labeler": labeler, "expires_at": badge.expires_at}
            connection.execute(badges.insert().values(values))
            return badge

        return in_transaction(self.engine, work)

    def badges_of(self, name: str) -> list[Badge]:
        """Those that work, the one that works longest first; none for somebody unknown."""
        mine = and_(labelers.c.name == name, works(self.clock()))
        rows = select(badges.c.id, badges.c.expires_at).select_from(badges.join(labelers)).where(mine)
        rows = rows.order_by(badges.c.expires_at.desc())
        return in_transaction(self.engine, lambda c: [Badge(*row) for row in c.execute(rows)])

    def revoke(self, name: str) -> int:
        """Make all links of somebody useless; how many there were."""

        def work(connection: sa.Connection) -> int:
            mine = and_(badges.c.labeler == self._id(connection, name), works(self.clock()))
            return connection.execute(badges.update().where(mine).values(revoked_at=self.clock())).rowcount

        return in_transaction(self.engine, work)

    def exclude(self, name: str, why: str) -> None:
        """Take somebody's answers out of all rounds that are open, and ask no more."""
        in_transaction(
            self.engine, lambda c: exclude(c, self.settings, self._id(c, name, "labeler"), why, self.clock())
        )

    def include(self, name: str) -> None:
        """Ask somebody again who was excluded; the answers that were taken out stay out."""
        none = {"excluded_at": None, "excluded_why": None}
        in_transaction(
            self.engine, lambda c: c.execute(labelers.update().where(labelers.c.id == self._id(c, name)).values(none))
        )

    def everybody(self) -> list[Person]:
        """By name."""
        links = select(func.count()).where(badges.c.labeler == labelers.c.id, works(self.clock())).scalar_subquery()
        said = select(func.count()).where(answers.c.labeler == labelers.c.id, STANDS).scalar_subquery()
        rows = select(labelers.c.name, labelers.c.role, links, said, labelers.c.excluded_why).order_by(labelers.c.name)
        return in_transaction(self.engine, lambda c: [Person(*row) for row in c.execute(rows)])

    def whose(self, badge: str) -> tuple[str, Role]:
        """Name and role of whoever has a badge. Raises Refused."""
        row = in_transaction(self.engine, lambda c: bearer(c, badge, self.clock()))
        return row.name, row.role

    def require_operator(self, badge: str) -> None:
        """Raises Refused."""
        in_transaction(self.engine, lambda c: require_operator(c, badge, self.clock()))

    def _id(self, connection: sa.Connection, name: str, role: Role | None = None) -> int:
        known = labelers.c.role == role if role else sa.true()
        found = connection.scalar(select(labelers.c.id).where(labelers.c.name == name, known))
        if found is None:
            names = connection.scalars(select(labelers.c.name).where(known).order_by(labelers.c.name)).all()
            raise UserError(f"name: there is no labeler {name!r}; there are: {', '.join(names) or 'none'}")
        return int(found)
