"""`ray job submit` on a head that `ray start` began: two DDP workers, full fine-tuning, policy lag 1, a v-model; and
what its metrics endpoints say meanwhile."""

import json
import re
import time
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
    with running_head(tmp_path, cpus=1, report_s=1) as head:
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
    series: dict[str, float] = {}
    while job.process.poll() is None:
        series |= {name: value for name, value in head.scrape().items() if name.startswith("ray_kto_ray_")}
        time.sleep(0.5)
    assert job.wait() == 0, job.output()

    assert jobs.summary(job.run)["ledger"]["balances"]
    rounds = RoundStore(Storage(str(job.run))).rounds()
    assert [{sample.policy.version for sample in round_.samples()} for round_ in rounds] == [{0}, {0}, {1}]
    assert [round_.manifest["policy_lag_mean"] for round_ in rounds] == [0, 1, 1]

    board = json.loads((jobs.REPOSITORY / "deploy/grafana.json").read_text())
    asked = {name for panel in board["panels"] for name in re.findall(r"ray_kto_ray_\w+", json.dumps(panel["targets"]))}
    assert asked - {name.partition("{")[0] for name in series} == set()
    assert all('run="submitted-' in name for name in series)

    def total(name: str, *tags: str) -> float:
        return sum(
            value for text, value in series.items() if text.startswith(name + "{") and all(t in text for t in tags)
        )

    # What a process says in its last second is lost with it.
    assert 48 <= total("ray_kto_ray_images_total", 'stage="round"', 'outcome="drawn"') <= 72
    assert 48 <= total("ray_kto_ray_verdicts_total") <= 72
    assert total("ray_kto_ray_scores_total", 'scorer="CoinScorer"', 'outcome="scored"') >= 48
    assert total("ray_kto_ray_step_seconds_count") > 0
    assert total("ray_kto_ray_spent_seconds_total", 'role="train_workers"', 'doing="work"') > 0
