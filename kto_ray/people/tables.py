"""Where the queue of people keeps what it knows: tables in SQLite or PostgreSQL, for `intake.py` and `queue.py`.

    items     one image to judge each: what it shows, how many answers it needs, its label once they are there
    images    the PNG of each item that somebody may be shown; see `keeping.py`
    leases    who is looking at what, until when; a lease that ended stays, so that a late answer can be told from
              one without a lease
    answers   what people said, never deleted: an answer that was taken back, or whose labeler was excluded, is void
    voids     the answers that became void, in that order: so who has counted answers learns which to count no more
    labelers  people and the operator      badges  their links: expiring, revocable
    rounds    stages of the loop           meta    facts about the whole

Where an application asks its users in the place of our page (`votes.py`), there are besides

    published   images by the names under which the application knows them
    votes       which vote became which answer: one that comes again is known

Times are seconds since 1970, as the queue's clock has them. A server that is away for a while is waited for: whatever
is done here is a transaction, and may be repeated.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import Column, ForeignKey, Index, Table, UniqueConstraint

from kto_ray.errors import UserError
from kto_ray.secrets import HIDDEN, hide_in_database

logger = logging.getLogger(__name__)

FIELD = "label.human.database"
PATIENCE_S = 300.0
"""So long a database that was there before may be away."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0
"""Before it is asked again; doubles from the first to the longest."""

LAYOUT = "1"
"""Version of these tables; a database of another one is refused."""

metadata = sa.MetaData()

meta = Table("meta", metadata, Column("key", sa.String, primary_key=True), Column("value", sa.String, nullable=False))

rounds = Table(
    "rounds",
    metadata,
    Column("stage", sa.String, primary_key=True),
    Column("number", sa.Integer, nullable=False, unique=True),
    Column("finished_at", sa.Float),  # no more images will come
    Column("sealed_at", sa.Float),
)

items = Table(
    "items",
    metadata,
    Column("id", sa.String, primary_key=True),  # random: it tells labelers nothing
    Column("sample_id", sa.String, nullable=False, unique=True),
    Column("stage", sa.String, ForeignKey("rounds.stage"), index=True),  # null: gold
    Column("number", sa.Integer),  # of the round
    Column("policy_version", sa.Integer),
    Column("prompt_id", sa.String, nullable=False),
    Column("prompt", sa.String, nullable=False),
    Column("needed", sa.Integer, nullable=False),
    Column("expected", sa.String),  # gold: the known answer
    Column("shuffle", sa.Float, nullable=False),  # the order in which items are offered
    Column("label", sa.String, index=True),  # null: open
    Column("sealed_in", sa.String, ForeignKey("rounds.stage"), index=True),
)

images = Table(
    "images",
    metadata,
    Column("item", sa.String, ForeignKey("items.id"), primary_key=True),
    Column("png", sa.LargeBinary, nullable=False),
)

labelers = Table(
    "labelers",
    metadata,
    Column("id", sa.Integer, primary_key=True),
    Column("name", sa.String, nullable=False, unique=True),
    Column("role", sa.String, nullable=False),  # "labeler" or "operator"
    Column("excluded_at", sa.Float),
    Column("excluded_why", sa.String),
)

badges = Table(
    "badges",
    metadata,
    Column("id", sa.String, primary_key=True),
    Column("labeler", sa.Integer, ForeignKey("labelers.id"), nullable=False),
    Column("expires_at", sa.Float, nullable=False),
    Column("revoked_at", sa.Float),
)

leases = Table(
    "leases",
    metadata,
    Column("id", sa.Integer, primary_key=True),  # the order in which they were granted
    Column("item", sa.String, ForeignKey("items.id"), nullable=False),
    Column("labeler", sa.Integer, ForeignKey("labelers.id"), nullable=False, index=True),
    Column("at", sa.Float, nullable=False),  # when it was granted or extended
    Column("expires_at", sa.Float, nullable=False),
    UniqueConstraint("item", "labeler"),
)

answers = Table(
    "answers",
    metadata,
    Column("id", sa.Integer, primary_key=True),
    Column("item", sa.String, ForeignKey("items.id"), nullable=False),
    Column("labeler", sa.Integer, ForeignKey("labelers.id"), nullable=False, index=True),
    Column("verdict", sa.String, key="answer", nullable=False),  # "desirable", "undesirable", "unsure", "skip"
    Column("seconds", sa.Float),  # that the person took
    Column("at", sa.Float, nullable=False),
    Column("late", sa.Boolean, nullable=False),  # after the lease had ended
    Column("void", sa.String),  # null: counts; "undone", "excluded"
    Index("answers_item", "item"),
)
Index(
    "one_answer_each",
    *(answers.c.item, answers.c.labeler),
    unique=True,
    sqlite_where=answers.c.void.is_(None),
    postgresql_where=answers.c.void.is_(None),
)

voids = Table(
    "voids",
    metadata,
    Column("id", sa.Integer, primary_key=True),
    Column("answer", sa.Integer, ForeignKey("answers.id"), nullable=False),
)

published = Table(
    "published",
    metadata,
    Column("item", sa.String, ForeignKey("items.id"), primary_key=True),
    Column("name", sa.String, nullable=False, unique=True),
    Column("at", sa.Float),  # null: it is being written
)

