"""Runs `jobs/online_kto.py`, or another job, as a process, watches its run folder, and kills what it is told to.

Most of what a driver of a small run does is to import. So they are forked from a process that has done that already,
but for those that must be as a user starts them.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import psutil

from kto_ray.console import SETTINGS
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage

REPOSITORY = Path(__file__).parents[2]

SMALL = [
    "rounds=2",
    "generate.images_per_round=24",
    "generate.batch_size=4",
    "generate.steps=2",
    "generate.min_replicas=1",
    "generate.max_replicas=1",
    "label.scorers=tests.plugins:CoinScorer",
    "train.global_batch=8",
    "train.micro_batch=8",
    "train.resources.threads=1",
    "evaluate.max_prompts=4",
    "evaluate.images_per_prompt=2",
]
"""Overrides of `shapes_demo` that make a run of seconds, on any model."""


JOB = "jobs/online_kto.py"
PLAIN = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
"""Ray then takes 127.0.0.1 for what it is, not for another address of this machine, and asks for no token."""


class Driver(Protocol):
    """What tests need of a process; `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Forked:
    """A job, in a child of the process that has imported all.

    Args:
        words: its file, options and overrides.
    """

    def __init__(self, log: Path, env: dict[str, str], words: Sequence[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kto_ray.loop", "kto_ray.offline.loop", "kto_ray.cli_run"])
        with patch.dict(os.environ, environment() | SETTINGS | PLAIN, clear=True):  # read by what is imported
            multiprocessing.forkserver.ensure_running()
        self._process = context.Process(target=_drive, args=[log, env | SETTINGS | PLAIN, [*words]], daemon=True)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(JOB, timeout or 0)
        return self._process.exitcode


def _drive(log: Path, env: dict[str, str], words: list[str]) -> None:
    """Be the job: its environment, its output, its command line."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(REPOSITORY)
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


@dataclass
class Job:
    """One process of the job, and its run folder; Ray's processes are children of it, or of `nodes`."""

    process: Driver
    run: Path
    log: Path
    nodes: tuple[int, ...] = ()

    def wait(self, timeout: float = 1000) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end:\n{self.output()[-4000:]}") from None

    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, there: Callable[[], Any], timeout: float = 1000) -> Any:
        """Poll until `there()` is true (its value is returned), while the job lives."""
        deadline = time.monotonic() + timeout
        while not (value := there()):
            assert self.process.poll() is None, f"the job ended early:\n{self.output()[-4000:]}"
            assert time.monotonic() < deadline, f"never happened:\n{self.output()[-4000:]}"
            time.sleep(0.05)
        return value

    def actors(self, name: str) -> list[psutil.Process]:
        """The job's Ray worker processes whose title has `name`, for instance "ServeReplica"."""
        found = []
        parents = self.nodes or (self.process.pid,)
        for process in [child for pid in parents for child in psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.Error):
                if process.name().startswith("ray::") and name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to the driver; Ray's processes of this job follow it. Returns when all are gone."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)


def environment() -> dict[str, str]:
    """This process's, with this checkout importable in every worker, and without a cluster to join."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return inherited | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def start(
    folder: Path,
    name: str,
    overrides: list[str],
    env: dict[str, str] | None = None,
    program: Sequence[str] | None = None,
    job: Sequence[str] = (JOB,),
) -> Job:
    """
    Args:
        env: of a cluster that it joins; None: it begins one of its own.
        program: that a fresh Python is to run; None: the job, forked.
        job: its file, and options.
    """
    log, env = folder / f"{name}.log", env or environment()
    words = [f"run={name}", f"runs_folder={folder}", *SMALL, *overrides]
    if program is None:
        return Job(Forked(log, env, [*job, *words]), folder / name, log)
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *program, *words], cwd=REPOSITORY, env=env, stdout=output, stderr=subprocess.STDOUT
        )
    return Job(process, folder / name, log)


def summary(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return value


def sample_ids(run: Path) -> list[set[str]]:
    """Ids of all samples, round by round."""
    return [round_.sample_ids for round_ in RoundStore(Storage(str(run))).rounds()]
