"""A PostgreSQL server for tests, from Debian's package: in a folder of its own, on a socket there, gone afterwards."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

PROGRAMS = Path("/usr/lib/postgresql")
"""Where Debian puts them, by version."""
START_S = 60.0


class Server:
    """Gives empty databases; whoever can open the folder may use them. It may be stopped, and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self._numbers, self._names = count(), []
        self._process: subprocess.Popen[bytes] | None = None
        data = ["-D", str(folder / "data")]
        making = [str(programs() / "initdb"), *data, "--auth=trust", "--username=tests", "--encoding=UTF8"]
        self._run([*making, "--locale=C", "--no-sync"]).wait()
        quick = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_wal_size=64MB")
        options = (*quick, "listen_addresses=", f"unix_socket_directories={folder}")
        self._command = [str(programs() / "postgres"), *data, *(word for option in options for word in ("-c", option))]

    def _run(self, command: list[str]) -> "subprocess.Popen[bytes]":
        root = os.geteuid() == 0  # as whom the server refuses to run
        owner = {"user": "postgres", "group": "postgres", "extra_groups": []} if root else {}
        with self.log.open("ab") as output:
            return subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT, **owner)

    def start(self) -> None:
        self._process = self._run(self._command)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the PostgreSQL server does not start:\n{self.log.read_text()}", pytrace=False)
                time.sleep(0.1)

    def stop(self) -> None:
        """Connections that are still open are closed."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            self._process = None

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(host=str(self.folder), user="tests", dbname="postgres", autocommit=True)

    def fresh(self) -> str:
        """The URL of an empty database."""
        name = f"tests{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        self._names.append(name)
        return f"postgresql+psycopg://tests@/{name}?host={self.folder}"

    def clear(self) -> None:
        """Databases take 7 MB each."""
        with self.connect() as connection:
            while self._names:
                connection.execute(f"DROP DATABASE {self._names.pop()} WITH (FORCE)")


def programs() -> Path:
    """The folder of the newest server's programs; fails the test when there is none."""
    found = list(PROGRAMS.glob("*/bin/initdb"))
    if not found:
        pytest.fail("these tests need a PostgreSQL server; install it with: apt-get install postgresql", pytrace=False)
    return max(found, key=lambda path: float(path.parts[-3])).parent


@contextmanager
def running() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path has at most 107 characters
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    try:
        server = Server(folder)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with running() as server:
        yield server
