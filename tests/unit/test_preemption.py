"""`deploy/preemption.py` against metadata servers on loopback, with a `ray` that writes down how it was called."""

import contextlib
import datetime
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "preemption.py"
NODE = "f" * 55 + "1"

Answer = Callable[[str, str, Any], tuple[int, str]]
"""Of a method, a path and headers: a status and a text."""


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Machine:
    """Has a `ray` on its PATH that fails as often as it is told to, then writes its arguments down."""

    def __init__(self, folder: Path, failures: int = 0) -> None:
        self.folder, self.called = folder, folder / "called"
        ray = folder / "ray"
        ray.write_text(
            f"#!/bin/sh\necho x >> {folder}/tries\n"
            f'[ "$(wc -l < {folder}/tries)" -gt {failures} ] || {{ echo "no head there" >&2; exit 1; }}\n'
            f'printf "%s\\n" "$@" > {self.called}\n'
        )
        ray.chmod(0o755)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        environment = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "TMPDIR": str(self.folder)}
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Status, and what was said."""
        process = self.start(*arguments)
        said = process.communicate(timeout=120)[1]
        return process.returncode, said

    @property
    def asked(self) -> dict[str, str]:
        """The options of `ray drain-node`."""
        command, *options = self.called.read_text().splitlines()
        assert command == "drain-node"
        return dict(zip(options[::2], options[1::2], strict=True))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


NAMED = ("--node-id", NODE, "--address", "10.0.0.1:6379", "--poll", "0.05")


def ec2(looks_before_notice: int, seconds: float, action: str = "terminate") -> Answer:
    """Version 2 of EC2's metadata, which says something from some look on."""
    looks = 0

    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        nonlocal looks
        if (method, path) == ("PUT", "/latest/api/token"):
            assert int(headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
            return 200, "secret"
        if headers["X-aws-ec2-metadata-token"] != "secret":
            return 401, ""
        if (method, path) != ("GET", "/latest/meta-data/spot/instance-action"):
            return 404, ""
        looks += 1
        if looks <= looks_before_notice:
            return 404, "Not Found"
        at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        return 200, json.dumps({"action": action, "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})

    return answer


def test_ec2_takes_the_instance_back(machine: Machine) -> None:
    with serving(ec2(looks_before_notice=3, seconds=120)) as metadata:
        status, said = machine.run("aws", "--metadata", metadata, *NAMED)
    assert status == 0, said
    left = int(machine.asked.pop("--deadline-remaining-seconds"))
    assert 60 < left <= 115  # five seconds of the two minutes stay as a margin
    assert {name: value for name, value in machine.asked.items() if name != "--deadline-remaining-seconds"} == {
        "--address": "10.0.0.1:6379",
        "--node-id": NODE,
        "--reason": "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message": "aws takes the machine back",
    }
    assert f"Ray was told that node {NODE} goes in {left} s" in said


def test_google_takes_the_instance_back(machine: Machine) -> None:
    answers = iter(["FALSE", "FALSE"])

    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        if headers["Metadata-Flavor"] != "Google" or method != "GET":
            return 403, ""
        if path != "/computeMetadata/v1/instance/preempted":
            return 404, ""
        return 200, next(answers, "TRUE")

    with serving(answer) as metadata:
        status, said = machine.run("gcp", "--metadata", metadata, *NAMED)
    assert status == 0, said
    assert int(machine.asked["--deadline-remaining-seconds"]) <= 25
    assert machine.asked["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"


def test_metadata_that_do_not_answer_are_asked_again(machine: Machine) -> None:
    notice, broken = ec2(looks_before_notice=0, seconds=120), iter([500, 503, 500])

    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        if method == "PUT" and (status := next(broken, 0)):
            return status, ""
        return notice(method, path, headers)

    with serving(answer) as metadata:
        status, said = machine.run("aws", "--metadata", metadata, *NAMED)
    assert status == 0, said
    assert "cannot be asked: HTTP Error 503" in said
    assert "answer again" in said
    assert machine.asked["--node-id"] == NODE


def test_a_head_that_does_not_answer_is_told_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, failures=2)
    status, said = machine.run("kubernetes", "--seconds", "60", *NAMED)
    assert status == 0, said
    assert said.count("no head there") == 2
    assert int(machine.asked["--deadline-remaining-seconds"]) < 60


def test_a_head_that_never_answers_fails_at_the_deadline(tmp_path: Path) -> None:
    machine = Machine(tmp_path, failures=1000)
    status, said = machine.run("kubernetes", "--seconds", "3", *NAMED)
    assert status == 1
    assert "Ray could not be told" in said
    assert not machine.called.exists()


def test_where_no_ray_runs_nothing_is_drained(machine: Machine) -> None:
    status, said = machine.run("kubernetes", "--node-id", "0" * 56)
    assert status == 0
    assert "no Ray runs here" in said


def test_one_is_enough_on_a_machine(machine: Machine) -> None:
    with serving(lambda *_: (404, "")) as metadata:
        first = machine.start("aws", "--metadata", metadata, *NAMED)
        try:
            assert first.stderr is not None
            assert "asking" in first.stderr.readline()
            status, said = machine.run("aws", "--metadata", metadata, *NAMED)
        finally:
            first.kill()
            first.communicate()
    assert (status, said.endswith("another one watches this machine already\n")) == (0, True)


def test_a_pod_ends_when_its_node_has_ended(machine: Machine) -> None:
    """The node is found by its raylet's command line, and the hook lasts as long as the raylet does."""
    flags = [f"--node_id={NODE}", "--gcs-address=10.0.0.7:6379"]
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    raylet = subprocess.Popen(
        ["/ray/core/raylet", "-c", script, *flags],
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert raylet.stdout is not None
    assert raylet.stdout.readline() == b"up\n"
    hook = machine.start("kubernetes", "--seconds", "600", "--node-id", NODE)
    assert hook.stderr is not None
    assert "Ray was told" in hook.stderr.readline()
    assert machine.asked["--address"] == "10.0.0.7:6379"
    assert hook.poll() is None
    raylet.communicate()
    hook.communicate(timeout=60)
    assert hook.returncode == 0
