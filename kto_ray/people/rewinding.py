"""Taking rounds out of the queue of people, as if they had never been asked about them. `rewind.py` calls it."""

import secrets
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import select

from kto_ray.people.tables import (
    answers,
    images,
    in_transaction,
    items,
    leases,
    meta,
    published,
    rounds,
    voids,
    votes,
)

REWOUND = "rewound"
"""Fact that differs after every rewinding: who has counted answers has to begin anew."""


def take_back(engine: sa.Engine, stages: Sequence[str]) -> None:
    """Forget rounds, their images and the answers on them.

    Answers on images of other rounds stay, also those that were sealed with one of these: they are sealed anew with the
    next round.
    """

    def work(connection: sa.Connection) -> None:
        gone = select(items.c.id).where(items.c.stage.in_(stages))
        connection.execute(meta.delete().where(meta.c.key == REWOUND))
        connection.execute(meta.insert().values(key=REWOUND, value=secrets.token_hex(8)))
        said = select(answers.c.id).where(answers.c.item.in_(gone))
        for table in (voids, votes):
            connection.execute(table.delete().where(table.c.answer.in_(said)))
        for table in (answers, leases, images, published):
            connection.execute(table.delete().where(table.c.item.in_(gone)))
        connection.execute(items.delete().where(items.c.stage.in_(stages)))
        connection.execute(items.update().where(items.c.sealed_in.in_(stages)).values(sealed_in=None))
        connection.execute(rounds.delete().where(rounds.c.stage.in_(stages)))

    in_transaction(engine, work)
