"""How long the database keeps an image: as long as somebody may be shown it, so that it does not grow with the run.

`desk.py` has images deleted with every seal, also what an earlier one left, and `rewind.py` has those put back that
people may be asked about again. Kept are

- images that may be offered, and those that somebody looks at;
- judged ones until their seal: till then answers may be taken back;
- the latest of each label, which are on the operator's page (`tallies.py`), and gold.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy import and_, exists, func, not_, or_, select

from kto_ray.people import tallies
from kto_ray.people.settling import OPEN
from kto_ray.people.tables import answers, images, in_transaction, items, leases, rounds

BATCH = 64
"""So many images are deleted at a time: other calls come in between."""

HAS_IMAGE = exists().where(images.c.item == items.c.id)


def timely(connection: sa.Connection, max_policy_lag: int) -> sa.ColumnElement[bool]:
    """Whether an item could be trained on, if it was judged now."""
    sealed = connection.scalar(select(func.max(rounds.c.number)).where(rounds.c.sealed_at.is_not(None)))
    upcoming = 0 if sealed is None else sealed + 1  # the round that an answer would go into
    return items.c.policy_version >= upcoming - max_policy_lag


def _asked_about(connection: sa.Connection, max_policy_lag: int) -> sa.ColumnElement[bool]:
    """Whether an item may be offered, at once or when an answer is taken back."""
    judged = and_(items.c.label.is_not(None), items.c.sealed_in.is_(None))
    return and_(items.c.stage.is_not(None), or_(judged, and_(OPEN, timely(connection, max_policy_lag))))


def spare(engine: sa.Engine, max_policy_lag: int, now: float) -> list[str]:
    """Items whose images nobody will be shown any more."""

    def work(connection: sa.Connection) -> list[str]:
        looked_at = exists().where(leases.c.item == items.c.id, leases.c.expires_at > now)
        shown = or_(items.c.stage.is_(None), _asked_about(connection, max_policy_lag), and_(OPEN, looked_at))
        latest = select(func.max(answers.c.id)).where(answers.c.item == items.c.id).scalar_subquery()
        rows = select(items.c.id, items.c.label, not_(shown).label("spare"))
        rows = rows.where(items.c.id.in_(select(images.c.item))).order_by(latest.desc())
        found, labels = [], Counter[str]()
        for row in connection.execute(rows):
            if row.label is not None:
                labels[row.label] += 1
            if row.spare and (row.label is None or labels[row.label] > tallies.RECENT):
                found.append(row.id)
        return found

    return in_transaction(engine, work)


def drop(engine: sa.Engine, keys: Sequence[str]) -> None:
    """Delete the images of items."""
    in_transaction(engine, lambda connection: connection.execute(images.delete().where(images.c.item.in_(keys))))


def lacking(engine: sa.Engine, max_policy_lag: int) -> dict[str, set[str]]:
    """Samples, by stage, that people may be asked about, without an image: there may be some after a rewinding."""

    def work(connection: sa.Connection) -> dict[str, set[str]]:
        asked = _asked_about(connection, max_policy_lag)
        found: dict[str, set[str]] = {}
        for row in connection.execute(select(items.c.stage, items.c.sample_id).where(asked, ~HAS_IMAGE)):
            found.setdefault(row.stage, set()).add(row.sample_id)
        return found

    return in_transaction(engine, work)


def put_back(engine: sa.Engine, pngs: Mapping[str, bytes]) -> None:
    """Have images again.

    Args:
        pngs: of `lacking` samples, by their ids.
    """

    def work(connection: sa.Connection) -> None:
        for row in connection.execute(select(items).where(items.c.sample_id.in_([*pngs]), ~HAS_IMAGE)).all():
            connection.execute(images.insert().values(item=row.id, png=pngs[row.sample_id]))

    in_transaction(engine, work)