votes = Table(
    "votes",
    metadata,
    Column("key", sa.String, primary_key=True),  # what tells it from all others
    Column("answer", sa.Integer, ForeignKey("answers.id"), index=True),  # null: it is none, or came too late
    Column("moment", sa.Float),  # that it says it was given at
)


def open_database(url: str, run: str, patience_s: float = 0, make: bool = True) -> sa.Engine:
    """Connect, and make the tables where they are missing.

    Args:
        url: of SQLAlchemy.
        run: whose database it is, for instance the URI of the run's folder.
        patience_s: how long a server may be away; not at all where somebody waits to hear of a mistake.
        make: False leaves a database without tables as it is.

    Raises:
        UserError: a URL that cannot be read, a driver that is not installed, a server that does not answer, a file
            that cannot be written, or the database of another run or version.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # ValueError: a port that is no number; it may be half a password
        raise UserError(
            f"{FIELD}: {hide_in_database(url)!r} is not a database URL; write for instance "
            "postgresql+psycopg://user@host/name, or leave it out for a SQLite file in the run's folder"
        ) from None
    shown = hide_in_database(url)
    try:
        engine = sa.create_engine(parsed, hide_parameters=True, **_options(parsed))
    except (ImportError, sa.exc.NoSuchModuleError) as error:
        raise UserError(
            f"{FIELD}: no driver for {shown}: {error}; for PostgreSQL install kto-ray[postgres] "
            "and write postgresql+psycopg://"
        ) from error
    _one_after_the_other(engine)

    def claim(connection: sa.Connection) -> None:
        if not make and not sa.inspect(connection).has_table(meta.name):
            return
        metadata.create_all(connection)
        found = {row.key: row.value for row in connection.execute(sa.select(meta))}
        for key, value in {"layout": LAYOUT, "run": run}.items():
            if key not in found:
                connection.execute(meta.insert().values(key=key, value=value))
            elif found[key] != value:
                raise UserError(
                    f"{FIELD}: {shown} belongs to {key} {found[key]!r}, not {value!r}; give each run a database"
                )

    try:
        in_transaction(engine, claim, patience_s)
    except UserError:
        engine.dispose()
        raise
    except sa.exc.DBAPIError as error:
        engine.dispose()
        raise _unusable(engine, error) from error
    return engine


WAIT_S = 30
"""So long a transaction waits for its turn."""


def _options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": WAIT_S}}
    # A stricter level would show a transaction the rows from before its turn.
    options: dict[str, Any] = {"isolation_level": "READ COMMITTED", "pool_pre_ping": True}
    if url.get_driver_name() == "psycopg" and "connect_timeout" not in url.query:
        options["connect_args"] = {"connect_timeout": int(LONGEST_WAIT_S)}  # for ever, where a machine is gone
    return options


def _one_after_the_other(engine: sa.Engine) -> None:
    """Whoever else is connected (the command line): a transaction begins when no other one runs, even to read."""
    if engine.name == "sqlite":
        begin = "BEGIN IMMEDIATE"
    else:
        begin = f"SET LOCAL lock_timeout = '{WAIT_S}s'; SELECT pg_advisory_xact_lock(0)"

    def on_connect(connection: Any, _record: Any) -> None:
        if engine.name == "sqlite":
            connection.isolation_level = None  # SQLAlchemy begins transactions, not the driver
            for pragma in ("synchronous = FULL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}")

    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)


Result = TypeVar("Result")

_away_since: WeakKeyDictionary[sa.Engine, float] = WeakKeyDictionary()
"""Of engines whose database is away: who calls after its time is up is told at once."""


def in_transaction(
    engine: sa.Engine, work: Callable[[sa.Connection], Result], patience_s: float = PATIENCE_S
) -> Result:
    """Do work in one transaction: all of it or, where it raises, nothing.

    When the database is away it is waited for, and the work is done anew: also when it is not known whether the work
    before was kept, so work must be such that doing it twice does no harm.

    Raises:
        UserError: the database was away for `patience_s`.
    """
    wait_s = FIRST_WAIT_S
    while True:
        try:
            with engine.begin() as connection:
                result = work(connection)
        except sa.exc.DBAPIError as error:
            if not _is_away(error):
                raise
            now = time.monotonic()
            since = _away_since.setdefault(engine, now)
            if now - since >= patience_s:
                raise _unusable(engine, error) from error
            if since == now:
                logger.warning("%s; waiting for up to %.0f s", _unusable(engine, error), patience_s)
            time.sleep(wait_s)
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)
        else:
            if _away_since.pop(engine, None) is not None:
                logger.warning("%s: the database answers again", FIELD)
            return result


def _is_away(error: sa.exc.DBAPIError) -> bool:
    """Whether it is the database's surroundings that failed, which may pass, rather than what it was asked for."""
    return error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)


def _unusable(engine: sa.Engine, error: sa.exc.DBAPIError) -> UserError:
    said, password = " ".join(str(error.orig).split()), engine.url.password
    shown = hide_in_database(engine.url.render_as_string(hide_password=True))
    return UserError(f"{FIELD}: cannot use {shown}: {said.replace(password, HIDDEN) if password else said}")
