"""A Ray head as a user starts one, and jobs submitted to it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.end_to_end import jobs

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Head:
    """A Ray head of this test's own, on loopback, with token authentication."""

    env: dict[str, str]
    gcs: str
    logs: Path
    nodes: list["subprocess.Popen[bytes]"]
    metrics: list[int] = field(default_factory=list)
    """Ports of the nodes' metrics endpoints."""

    def start_node(self, *arguments: str) -> None:
        """`ray start` in the foreground of a child process."""
        command = [RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        # Ray's own default is one port for all agents of a machine.
        self.metrics.append(free_port())
        command += [
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={self.metrics[-1]}",
            *arguments,
        ]
        with (self.logs / f"node-{len(self.nodes)}.log").open("w") as log:
            self.nodes.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT))

    def submit(self, folder: Path, name: str, overrides: list[str], submission: str | None = None) -> jobs.Job:
        """`ray job submit` of a run; the process is the client's, which follows the job to its end.

        Args:
            submission: id of the job; None: the run's name.
        """
        log = folder / f"{name}.log"
        with log.open("a") as output:
            process = subprocess.Popen(
                [
                    *(RAY, "job", "submit", "--working-dir", ".", "--submission-id", submission or name, "--"),
                    *("python", "jobs/online_kto.py", f"run={name}", f"runs_folder={folder}"),
                    *(*jobs.SMALL, *overrides),
                ],
                cwd=jobs.REPOSITORY,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return jobs.Job(process, folder / name, log, tuple(node.pid for node in self.nodes))

    def scrape(self) -> dict[str, float]:
        """What Prometheus would read from all nodes now: values by series, as `name{tag="value",...}` has them."""
        found = {}
        for port in self.metrics:
            with contextlib.suppress(OSError):  # it is not there yet
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
                for line in text.splitlines():
                    if not line.startswith("#"):
                        series, _, value = line.rpartition(" ")
                        found[series] = float(value)
        return found

    def stop(self) -> None:
        family = [child for node in self.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
            node.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            process.kill()


@contextlib.contextmanager
def running_head(tmp_path: Path, cpus: int, gpus: int = 0, report_s: int = 10, plain: bool = False) -> Iterator[Head]:
    """A head, until the end of the block.

    Args:
        gpus: fictional ones.
        plain: one for forked drivers, which show no token; no node can join it.
        report_s: every so often Ray's processes report metrics, all of them, which costs as much as a small run.
    """
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, env={**os.environ, "HOME": str(tmp_path)})
    dashboard, gcs = free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    env = jobs.environment() | {
        "COLUMNS": "300",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / ".ray" / "auth_token"),
        "RAY_API_SERVER_ADDRESS": address,
        "RAY_metrics_report_interval_ms": str(1000 * report_s),
    }
    if plain:
        env |= jobs.PLAIN
    head = Head(env, f"127.0.0.1:{gcs}", tmp_path, [])
    with tempfile.TemporaryDirectory(prefix="kto") as short:  # Ray's sockets allow only short paths
        head.start_node(
            *("--head", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--port={gcs}", f"--temp-dir={short}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        )
        try:
            wait_for_jobs(head)
            yield head
        finally:
            head.stop()


@contextlib.contextmanager
def shared_ray(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """A Ray until the end of the block, without a dashboard; gives the environment of the drivers that join it."""
    head = Head(jobs.environment() | jobs.PLAIN, f"127.0.0.1:{free_port()}", folder, [])
    with tempfile.TemporaryDirectory(prefix="kto") as short:
        port = head.gcs.rpartition(":")[2]
        head.start_node(
            *("--head", f"--num-cpus={cpus}", f"--port={port}", f"--temp-dir={short}", "--include-dashboard=false")
        )
        try:
            deadline = time.monotonic() + 240
            while "Ray runtime started" not in (log := (folder / "node-0.log").read_text()):
                assert head.nodes[0].poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.2)
            yield head.env | {"RAY_ADDRESS": head.gcs}
        finally:
            head.stop()


def wait_for_jobs(head: Head) -> None:
    """Until the head takes jobs: its dashboard answers before the agent that starts them does."""
    deadline = time.monotonic() + 240
    probe = [RAY, "job", "submit", "--no-wait", "--", "true"]
    while subprocess.run(probe, env=head.env, capture_output=True).returncode:
        log = (head.logs / "node-0.log").read_text()
        assert head.nodes[0].poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(1)
