"""The clock that leases, answers and seals are dated by."""

import time

import sqlalchemy as sa
from sqlalchemy import func, select

from kto_ray.people.tables import answers, in_transaction, leases


class Clock:
    """Seconds since 1970 that never go back and never jump, whatever happens to the machine's clock.

    Args:
        last: a time that has been before, by an earlier clock.
    """

    def __init__(self, last: float = 0) -> None:
        self._offset = max(time.time(), last) - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


def clock_of(engine: sa.Engine) -> Clock:
    """One that goes on where the earlier clock of a database ended."""
    granted, answered = (select(func.max(table.c.at)).scalar_subquery() for table in (leases, answers))
    times = in_transaction(engine, lambda connection: connection.execute(select(granted, answered)).one())
    return Clock(max(value or 0.0 for value in times))
