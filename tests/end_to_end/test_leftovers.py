"""Runs that share a cluster: whatever ends one, all that it held is free again, and nobody else's is touched.

One head, with fictional GPUs that every replica and scorer asks for, so that what stays taken is seen.
"""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs
from tests.end_to_end.cluster import RAY, Head, free_port, running_head

PROMISED_S = 30
PATIENCE_S = 240  # on a machine where everything takes eight times as long

HELD = [
    *("cluster.wait_s=5", "rounds=1", "evaluate.max_prompts=1", "evaluate.images_per_prompt=1"),
    *("generate.device=cpu", "generate.resources.num_gpus=1", "generate.resources.num_cpus=0.1"),
    *("label.scorers.CoinScorer.resources.num_gpus=1", "label.scorers.CoinScorer.resources.num_cpus=0.1"),
    "train.resources.num_cpus=0.1",
]
SLOW = ["generate.steps=200", "generate.images_per_round=400"]
"""There is always something under way."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("head"), cpus=2, gpus=4, plain=True) as head:
        yield head


def python(head: Head, *words: str) -> str:
    """Output of a Python program that joins the head."""
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=jobs.REPOSITORY, env=head.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runs(head: Head, *words: str) -> str:
    """Output of `kto-ray runs`, in a terminal wide enough for it."""
    program = "from kto_ray.cli import main; main()"
    return python(head, "-c", program, "runs", *words, "--address", head.gcs)


class Freed:
    """Watches a head: begun while a run holds something, it ends when that is free."""

    def __init__(self, head: Head) -> None:
        program = [sys.executable, "-m", "tests.end_to_end.watch_cluster", head.gcs]
        self.process = subprocess.Popen(
            program, cwd=jobs.REPOSITORY, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout
        while '"free"' not in (line := self.process.stdout.readline()):
            assert line, "the cluster could not be joined"
        self.lines = [line]

    def wait(self, head: Head, since: float) -> float:
        """Until all of the cluster is free; gives the seconds since a moment of `time.monotonic`."""
        try:
            out, _ = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"something stays taken: {self.process.communicate()[0][-500:]}\n{runs(head, 'list')}")
        assert self.process.returncode == 0, out
        return time.monotonic() - since


def said(what: str, seconds: float) -> None:
    print(f"{what}: free after {seconds:.1f} s (promised: {PROMISED_S})")


def begin(head: Head, folder: Path, name: str, *overrides: str) -> jobs.Job:
    """A run that joins the head."""
    return jobs.start(folder, name, [*HELD, *overrides], head.env | {"RAY_ADDRESS": head.gcs})


def drawing(job: jobs.Job) -> jobs.Job:
    """Once the run has images of its first round."""
    job.wait_until(lambda: list(job.run.glob("rounds/00000/samples/*.parquet")))
    return job


def look_at_images(link: str) -> None:
    """With the link, the watch page shows images of the run that goes on; without it, nothing."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    root = link.partition("enter/")[0]
    with pytest.raises(urllib.error.HTTPError, match="401"):
        browser.open(root)
    with browser.open(link) as overview:
        assert overview.url == f"{root}runs/stopped/"
        assert "Round 0 is being drawn and scored" in overview.read().decode()
    with browser.open(f"{root}runs/stopped/images") as grid:
        shown = re.findall(r'src="([^"]+\.webp)"', grid.read().decode())
        assert shown
        address = urllib.parse.urljoin(grid.url, shown[0])
    with browser.open(address) as thumbnail:
        assert thumbnail.read(4) == b"RIFF"


def test_two_runs_of_one_name_draw_with_their_own_settings(head: Head, tmp_path: Path, tiny_sd1_folder: Path) -> None:
    begun = []
    for steps in (2, 3):
        folder = tmp_path / str(steps)
        folder.mkdir()
        begun.append(begin(head, folder, "twin", f"model={tiny_sd1_folder}", f"generate.steps={steps}"))
    for job in begun:
        assert job.wait() == 0, job.output()
    one, other = (RoundStore(Storage(str(job.run))).round(0) for job in begun)
    assert one.sample_ids == other.sample_ids
    assert not any(
        np.array_equal(a.latents_CHW, b.latents_CHW) for a, b in zip(one.samples(), other.samples(), strict=True)
    )
    assert one.manifest["drawing"] != other.manifest["drawing"]
    assert "twin" not in runs(head, "list")


