"""What `queue.py`, `intake.py` and `votes.py` have in common: each of their methods is one transaction."""

from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

from kto_ray.config.people import Human
from kto_ray.people.tables import in_transaction

Result = TypeVar("Result")


class Transactions:
    """Works on people's database.

    Args:
        engine: of `tables.open_database`.
        clock: seconds since 1970, that never go back; see `clock.py`.
    """

    def __init__(self, engine: sa.Engine, settings: Human, clock: Callable[[], float]) -> None:
        self.engine, self.settings, self.clock = engine, settings, clock

    def _do(self, work: Callable[[sa.Connection], Result]) -> Result:
        return in_transaction(self.engine, work)
