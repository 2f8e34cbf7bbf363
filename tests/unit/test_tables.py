"""A database that is away: waited for, said once, and not for ever."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from kto_ray.errors import UserError
from kto_ray.people import tables
from kto_ray.people.tables import in_transaction, meta, open_database


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sa.Engine]:
    monkeypatch.setattr(tables, "FIRST_WAIT_S", 0.0)
    engine = open_database(f"sqlite:///{tmp_path}/people.sqlite", "run")
    yield engine
    engine.dispose()


class Work:
    """Writes a row, but fails at first, after it has written."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.times = list(failures), 0

    def __call__(self, connection: sa.Connection) -> str:
        self.times += 1
        connection.execute(meta.insert().values(key="mine", value=str(self.times)))
        if self.failures:
            raise self.failures.pop(0)
        return "done"


def away(kind: type[sa.exc.DBAPIError] = sa.exc.OperationalError, invalidated: bool = False) -> sa.exc.DBAPIError:
    return kind("SELECT", {}, Exception("the server closed the connection"), connection_invalidated=invalidated)


def mine(engine: sa.Engine) -> list[str]:
    return in_transaction(engine, lambda c: list(c.scalars(sa.select(meta.c.value).where(meta.c.key == "mine"))))


def test_work_is_done_anew_when_the_database_answers_again(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    work = Work(away(), away(sa.exc.InterfaceError), away(sa.exc.InternalError, invalidated=True))
    assert in_transaction(engine, work) == "done"
    assert mine(engine) == ["4"]
    assert len(caplog.messages) == 2
    assert "cannot use sqlite" in caplog.messages[0]
    assert "the server closed the connection; waiting for up to 300 s" in caplog.messages[0]
    assert "answers again" in caplog.messages[1]


@pytest.mark.parametrize("error", [away(sa.exc.IntegrityError), away(sa.exc.ProgrammingError), UserError("nobody")])
def test_what_waiting_does_not_mend_is_raised_at_once(engine: sa.Engine, error: Exception) -> None:
    work = Work(error)
    with pytest.raises(type(error)):
        in_transaction(engine, work)
    assert work.times == 1
    assert mine(engine) == []


def test_patience_ends_in_a_sentence_and_then_for_everybody(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter(range(0, 10000, 100))
    monkeypatch.setattr(tables.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(tables.time, "sleep", lambda seconds: None)
    first, second = Work(*[away()] * 9), Work(*[away()] * 9)
    for work, times in ((first, 4), (second, 1)):
        with pytest.raises(UserError, match=r"^label\.human\.database: cannot use sqlite.*closed the connection"):
            in_transaction(engine, work)
        assert work.times == times
    assert len(caplog.messages) == 1
    assert in_transaction(engine, Work()) == "done"


def test_a_password_is_not_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FIRST_WAIT_S", 0.0)
    with pytest.raises(UserError, match=r"ann:\*\*\*@") as caught:
        open_database("postgresql+psycopg://ann:secret@127.0.0.1:1/name", "run", patience_s=0.01)
    assert "waiting" in caplog.text
    assert "secret" not in caplog.text + str(caught.value)
