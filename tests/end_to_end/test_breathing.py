"""Runs on a cluster whose nodes come and go: Ray's own autoscaler, with nodes of one CPU, so that each role has one."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end import jobs
from tests.fake_cluster import FakeCluster, NodeType, fake_cluster

NODES = {"one": NodeType({"CPU": 1}, max_workers=6)}
REPLICA, SCORER, WORKER = "Generator", "ScorerActor", "RayTrainWorker"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    with fake_cluster(tmp_path_factory.mktemp("cluster"), NODES) as cluster:
        yield cluster


def start(cluster: FakeCluster, folder: Path, name: str, overrides: list[str]) -> jobs.Job:
    return jobs.start(folder, name, overrides, cluster.env, (cluster.guardian.pid,))


def test_generators_and_scorers_grow_and_shrink_and_their_nodes_are_given_back(
    cluster: FakeCluster, tmp_path: Path, tiny_sd1_folder: Path
) -> None:
    job = start(
        cluster,
        tmp_path,
        "scaled",
        [
            *(f"model={tiny_sd1_folder}", "generate.max_replicas=2", "generate.steps=400"),
            *("label.scorers.CoinScorer.max_actors=2", "label.scorers.CoinScorer.args.seconds=4"),
            *("generate.resources.threads=1", "rounds=1"),
        ],
    )
    t = time.time()
    while job.process.poll() is None:
        print(round(time.time() - t), {w: cluster.hosts(w) for w in (REPLICA, SCORER, WORKER)}, list(cluster.nodes()))
        time.sleep(2)
    print(job.output())
    while cluster.nodes():
        print(round(time.time() - t), {w: cluster.hosts(w) for w in (REPLICA, SCORER, WORKER)}, list(cluster.nodes()))
        time.sleep(2)
    assert job.wait() == 0
    assert jobs.summary(job.run)["ledger"]["balances"]
