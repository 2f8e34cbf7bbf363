#!/usr/bin/env python3
"""Tells Ray that this machine is about to be taken back, so that what runs on it moves on before it goes.

    python deploy/preemption.py aws     beside `ray start`: asks EC2 whether it wants the spot instance back
    python deploy/preemption.py gcp     the same, of Google
    python deploy/preemption.py kubernetes --seconds 100
                                        a preStop hook of the Ray container, which holds the pod's end up until the node
                                        is empty, or so long; less than terminationGracePeriodSeconds

It says so with `ray drain-node`: from then on Ray puts nothing new on the node, Serve replaces its replicas, and Ray
Train moves its workers. It needs nothing but Python and Ray's command, with RAY_AUTH_MODE and the token in the
environment as `ray start` had them. One is enough on a machine: a second one ends by itself (docs/deploying.md).
"""

import argparse
import datetime
import fcntl
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

POLL_S = 5.0
"""AWS asks for no more than that; its notice comes two minutes ahead, Google's 30 s."""
GCP_NOTICE_S = 30.0
MARGIN_S = 5.0
"""What is moved must have moved so long before the machine goes."""
RETRY_S = 2.0
RAY_S = 30.0
"""Ray's command takes a second or three; one that takes so long has lost its head."""
TIMEOUT_S = 2.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy would be asked about its own machine."""


class Node(NamedTuple):
    """Of Ray's, on this machine."""

    id: str
    gcs: str


class Aws:
    """EC2's metadata, version 2: a token first, then `spot/instance-action`, which is there once there is a notice."""

    def __init__(self, metadata: str) -> None:
        self.metadata = metadata

    def notice(self) -> float | None:
        """When the machine goes, as a Unix time; None: nobody wants it back. Raises OSError."""
        token = ask(f"{self.metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        action = f"{self.metadata}/latest/meta-data/spot/instance-action"
        try:
            answer = ask(action, {"X-aws-ec2-metadata-token": token})
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return datetime.datetime.fromisoformat(json.loads(answer)["time"]).timestamp()


class Gcp:
    """Google's metadata: `preempted` turns to TRUE, and the machine goes 30 s later."""

    def __init__(self, metadata: str) -> None:
        self.metadata = metadata

    def notice(self) -> float | None:
        """As `Aws.notice`."""
        answer = ask(f"{self.metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return time.time() + GCP_NOTICE_S if answer.strip().upper() == "TRUE" else None


def ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with OPENER.open(request, timeout=TIMEOUT_S) as response:
        return str(response.read().decode())


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%F %T} {text}", file=sys.stderr, flush=True)


def nodes() -> list[Node]:
    """Ray's nodes on this machine, by the command lines of their raylets."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if Path(command[0]).name == "raylet":
            flags = dict(flag.lstrip("-").split("=", 1) for flag in command if "=" in flag)
            if "node_id" in flags:
                found.append(Node(flags["node_id"], flags.get("gcs-address", "")))
    return found


def this_node(given: str | None, address: str | None) -> Node | None:
    """The node to be drained; None: no Ray runs here. Raises SystemExit where it has to be named."""
    found = [node for node in nodes() if given in (None, node.id)]
    if len(found) > 1:
        raise SystemExit(
            f"several nodes of Ray run here; name one of {', '.join(node.id for node in found)}: --node-id"
        )
    if found:
        return Node(found[0].id, address or found[0].gcs)
    return Node(given, address) if given and address else None


def drain(node: Node, at: float, why: str) -> bool:
    """Tell Ray that the node goes at this Unix time; tries again until then. Whether Ray took it."""
    while True:
        left = max(0, int(at - time.time()))
        command = ["ray", "drain-node", "--address", node.gcs, "--node-id", node.id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", why]
        command += ["--deadline-remaining-seconds", str(left)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=RAY_S)
        except (subprocess.SubprocessError, OSError) as error:
            words = (getattr(error, "stderr", None) or "")[-500:]
            say(f"{why}, but Ray could not be told: {error} {words}")
        else:
            say(f"{why}: Ray was told that node {node.id} goes in {left} s")
            return True
        if time.time() + RETRY_S > at:
            return False
        time.sleep(RETRY_S)


def watch(cloud: Any, poll_s: float) -> float:
    """Wait for a notice; gives when the machine goes, as a Unix time."""
    trouble = ""
    while True:
        try:
            at = cloud.notice()
            if trouble:
                say("the metadata answer again")
            trouble = ""
            if at is not None:
                return float(at)
        except (OSError, ValueError, KeyError) as error:  # URLError is an OSError
            if str(error) != trouble:
                say(f"{cloud.metadata} cannot be asked: {error}; goes on asking")
            trouble = str(error)
        time.sleep(poll_s)


def only_one() -> Any:
    """Held as long as this process lives; None: another one has it."""
    lock = (Path(tempfile.gettempdir()) / "kto-ray-preemption.lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return lock


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notice", choices=["aws", "gcp", "kubernetes"], help="who gives notice")
    parser.add_argument("--seconds", type=float, default=25, help="kubernetes: so long the pod's end may wait")
    parser.add_argument("--metadata", default="http://169.254.169.254", help="where aws and gcp are asked")
    parser.add_argument("--poll", type=float, default=POLL_S, metavar="SECONDS", help="how often they are asked")
    parser.add_argument("--node-id", help="of Ray's; by default that of the raylet on this machine")
    parser.add_argument("--address", help="of Ray's head; by default the raylet's")
    given = parser.parse_args()
    if given.notice == "kubernetes":
        at, why = time.time() + given.seconds, "Kubernetes takes the pod back"
    else:
        lock = only_one()
        if lock is None:
            say("another one watches this machine already")
            return 0
        cloud = Aws(given.metadata) if given.notice == "aws" else Gcp(given.metadata)
        say(f"asking {given.metadata} every {given.poll:g} s")
        at, why = watch(cloud, given.poll) - MARGIN_S, f"{given.notice} takes the machine back"
    node = this_node(given.node_id, given.address)
    if node is None:
        say(f"{why}, and no Ray runs here")
        return 0
    if not drain(node, at, why):
        return 1
    # A pod's end waits for this command; a node that has become empty ends by itself.
    while given.notice == "kubernetes" and time.time() < at and node.id in [one.id for one in nodes()]:
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
