"""A cluster that breathes on one machine: Ray's own autoscaler (v2), whose nodes are processes on loopback.

    the test --stdin--> guardian (this file as a program) --> ray start --head --> autoscaler --> raylets and workers

Scheduling, scaling, idle nodes and draining are the real thing; what is fake is only that a new node is a raylet more.
The guardian adopts whatever its descendants leave behind, and kills all of it when its stdin is closed (by the end of
the block, by an interrupt, or because the test's process was killed), or when the head has died.

What one had better know: nodes have ids that end in 00001, 00002, ..., which are never used again. All nodes see the
environment of the head, and share one session folder, where a job's working directory would be unpacked by each of them
over that of the others: drivers are started beside the cluster, and find the checkout by PYTHONPATH.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_ports

REPOSITORY = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")
HEAD = "f" * 51 + "00000"
ID_VARIABLE = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
PATIENCE_S = 300  # on a machine where everything takes ten times as long
AGENTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
PR_SET_CHILD_SUBREAPER = 36
READY = "This command will now block"
"""What `ray start` says once its node is up."""


@dataclass(frozen=True)
class NodeType:
    """What a kind of node has, and how many of them there may be."""

    resources: Mapping[str, float]
    max_workers: int = 4
    min_workers: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass
class FakeCluster:
    """See the module; made by `fake_cluster`.

    Args:
        env: of drivers that join it.
        gcs, dashboard: addresses.
        folder: of its logs.
    """

    env: dict[str, str]
    gcs: str
    dashboard: str
    folder: Path
    guardian: "subprocess.Popen[bytes]"

    def processes(self) -> list[psutil.Process]:
        """All of the cluster's."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.guardian.pid).children(recursive=True)
        return []

    def nodes(self) -> dict[str, psutil.Process]:
        """The raylets of the nodes that came, by the ends of their ids; without the head's."""
        return {name: raylet for name, raylet in self._raylets().items() if name != HEAD[-5:]}

    def _raylets(self) -> dict[str, psutil.Process]:
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet" and lives(process):
                    found[process.environ()[ID_VARIABLE][-5:]] = process
        return found

    def hosts(self, title: str) -> list[str]:
        """The nodes of the actors whose processes have this in their title, for instance "ScorerActor"; one each."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::") and title in " ".join(process.cmdline()):
                    found.append(process.environ()[ID_VARIABLE][-5:])
        return found

    def kill_node(self, name: str) -> None:
        """SIGKILL to a raylet and everything under it, as when a machine goes. The autoscaler then starts another."""
        raylet = self._raylets()[name]
        family = [raylet, *raylet.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait_until(lambda: not any(map(lives, family)), f"node {name} is gone")

    def kill_head(self) -> None:
        """SIGKILL to the head's node, on which everything else ends."""
        self.kill_node(HEAD[-5:])

    @contextlib.contextmanager
    def nobody_comes(self) -> Iterator[None]:
        """Until the end of the block the autoscaler stands still: no node is started, and none given back."""
        (autoscaler,) = [p for p in self.processes() if "autoscaler/v2/monitor.py" in " ".join(_words(p))]
        autoscaler.suspend()
        try:
            yield
        finally:
            autoscaler.resume()

    def drain(self, name: str, deadline_s: float) -> threading.Thread:
        """Tell Ray that a node is taken away in so many seconds, and then take it away; gives the thread that does."""
        deadline = time.monotonic() + deadline_s
        raylet = self._raylets()[name]
        words = [RAY, "drain-node", f"--address={self.gcs}", f"--node-id={HEAD[:-5]}{name}"]
        words += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken away by a test"]
        words += [f"--deadline-remaining-seconds={int(deadline_s)}"]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

        def take_away() -> None:
            while lives(raylet) and time.monotonic() < deadline:  # one that is empty leaves by itself
                time.sleep(0.2)
            if name in self._raylets():
                self.kill_node(name)

        taking = threading.Thread(target=take_away, daemon=True)
        taking.start()
        return taking

    def wait_until(self, there: Callable[[], Any], what: str) -> Any:
        """Poll until `there()` is true; gives its value."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := there()):
            assert self.guardian.poll() is None, self.log()
            assert time.monotonic() < deadline, f"never happened: {what}\n{self.log()}"
            time.sleep(0.2)
        return value

    def log(self) -> str:
        return (self.folder / "head.log").read_text(errors="replace")[-4000:]

    def end(self) -> None:
        """Returns when no process of it is left."""
        assert self.guardian.stdin
        self.guardian.stdin.close()
        self.guardian.wait()


@contextlib.contextmanager
def fake_cluster(
    folder: Path, types: Mapping[str, NodeType], head: Mapping[str, float] | None = None, idle_s: float = 6
) -> Iterator[FakeCluster]:
    """A head, and whatever nodes are asked of it, until the end of the block.

    Args:
        folder: takes its logs.
        head: resources of the head; None: no CPU, which keeps actors that ask for one off it.
        idle_s: after so long without work a node is given back.
    """
    gcs, dashboard, client, *agents = free_ports(3 + len(AGENTS))
    head = {"CPU": 0} if head is None else head
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(_autoscaling(f"127.0.0.1:{gcs}", types, head, idle_s)))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every node says that it is at 127.0.0.1
    }
    of_head = env | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE_S),
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        ID_VARIABLE: HEAD,
    }
    short = tempfile.mkdtemp(prefix="kto")  # Ray's sockets allow only short paths
    command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}", f"--temp-dir={short}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    # A raylet that has to ask its agents for their ports gives up after 30 s: little, on a machine that is busy.
    command += [f"--{name}={port}" for name, port in zip(AGENTS, agents, strict=True)]
    command += [f"--autoscaling-config={config}"]
    command += [f"--num-cpus={head.get('CPU', 0):g}", f"--num-gpus={head.get('GPU', 0):g}"]
    command += ["--object-store-memory=200000000"]
    with (folder / "head.log").open("wb") as log:
        guardian = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_cluster", *command],
            cwd=REPOSITORY,
            env=of_head,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt at the keyboard is the test's to deal with
        )
    joining = {"RAY_ADDRESS": f"127.0.0.1:{gcs}", "COLUMNS": "300"}
    cluster = FakeCluster(env | joining, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", folder, guardian)
    try:
        cluster.wait_until(lambda: READY in cluster.log() and _answers(dashboard), "the head is up")
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(short, ignore_errors=True)


def _autoscaling(gcs: str, types: Mapping[str, NodeType], head: Mapping[str, float], idle_s: float) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads: everything that `ray up` would have filled in."""
    kinds = {
        name: {
            "resources": dict(kind.resources),
            "labels": dict(kind.labels),
            "node_config": {},
            "min_workers": kind.min_workers,
            "max_workers": kind.max_workers,
        }
        for name, kind in types.items()
    }
    kinds["ray.head.default"] = {"resources": dict(head), "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": sum(kind.max_workers for kind in types.values()),
        "provider": {
            "type": "external",
            "module": "tests.fake_provider.Provider",
            "gcs_address": gcs,
            "head_node_id": HEAD,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{
            name: []
            for name in (
                *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
                *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
                *("rsync_exclude", "rsync_filter"),
            )
        },
        "file_mounts_sync_continuously": False,
    }


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def lives(process: psutil.Process) -> bool:
    """Nobody may reap what the autoscaler started."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def guard(command: list[str]) -> None:
    """Run a command until it or stdin ends, and then end everything that ever came of it."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and not select.select([sys.stdin], [], [], 1)[0]:
        pass
    while family := psutil.Process().children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=1)


if __name__ == "__main__":
    guard(sys.argv[1:])
