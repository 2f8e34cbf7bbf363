"""The queue of people in PostgreSQL: all that holds of SQLite, and the command line at work while the queue is."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings

from tests import postgres
from tests.office import Facts, refused
from tests.postgres import Server, server  # noqa: F401  a fixture
from tests.queue_machine import check_promises
from tests.unit.test_keeping import test_whoever_may_be_shown_an_image_is  # noqa: F401
from tests.unit.test_label_queue import *  # noqa: F403  the same tests, in other databases
from tests.unit.test_label_queue import EFFORT
from tests.unit.test_labelers_cli import Desk, write_run
from tests.unit.test_tallies import test_the_page_shows_what_a_recount_of_all_rows_gives  # noqa: F401


@pytest.fixture
def fresh(server: Server) -> Iterator[Callable[[], str]]:  # noqa: F811
    """URLs of empty databases."""
    yield server.fresh
    server.clear()


@pytest.fixture(params=range(2))
def seed(request: pytest.FixtureRequest) -> int:
    """Of fewer lives: a server takes ten times as long as a file."""
    number: int = request.param
    return number


@pytest.fixture
def effort() -> settings:
    return settings(EFFORT, max_examples=10)


@pytest.mark.parametrize(("command", "why"), [("revoke", "revoked"), ("exclude", "excluded")])
def test_the_command_line_works_while_the_queue_does(
    server: Server,  # noqa: F811
    tmp_path: Path,
    command: str,
    why: str,
) -> None:
    run = write_run(tmp_path, "label.labeler=human", f"label.human.database={server.fresh()}")
    desk = Desk(run, images=300)
    ann, told = desk.people.admit("ann").id, 0
    program = Path(sys.executable).with_name("kto-ray")
    with subprocess.Popen([program, "labelers", command, "ann", "--run", run]) as process:
        with refused(why):
            while process.poll() is None:
                for offer in desk.queue.lease(ann):
                    desk.queue.answer(ann, offer.item, "desirable")
                    told += 1
            desk.queue.lease(ann)
        assert process.wait() == 0
    facts = Facts.read(desk.engine)
    check_promises(facts, "majority", desk.clock())
    assert [row["void"] for row in facts.answers] == [None if command == "revoke" else "excluded"] * told
    desk.engine.dispose()


def test_a_server_that_is_away_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with postgres.running() as own, ThreadPoolExecutor(1) as thread:
        desk = Desk(write_run(tmp_path, f"label.human.database={own.fresh()}"), images=2)
        ann = desk.people.admit("ann").id
        (offer,) = desk.queue.lease(ann)
        own.stop()
        answering = thread.submit(desk.queue.answer, ann, offer.item, "desirable")
        while "waiting for up to" not in caplog.text:
            assert not answering.done()
            time.sleep(0.05)
        own.start()
        answering.result()
        assert [row["void"] for row in Facts.read(desk.engine).answers] == [None]
        desk.engine.dispose()
    said = [record.getMessage() for record in caplog.records if record.name == "kto_ray.people.tables"]
    assert len(said) == 2
    assert "the database answers again" in said[1]


def test_without_a_server_the_tests_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "PROGRAMS", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="install it with: apt-get install postgresql"):
        postgres.programs()
