"""Votes of an application's users as answers in the queue of people, in the place of leases and our page.

    feedback/ (tables that are looked at), web/api.py (votes that are sent) -> Desk -> Votes -> the tables of `queue.py`

An image goes out under a name of its own, and votes come back on names. Each becomes an answer of whoever gave it, so
that settling, sealing, late answers, exclusion and the operator's page are the same as for people who judge on our
page. A vote is known by its key and counts once, however often it comes; of one person's votes on an image the last
counts, and one that says neither yes nor no takes the person's earlier one back. Votes of nobody in particular are
answers of as many strangers as an image has.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import func, select

from kto_ray.people.people import OPERATOR, Refused, bearer
from kto_ray.people.settling import STANDS, make_void, settle
from kto_ray.people.tables import answers, items, labelers, meta, published, votes
from kto_ray.people.transactions import Transactions

APPLICATION: Final = "application"
"""Name and role of the program that sends votes."""
STRANGER = "(anonymous "
EXAMPLES = 5
EXAMPLE_OF: Mapping[str, str] = {"too_late": "{vote.image!r}", "excluded": "{vote.who!r}", "odd": "{vote.who!r}"}
POSITION = "votes read up to"

Outcome = Literal["counted", "known", "older", "taken_back", "unknown_image", "too_late", "excluded", "odd"]
"""What became of a vote: it counts; it came before; a later one of the same person came before; it is neither yes nor
no; nothing was published under that name, or that was rewound since; the image's round is sealed with a verdict; its
voter was excluded; or it cannot be understood."""


@dataclass(frozen=True)
class Vote:
    """One vote. `key` tells it from all others; `moment` is in seconds since 1970, None where that is not known."""

    key: str
    image: str
    verdict: Literal["desirable", "undesirable", "none"]
    who: str | None = None
    moment: float | None = None


@dataclass
class Outcomes:
    """How many votes came to what, and a few examples of those that came to nothing, by outcome."""

    counts: Counter[Outcome] = field(default_factory=Counter)
    examples: dict[Outcome, list[str]] = field(default_factory=dict)

    def add(self, outcome: Outcome, example: str = "") -> None:
        self.counts[outcome] += 1
        if example:
            shown = self.examples.setdefault(outcome, [])
            shown.extend([example] if example not in shown and len(shown) < EXAMPLES else [])

    def update(self, other: "Outcomes") -> None:
        self.counts.update(other.counts)
        for outcome, examples in other.examples.items():
            shown = self.examples.setdefault(outcome, [])
            shown.extend(example for example in examples if example not in shown)
            del shown[EXAMPLES:]


class Votes(Transactions):
    """See the module. Every method is one transaction, and may be repeated."""

    def announce(self, names: Mapping[str, str]) -> dict[str, str]:
        """Give samples of the queue the names under which they go out, by sample id; those that are not out yet.

        Called before anybody can see them: then no vote comes on an image that is not known. A name that was given
        before stays.
        """

        def work(connection: sa.Connection) -> dict[str, str]:
            rows = select(items.c.id, items.c.sample_id, published.c.name, published.c.at)
            rows = rows.select_from(items.outerjoin(published)).where(items.c.sample_id.in_([*names]))
            found = connection.execute(rows).all()
            for row in found:
                if row.name is None:
                    connection.execute(published.insert().values(item=row.id, name=names[row.sample_id]))
            return {row.sample_id: row.name or names[row.sample_id] for row in found if row.at is None}

        return self._do(work)

    def is_out(self, names: Sequence[str]) -> None:
        """Images were published under these names."""
        out = published.update().where(published.c.name.in_(names), published.c.at.is_(None))
        self._do(lambda connection: connection.execute(out.values(at=self.clock())))

    def position(self) -> str | None:
        """What the last votes that were taken were taken with; see `take`."""
        return self._do(lambda connection: connection.scalar(select(meta.c.value).where(meta.c.key == POSITION)))

    def take(self, new: Sequence[Vote], position: str | None = None) -> Outcomes:
        """Count votes, in order.

        Args:
            position: how far they were read, kept with them: all of it or, after a crash, nothing.
        """

        def work(connection: sa.Connection) -> Outcomes:
            outcomes = Outcomes()
            keys, names = [vote.key for vote in new], {vote.image for vote in new}
            known = set(connection.scalars(select(votes.c.key).where(votes.c.key.in_(keys))))
            shown = select(published.c.name, items).join(items).where(published.c.name.in_(names))
            images = {row.name: row for row in connection.execute(shown)}
            touched: dict[str, None] = {}
            for vote in new:
                if vote.key in known:
                    outcomes.add("known")
                    continue
                image = images.get(vote.image)
                if image is None:  # not kept: a table may be full of votes on other images
                    outcomes.add("unknown_image", repr(vote.image))
                    continue
                known.add(vote.key)
                outcome, answer = self._answer(connection, image, vote)
                connection.execute(votes.insert().values(key=vote.key, answer=answer, moment=vote.moment))
                outcomes.add(outcome, EXAMPLE_OF.get(outcome, "").format(vote=vote))
                if outcome in ("counted", "taken_back"):
                    touched[image.id] = None
            settle(connection, self.settings.overlap, touched)
            if position is not None:
                connection.execute(meta.delete().where(meta.c.key == POSITION))
                connection.execute(meta.insert().values(key=POSITION, value=position))
            return outcomes

        return self._do(work)

    def send(self, badge: str, new: Sequence[Vote]) -> Outcomes:
        """`take`, for the application. Raises Refused for others."""

        def work(connection: sa.Connection) -> None:
            if bearer(connection, badge, self.clock()).role != APPLICATION:
                raise Refused(APPLICATION, "votes are sent with the application's token, which the run prints")

        self._do(work)
        return self.take(new)

    def _answer(self, connection: sa.Connection, image: sa.Row[Any], vote: Vote) -> tuple[Outcome, int | None]:
        """What a vote comes to, and the answer that it becomes."""
        if image.sealed_in is not None:
            return "too_late", None
        if vote.who is None:
            if vote.verdict == "none":  # whose vote should it take back?
                return "taken_back", None
            voter = self._stranger(connection, image.id)
        else:
            voter = None if vote.who.startswith(STRANGER) else self._voter(connection, vote.who)
        if voter is None:
            return "odd", None
        if voter.excluded_at is not None:
            return "excluded", None
        mine = (answers.c.item == image.id, answers.c.labeler == voter.id, STANDS)
        rows = select(answers.c.id, votes.c.moment).select_from(answers.outerjoin(votes)).where(*mine)
        before = connection.execute(rows).one_or_none()
        if before is not None:
            if None not in (before.moment, vote.moment) and before.moment > vote.moment:
                return "older", None
            make_void(connection, answers.c.id == before.id, "undone")
        if vote.verdict == "none":
            return "taken_back", None
        values = {"item": image.id, "labeler": voter.id, "answer": vote.verdict, "at": self.clock(), "late": False}
        return "counted", connection.scalar(answers.insert().values(values).returning(answers.c.id))

    def _voter(self, connection: sa.Connection, name: str) -> Any:
        """Who is called so; None: nobody can be."""
        if not (name.isprintable() and name.strip() == name and 0 < len(name) <= 80):
            return None
        if name in (OPERATOR, APPLICATION):
            return None
        row = connection.execute(select(labelers).where(labelers.c.name == name)).one_or_none()
        if row is None:
            adding = labelers.insert().values(name=name, role="labeler").returning(labelers)
            row = connection.execute(adding).one()
        return row

    def _stranger(self, connection: sa.Connection, item: str) -> Any:
        """The next one who votes on an image."""
        strangers = labelers.c.name.startswith(STRANGER, autoescape=True)
        said = select(func.count()).select_from(answers.join(labelers)).where(answers.c.item == item, strangers)
        return self._voter(connection, f"{STRANGER}{(connection.scalar(said) or 0) + 1})")
