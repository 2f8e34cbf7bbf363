"""`ray job submit` on a head that `ray start` began: two DDP workers, full fine-tuning, policy lag 1, a v-model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs
from tests.end_to_end.cluster import Head, running_head


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """With a single CPU."""
    with running_head(tmp_path, cpus=1) as head:
        yield head


def test_a_submitted_job_says_what_it_waits_for_and_goes_on_when_a_node_comes(
    head: Head, tmp_path: Path, tiny_sd2_folder: Path
) -> None:
    job = head.submit(
        tmp_path,
        "submitted",
        [
            *(f"model={tiny_sd2_folder}", "rounds=3", "max_policy_lag=1", "cluster.wait_s=2"),
            *("train.workers=2", "train.adapter.kind=full", "train.micro_batch=4", "train.resources.num_cpus=1"),
            *("generate.resources.num_cpus=0.5", "label.scorers.CoinScorer.resources.num_cpus=0.1"),
        ],
    )
    job.wait_until(lambda: "still waiting for train workers" in job.output())
    assert "2 CPU asked for" in job.output()
    head.start_node(f"--address={head.gcs}", "--num-cpus=2")
    assert job.wait() == 0, job.output()

    assert jobs.summary(job.run)["ledger"]["balances"]
    rounds = RoundStore(Storage(str(job.run))).rounds()
    assert [{sample.policy.version for sample in round_.samples()} for round_ in rounds] == [{0}, {0}, {1}]
    assert [round_.manifest["policy_lag_mean"] for round_ in rounds] == [0, 1, 1]
