"""The console of a run: its own lines there, and what everybody else prints in `<run>/logs/`, complete.

    console, loggers of kto_ray and of plug-ins  ------------------------------> standard output and error
    Ray's actors and controllers, warnings, libraries' loggers --> Elsewhere --> <run>/logs/TIME-PID.log
                                                                     \\--------> standard error, where `verbose`

`cli_run.py` enters it around a run. Whatever writes to `sys.stdout` or `sys.stderr` meanwhile is a stranger: Ray hands
the lines of all actors of the run, wherever they are, to its driver, which prints them there. Tracebacks that end the
command or a thread of it, and what is written below Python to the process's own descriptors, are not touched.
"""

import contextlib
import io
import logging
import os
import re
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

from kto_ray.errors import UserError
from kto_ray.storage import Storage

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
STRANGERS = tuple({f"{sysconfig.get_path(name)}{os.sep}" for name in ("purelib", "platlib", "stdlib", "platstdlib")})
"""Whose code lies here is somebody else's, but for this package's own, where that is installed."""
SETTINGS = {
    "RAY_DEDUP_LOGS": "0",  # or only the first of several actors that say the same is told, and the others are counted
    "TRANSFORMERS_VERBOSITY": "error",  # it warns that torchvision, which nothing here needs, is missing
}


def hush() -> None:
    """Ask libraries to be quiet that can be asked, before they are imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


class Elsewhere(io.TextIOBase):
    """A text stream whose lines go to a file that is made when there is a first one.

    Args:
        run: the run's folder; where that is remote, the file is put there at the end.
        terminal: shows bars of downloads, if it is a terminal, all lines if `verbose`, and lines that cannot be stored.
    """

    def __init__(self, run: Storage, terminal: TextIO, verbose: bool = False) -> None:
        self.run, self.terminal, self.verbose = run, terminal, verbose
        self.name = f"logs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        self.place: str | None = None
        """Of the file; None: nobody has said anything."""
        self._file: Any = None
        self._ended = False
        self._writing = threading.RLock()

    def write(self, text: str) -> int:
        bar = text.startswith("\r")  # it writes over itself, for a terminal alone
        with self._writing:
            if self.verbose or (bar and self.terminal.isatty()):
                self.terminal.write(text)
            if not bar and (self.place or text.strip()):
                self._keep(COLOURS.sub("", text))
        return len(text)

    def _keep(self, text: str) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(text)
        except OSError:  # there is no room, or no right to write: better here than nowhere
            if not self.verbose:
                self.terminal.write(text)

    def _open(self) -> Any:
        if self.run.local is not None:
            file = self.run.local / self.name
            file.parent.mkdir(parents=True, exist_ok=True)
            opened: Any = file.open("a", encoding="utf-8", buffering=1)
        elif not self._ended:
            opened = tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="kto-ray-", suffix=".log")  # noqa: SIM115
        else:
            raise OSError("the file is put in place already")
        self.place = f"{self.run}/{self.name}"
        return opened

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        """The terminal's: what a crashing interpreter writes belongs there."""
        return self.terminal.fileno()

    def end(self) -> None:
        """Put the file in place. Loggers that were made meanwhile may still write."""
        with self._writing:
            self._ended = True
            if self._file is None:
                return
            self._file.flush()
            try:
                if self.run.local is None:
                    self.run.write(self.name, Path(self._file.name).read_bytes())
            except UserError as error:
                self.terminal.write(f"WARNING: {error}\n")
            finally:
                self._file.close()
                self._file = None


def is_own(record: logging.LogRecord) -> bool:
    """Whether it is this package's or a plug-in's; or an error of the standard library, which is about their code."""
    if record.name.partition(".")[0] == "kto_ray" or not record.pathname.startswith(STRANGERS):
        return True
    return record.levelno >= logging.ERROR and "site-packages" not in record.pathname


class OwnHandler(logging.StreamHandler[TextIO]):
    """Writes what `is_own`; above the bars of a terminal, rather than into them."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        super().__init__(stream)
        self.console = console
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self.addFilter(is_own)

    def emit(self, record: logging.LogRecord) -> None:
        if self.console.is_terminal:
            self.console.print(self.format(record), markup=False, highlight=False)
        else:
            super().emit(record)


@contextlib.contextmanager
def only_own_lines(run: Storage, verbose: bool = False) -> Iterator[tuple[Console, Elsewhere]]:
    """Around a run: its console, and where everybody else's lines go.

    Args:
        verbose: everybody else's are shown, too, and what this package logs as information.
    """
    hush()
    output, errors = sys.stdout, sys.stderr
    console, elsewhere = Console(file=output, soft_wrap=True), Elsewhere(run, errors, verbose)
    others: logging.Handler = logging.StreamHandler(cast(TextIO, elsewhere))
    others.addFilter(lambda record: not is_own(record))
    handlers = (OwnHandler(console, errors), others)
    root, own = logging.getLogger(), logging.getLogger("kto_ray")
    level, before = own.level, threading.excepthook

    def told(args: Any) -> None:
        with contextlib.redirect_stderr(errors):
            before(args)

    for handler in handlers:
        root.addHandler(handler)
    own.setLevel(logging.INFO if verbose else logging.WARNING)
    threading.excepthook = told
    stream = cast(TextIO, elsewhere)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield console, elsewhere
    finally:
        threading.excepthook = before
        own.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
        elsewhere.end()
