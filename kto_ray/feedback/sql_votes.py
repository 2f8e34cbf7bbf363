"""Votes as rows of a table of any database that SQLAlchemy opens; only those that are new are read.

A column that never gets smaller says which are new (`cursor`, by default that of ids). Rows of one database become
visible in another order than their numbers have, where transactions overlap; so what was read within the last
`look_back_s` is looked through again, and what came before is left out.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from kto_ray.config.feedback import Feedback
from kto_ray.data.columns import FoundColumns
from kto_ray.data.sql_rows import open_engine, reason
from kto_ray.errors import UserError
from kto_ray.feedback.understanding import NewVotes, Understanding, VoteRow, columns_of
from kto_ray.people.votes import Outcomes
from kto_ray.secrets import hide_in_database, without_credentials

FIELD = "label.feedback"
AT_ONCE = 500
"""Votes that are counted in one go."""
OPTIONAL = frozenset({"who", "when"})


class SqlVotes:
    """See the module; a `VoteTable`."""

    def __init__(self, settings: Feedback) -> None:
        assert settings.database
        self.settings, self.database = settings, settings.database
        self.understanding = Understanding(settings)
        url = settings.database.get_secret_value()
        self.where = f"{settings.table or 'the query'} of {hide_in_database(url)}"
        what = json.dumps([without_credentials(url), settings.table, settings.query, settings.cursor])
        self._source = hashlib.sha256(what.encode()).hexdigest()[:16]
        self._reached: deque[tuple[float, Any]] = deque()  # when the table was read up to where
        self._seen: dict[str, Any] = {}  # where rows stand that are looked through again

    @cached_property
    def engine(self) -> sa.Engine:
        return open_engine(self.database, f"{FIELD}.database")

    @cached_property
    def _rows(self) -> sa.FromClause:
        if self.settings.query:
            return sa.text(self.settings.query.rstrip().rstrip(";")).columns().subquery("votes")
        assert self.settings.table
        schema, _, name = self.settings.table.rpartition(".")
        return sa.table(name, schema=schema or None)

    def _ask(self, connection: sa.Connection, query: sa.Select[Any]) -> sa.CursorResult[Any]:
        return connection.execution_options(yield_per=AT_ONCE).execute(query)

    def _refused(self, error: sa.exc.SQLAlchemyError) -> UserError:
        field = f"{FIELD}.{'query' if self.settings.query else 'table'}"
        return UserError(f"{field}: {self.where} does not answer: {reason(error)}")

    @cached_property
    def columns(self) -> FoundColumns:
        all_: sa.Select[Any] = sa.select(sa.literal_column("*")).select_from(self._rows)
        try:
            with self.engine.connect() as connection:
                names = list(self._ask(connection, all_.limit(0)).keys())
        except sa.exc.SQLAlchemyError as error:
            raise self._refused(error) from error
        cursor = self.settings.cursor
        if cursor and cursor not in names:
            raise UserError(
                f"{FIELD}.cursor: {self.where} has no column {cursor!r}; it has: {', '.join(map(repr, names))}"
            )
        return columns_of(names, self.settings, self.where, FIELD, OPTIONAL)

    @property
    def _cursor(self) -> str:
        return self.settings.cursor or self.columns["id"]

    def check(self) -> FoundColumns:
        found = self.columns
        try:
            with self.engine.connect() as connection:
                first = connection.execute(self._new(None).limit(1)).one_or_none()
        except sa.exc.SQLAlchemyError as error:
            raise self._refused(error) from error
        if first is not None:
            self._encoded(first[0])
        return found

    def _new(self, start: Any) -> sa.Select[Any]:
        """The cursor, the id, and the cells of `VoteRow`, from a place on, which may have got more rows."""
        of = self.columns
        cursor: sa.ColumnElement[Any] = sa.column(self._cursor)
        cells: list[sa.ColumnElement[Any]] = [cursor]
        cells += [sa.column(of[what]) for what in ("id", "image", "verdict")]
        cells += [sa.column(name) if (name := of.get(what)) else sa.null() for what in ("who", "when")]
        named = [cell.label(f"cell_{number}") for number, cell in enumerate(cells)]
        new = cursor.is_not(None) if start is None else cursor >= start
        return sa.select(*named).select_from(self._rows).where(new).order_by(cursor, sa.column(of["id"]))

    def read(self, position: str | None) -> Iterator[NewVotes]:
        if not self._reached:
            self._reached.append((time.monotonic(), self._start(position)))
        start = self._settled()
        try:
            with self.engine.connect() as connection:
                for rows in self._ask(connection, self._new(start)).partitions(AT_ONCE):
                    yield self._votes(rows)
        except sa.exc.SQLAlchemyError as error:
            raise self._refused(error) from error

    def _votes(self, rows: Sequence[sa.Row[Any]]) -> NewVotes:
        odd = Outcomes()
        new: list[VoteRow] = []
        for row in rows:
            place, key, *cells = tuple(row)
            # A row that was changed, and so moved, is another vote.
            name = f"table:{key}" if self._cursor == self.columns["id"] else f"table:{key}@{place}"
            if name in self._seen:
                continue
            self._seen[name] = place
            if key is None:
                odd.add("odd", f"a row without {self.columns['id']}")
            else:
                new.append(VoteRow(name, *cells))
        furthest, place = self._reached[-1][1], rows[-1][0]
        self._reached.append((time.monotonic(), place if furthest is None else max(furthest, place)))
        position = {"source": self._source, "at": self._encoded(self._settled())}
        return NewVotes(self.understanding.votes(new, odd), odd, json.dumps(position))

    def _settled(self) -> Any:
        """Up to where nothing new comes any more; what was seen before that is forgotten."""
        now, before = time.monotonic(), self._reached[0][1]
        while len(self._reached) > 1 and self._reached[1][0] <= now - self.settings.look_back_s:
            self._reached.popleft()
        place = self._reached[0][1]
        if place != before:
            self._seen = {name: at for name, at in self._seen.items() if at >= place}
        return place

    def _start(self, position: str | None) -> Any:
        known: Mapping[str, Any] = json.loads(position) if position else {}
        if known.get("source") != self._source:
            return None
        at = known["at"]
        if not isinstance(at, dict):
            return at
        return datetime.fromisoformat(at["time"]) if "time" in at else Decimal(at["number"])

    def _encoded(self, place: Any) -> Any:
        """A place as JSON."""
        if place is None or (isinstance(place, int | float | str) and not isinstance(place, bool)):
            return place
        if isinstance(place, Decimal):
            return {"number": str(place)}
        if isinstance(place, datetime | date):
            return {"time": place.isoformat()}
        raise UserError(
            f"{FIELD}.cursor: column {self._cursor!r} of {self.where} holds {type(place).__name__}s; give one that "
            "grows from vote to vote, a number or a time"
        )
