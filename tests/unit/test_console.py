"""Whose lines stand on the console of a run, and that all others are kept, whole and where they are looked for."""

import io
import logging
import sys
import threading
from pathlib import Path

import pytest

from kto_ray.console import Elsewhere, only_own_lines
from kto_ray.storage import Storage


def logs(run: Path) -> str:
    (file,) = (run / "logs").iterdir()
    return file.read_text()


def library(level: int, message: str, path: str = threading.__file__, name: str = "somebody") -> logging.LogRecord:
    """What code logs that lies at `path`, by default in Python's own library."""
    return logging.LogRecord(name, level, path, 1, message, None, None)


def test_own_lines_are_shown_and_all_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with only_own_lines(Storage(str(tmp_path))) as (console, elsewhere):
        assert elsewhere.place is None
        console.print("round 0: 3 yes")
        logging.getLogger("kto_ray.policies").warning("of ours")
        logging.getLogger("my_taste").warning("of a plug-in")
        print("\x1b[36m(Replica pid=3)\x1b[0m of an actor")
        print("of Ray", file=sys.stderr)
        logging.StreamHandler().handle(library(logging.WARNING, "of a logger with a handler of its own"))
        logging.getLogger().handle(library(logging.WARNING, "of a library"))
        logging.getLogger().handle(library(logging.ERROR, "Task exception was never retrieved"))
    said = capsys.readouterr()
    assert said.out == "round 0: 3 yes\n"
    assert said.err.splitlines() == [
        "WARNING: of ours",
        "WARNING: of a plug-in",
        "ERROR: Task exception was never retrieved",
    ]
    kept = logs(tmp_path)
    assert kept.startswith("(Replica pid=3) of an actor\nof Ray\n")
    assert kept.endswith("of a logger with a handler of its own\nof a library\n")
    assert elsewhere.place == str(next((tmp_path / "logs").iterdir()))


def test_verbose_shows_and_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with only_own_lines(Storage(str(tmp_path)), verbose=True):
        logging.getLogger("kto_ray.generate.client").info("a replica draws 8 images at once")
        print("(Replica pid=3) of an actor")
    assert capsys.readouterr().err == "INFO: a replica draws 8 images at once\n(Replica pid=3) of an actor\n"
    assert logs(tmp_path) == "(Replica pid=3) of an actor\n"


def test_a_threads_traceback_comes_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has put its own there

    def fails() -> None:
        raise ValueError("in a thread")

    with only_own_lines(Storage(str(tmp_path))):
        thread = threading.Thread(target=fails)
        thread.start()
        thread.join()
    assert "ValueError: in a thread" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_remote_run_has_the_file_at_the_end() -> None:
    run = Storage("memory://a-bucket/logged")
    elsewhere = Elsewhere(run, io.StringIO())
    elsewhere.write("of Ray\n")
    assert run.names("logs") == []
    elsewhere.end()
    (name,) = run.names("logs")
    assert run.read(f"logs/{name}") == b"of Ray\n"
    assert elsewhere.place == f"memory://a-bucket/logged/logs/{name}"


def test_what_cannot_be_kept_is_shown(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    terminal = io.StringIO()
    elsewhere = Elsewhere(Storage(str(tmp_path)), terminal)
    elsewhere.write("of Ray\n")
    elsewhere.end()
    assert terminal.getvalue() == "of Ray\n"


def test_a_logger_that_outlives_the_run_may_still_write(tmp_path: Path) -> None:
    elsewhere = Elsewhere(Storage(str(tmp_path)), io.StringIO())
    elsewhere.write("first\n")
    elsewhere.end()
    elsewhere.write("late\n")
    elsewhere.end()
    assert logs(tmp_path) == "first\nlate\n"


def test_bars_of_downloads_are_for_a_terminal_alone(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    elsewhere = Elsewhere(Storage(str(tmp_path)), terminal)
    elsewhere.write("\rmodel.safetensors: 10%")
    elsewhere.end()
    assert terminal.getvalue() == "\rmodel.safetensors: 10%"
    assert list(tmp_path.iterdir()) == []
