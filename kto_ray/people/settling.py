"""How answers become a label: the rule, and keeping the items' labels as their answers have it.

`queue.py` settles items when answers come or are taken back, `people.py` when somebody is excluded.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import sqlalchemy as sa
from sqlalchemy import and_, func, select

from kto_ray.config.people import Overlap
from kto_ray.people.tables import answers, items, voids, votes
from kto_ray.records import Label

STANDS = answers.c.void.is_(None)
COUNTS = and_(STANDS, answers.c.answer != "skip")
"""Whether an answer is one of those that an item needs."""
OPEN = and_(items.c.label.is_(None), items.c.sealed_in.is_(None))
"""Whether people are still asked about an item (or are as long as gold is mixed in)."""


def decide(overlap: Overlap, said: Sequence[str]) -> Label:
    """The label of one image, from its answers that count ("unsure" among them), in order; there is at least one."""
    yes, no = said.count("desirable"), said.count("undesirable")
    if not yes + no:
        return "abstain"
    match overlap.rule:
        case "unanimous":
            return "desirable" if yes == len(said) else "undesirable" if no == len(said) else "abstain"
        case "share":
            return "desirable" if yes / (yes + no) >= overlap.least_yes else "undesirable"
        case "latest":
            return "desirable" if [word for word in said if word != "unsure"][-1] == "desirable" else "undesirable"
    return "desirable" if yes > no else "undesirable" if no > yes else "abstain"


def make_void(connection: sa.Connection, which: sa.ColumnElement[bool], why: Literal["undone", "excluded"]) -> None:
    """Let answers count no more; those that are void already stay as they are."""
    standing = and_(which, STANDS)
    connection.execute(voids.insert().from_select(["answer"], select(answers.c.id).where(standing)))
    connection.execute(answers.update().where(standing).values(void=why))


def settle(connection: sa.Connection, overlap: Overlap, keys: Iterable[str]) -> None:
    """Let the labels of items follow from their answers. What is sealed, and gold, stays as it is."""
    for key in keys:
        item = connection.execute(select(items).where(items.c.id == key)).one()
        counting = select(answers.c.answer).select_from(answers.outerjoin(votes)).where(answers.c.item == key, COUNTS)
        given_at = func.coalesce(votes.c.moment, answers.c.at)
        said = connection.scalars(counting.order_by(given_at, answers.c.id)).all()
        label = decide(overlap, said) if len(said) >= item.needed else None
        if item.expected is None and item.sealed_in is None and label != item.label:
            connection.execute(items.update().where(items.c.id == key).values(label=label))
