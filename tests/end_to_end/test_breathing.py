"""Runs on a cluster whose nodes come and go: Ray's own autoscaler, with nodes of one CPU, so that each role has one.

What is under way when a node goes is held up until then (`tests/holding.py`). Only with KTO_RAY_FAKE_CLUSTER=1 in the
environment: seven nodes are some forty processes, which two cores that have other tests to run do not start in time.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import jobs
from tests.fake_cluster import FakeCluster, NodeType, fake_cluster
from tests.holding import DRAW, SCORE, TRAIN

pytestmark = pytest.mark.skipif(
    not os.environ.get("KTO_RAY_FAKE_CLUSTER"), reason="KTO_RAY_FAKE_CLUSTER=1 has a cluster of seven nodes started"
)

NODES = {"one": NodeType({"CPU": 1}, max_workers=6)}
REPLICA, SCORER, WORKER = ":Generator", "ScorerActor", "RayTrainWorker"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    with fake_cluster(tmp_path_factory.mktemp("cluster"), NODES) as cluster:
        yield cluster


@dataclass
class Held:
    """A run whose draws, scores and optimizer steps wait for the test."""

    cluster: FakeCluster
    folder: Path
    job: jobs.Job

    @classmethod
    def start(cls, cluster: FakeCluster, folder: Path, model: Path, *overrides: str) -> "Held":
        for what in (DRAW, SCORE, TRAIN):
            (folder / what).touch()
        settings = [f"model={model}", "label.scorers=tests.holding:HeldScorer", "rounds=1", "cluster.wait_s=2"]
        settings += [f"label.scorers.HeldScorer.args.folder={folder}"]
        for role in ("generate", "label.scorers.HeldScorer", "train"):
            settings += [f"{role}.resources.num_cpus=1", f"{role}.resources.threads=1"]
        run = ["-c", "import sys; from tests.holding import main; sys.exit(main())"]
        return cls(cluster, folder, jobs.start(folder, "run", [*settings, *overrides], cluster.env, run))

    def until(self, there: Callable[[], Any]) -> Any:
        return self.job.wait_until(there)

    def reached(self, what: str) -> None:
        """Until somebody waits there, who did not before."""
        mark = self.folder / f"{what}-reached"
        self.until(mark.exists)
        mark.unlink()

    def release(self, what: str) -> None:
        (self.folder / what).unlink()

    def node(self, title: str) -> str:
        """The only one with such an actor."""
        (node,) = set(self.cluster.hosts(title))
        return node

    def said(self, words: str) -> None:
        self.until(lambda: words in self.job.output())

    def ends_well(self) -> str:
        """And all its nodes are given back; gives its output."""
        assert self.job.wait() == 0, self.job.output()[-6000:]
        ledger = jobs.summary(self.job.run)["ledger"]
        assert ledger["balances"], ledger
        assert ledger["generated"] == ledger["labeled"] == 24
        assert ledger["trained_twice"] == 0
        self.cluster.wait_until(lambda: not self.cluster.nodes(), "all nodes are given back")
        return self.job.output()


@contextlib.contextmanager
def held(cluster: FakeCluster, folder: Path, model: Path, *overrides: str) -> Iterator[Held]:
    run = Held.start(cluster, folder, model, *overrides)
    try:
        yield run
    finally:
        if run.job.process.poll() is None:
            run.job.kill()


def test_generators_and_scorers_grow_and_shrink_and_their_nodes_are_given_back(
    cluster: FakeCluster, tmp_path: Path, tiny_sd1_folder: Path
) -> None:
    more = ["generate.max_replicas=2", "label.scorers.HeldScorer.max_actors=2"]
    with held(cluster, tmp_path, tiny_sd1_folder, *more) as run:
        run.until(lambda: len(cluster.hosts(REPLICA)) == 2)
        run.release(DRAW)
        run.until(lambda: len(cluster.hosts(SCORER)) == 2)
        assert len(cluster.nodes()) == 5
        run.release(SCORE)
        run.reached(TRAIN)
        run.until(lambda: len(cluster.hosts(SCORER)) == 1 and len(cluster.nodes()) == 4)
        run.release(TRAIN)
        run.ends_well()


def test_the_death_of_every_node_costs_nothing_and_the_wait_for_another_is_said(
    cluster: FakeCluster, tmp_path: Path, tiny_sd1_folder: Path
) -> None:
    with held(cluster, tmp_path, tiny_sd1_folder) as run:
        run.reached(DRAW)
        with cluster.nobody_comes():
            cluster.kill_node(run.node(REPLICA))
            run.said("still waiting for 4 images that are asked for again")
        run.reached(DRAW)
        run.release(DRAW)
        run.reached(SCORE)
        cluster.kill_node(run.node(SCORER))
        run.reached(SCORE)
        run.release(SCORE)
        run.reached(TRAIN)
        with cluster.nobody_comes():
            cluster.kill_node(run.node(WORKER))
            run.said("the train workers failed (rank 0: ")
            run.said("still waiting for train workers")
        run.reached(TRAIN)
        run.release(TRAIN)
        said = run.ends_well()
    assert "a generator replica died, or its node (" in said
    assert "scorer HeldScorer: scorer actor died" in said
