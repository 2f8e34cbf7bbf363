"""`ray job submit` on a head that `ray start` began: two DDP workers, full fine-tuning, policy lag 1, a v-model."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
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

    def start_node(self, *arguments: str) -> None:
        """`ray start` in the foreground of a child process."""
        command = [RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        # Ray's own default is one port for all agents of a machine.
        command += [f"--dashboard-agent-listen-port={free_port()}", *arguments]
        with (self.logs / f"node-{len(self.nodes)}.log").open("w") as log:
            self.nodes.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT))

    def stop(self) -> None:
        family = [child for node in self.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
            node.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            process.kill()


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head with a single CPU."""
    subprocess.run([RAY, "get-auth-token", "--generate"], check=True, env={**os.environ, "HOME": str(tmp_path)})
    dashboard, gcs = free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    env = jobs.environment() | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / ".ray" / "auth_token"),
        "RAY_API_SERVER_ADDRESS": address,
    }
    head = Head(env, f"127.0.0.1:{gcs}", tmp_path, [])
    with tempfile.TemporaryDirectory(prefix="kto") as short:  # Ray's sockets allow only short paths
        head.start_node(
            *("--head", "--num-cpus=1", f"--port={gcs}", f"--temp-dir={short}"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        )
        try:
            wait_for_jobs(head)
            yield head
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


def test_a_submitted_job_says_what_it_waits_for_and_goes_on_when_a_node_comes(
    head: Head, tmp_path: Path, tiny_sd2_folder: Path
) -> None:
    log = tmp_path / "job.log"
    with log.open("w") as output:
        submission = subprocess.Popen(
            [
                *(RAY, "job", "submit", "--working-dir", ".", "--submission-id", "first", "--", "python"),
                *("jobs/online_kto.py", "run=submitted", f"runs_folder={tmp_path}", f"model={tiny_sd2_folder}"),
                *(*jobs.SMALL, "rounds=3", "max_policy_lag=1", "cluster.wait_s=2"),
                *("train.workers=2", "train.adapter.kind=full", "train.micro_batch=4", "train.resources.num_cpus=1"),
                *("generate.resources.num_cpus=0.5", "label.resources.num_cpus=0.1"),
            ],
            cwd=jobs.REPOSITORY,
            env=head.env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    job = jobs.Job(submission, tmp_path / "submitted", log)
    job.wait_until(lambda: "still waiting for train workers" in job.output())
    assert "2 CPU asked for" in job.output()
    head.start_node(f"--address={head.gcs}", "--num-cpus=2")
    assert job.wait() == 0, job.output()

    assert jobs.summary(job.run)["ledger"]["balances"]
    rounds = RoundStore(Storage(str(job.run))).rounds()
    assert [{sample.policy.version for sample in round_.samples()} for round_ in rounds] == [{0}, {0}, {1}]
    assert [round_.manifest["policy_lag_mean"] for round_ in rounds] == [0, 1, 1]