def test_a_scorer_that_cannot_be_built_leaves_nothing(head: Head, tmp_path: Path, tiny_sd1_folder: Path) -> None:
    broken = "label.scorers.CoinScorer.args.no_such_argument=1"
    job = begin(head, tmp_path, "broken", f"model={tiny_sd1_folder}", broken)
    assert job.wait() != 0
    began = time.monotonic()
    said("a scorer that cannot be built", Freed(head).wait(head, began))
    assert "label.scorers.CoinScorer could not be built" in job.output()
    assert "no_such_argument" in job.output()
    assert "broken" not in runs(head, "list")


def test_a_replica_that_cannot_be_built_says_why_and_leaves_nothing(
    head: Head, tmp_path: Path, tiny_sd1_folder: Path
) -> None:
    job = begin(head, tmp_path, "cuda", f"model={tiny_sd1_folder}", "generate.device=cuda")
    assert job.wait() != 0
    began = time.monotonic()
    said("a replica that cannot be built", Freed(head).wait(head, began))
    assert re.search(r"error: generate: a replica could not be built: .*CUDA", job.output()), job.output()
    assert "cuda" not in runs(head, "list")


def test_a_stopped_job_with_pages_leaves_nothing(head: Head, tmp_path: Path, tiny_sd1_folder: Path) -> None:
    port = free_port()
    pages = ["label.labeler=human", f"label.human.port={port}", f"watch.port={port}"]
    job = drawing(head.submit(tmp_path, "stopped", [f"model={tiny_sd1_folder}", *HELD, *SLOW, *pages]))
    link = job.wait_until(lambda: re.search(r"watch the run: (\S+)", job.output()))[1]
    look_at_images(link)
    freed, began = Freed(head), time.monotonic()
    subprocess.run([RAY, "job", "stop", "stopped"], env=head.env, check=True, capture_output=True)
    said("ray job stop", freed.wait(head, began))
    job.wait()
    assert "Job 'stopped' was stopped" in job.output()
    assert "stopped" not in runs(head, "list")


def test_what_a_killed_driver_held_is_freed_and_the_next_one_goes_on(
    head: Head, tmp_path: Path, tiny_sd1_folder: Path
) -> None:
    overrides = [f"model={tiny_sd1_folder}", "generate.steps=50"]
    job = drawing(begin(head, tmp_path, "killed", *overrides))
    freed, began = Freed(head), time.monotonic()
    os.kill(job.process.pid, signal.SIGKILL)
    said("kill -9", freed.wait(head, began))
    assert job.wait() != 0
    again = begin(head, tmp_path, "killed", *overrides)
    assert again.wait() == 0, again.output()
    assert jobs.summary(again.run)["ledger"]["balances"]


def test_runs_are_listed_and_what_nobody_looks_after_is_cleaned(
    head: Head, tmp_path: Path, tiny_sd1_folder: Path
) -> None:
    job = drawing(begin(head, tmp_path, "orphan", f"model={tiny_sd1_folder}", *SLOW))
    (line,) = [line for line in runs(head, "list").splitlines() if "orphan-" in line and "alive" in line]
    assert str(job.run) in line
    assert "1 GPU" in line

    assert "ended: 0" in runs(head, "clean")  # a living run is not touched
    name = re.search(r"orphan-[0-9a-f]{8}", line)
    assert name
    refused = subprocess.run(
        [sys.executable, "-c", "from kto_ray.cli import main; main()", "runs", "clean", name[0], "--address", head.gcs],
        cwd=jobs.REPOSITORY,
        env=head.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "its driver is alive" in refused.stderr

    dismiss = "import ray, sys; from kto_ray.caretaker import caretakers; "
    dismiss += "ray.init(sys.argv[1]); [ray.kill(actor) for actor in caretakers().values()]"
    python(head, "-c", dismiss, head.gcs)
    os.kill(job.process.pid, signal.SIGKILL)
    assert job.wait() != 0
    deadline = time.monotonic() + PATIENCE_S
    while "gone" not in (listed := runs(head, "list")):
        assert time.monotonic() < deadline, listed
    freed, began = Freed(head), time.monotonic()
    assert "ended: 1" in runs(head, "clean")
    said("kto-ray runs clean", freed.wait(head, began))
    assert "orphan" not in runs(head, "list")
