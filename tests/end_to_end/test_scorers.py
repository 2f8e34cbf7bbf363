"""Scorers of two other Python environments and one held out, in a submitted job, while one of them is killed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end.cluster import Head, running_head


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with running_head(tmp_path, cpus=3) as head:
        yield head


def test_scorers_of_three_environments_look_at_every_image_though_one_is_killed(
    head: Head, tmp_path: Path, tiny_sd1_folder: Path, scorer_arguments: dict[str, dict[str, Any]]
) -> None:
    small = {"resources": {"num_cpus": 0.1}, "max_actors": 1}
    scorers = {name: {"env": name, "args": args, **small} for name, args in scorer_arguments.items()}
    scorers["coin"] = {"scorer": "tests.plugins:CoinScorer", "held_out": True, **small}
    job = head.submit(
        tmp_path,
        "scorers",
        [
            *(f"model={tiny_sd1_folder}", "rounds=1", "generate.images_per_round=8"),
            *("evaluate.max_prompts=4", "evaluate.images_per_prompt=1"),
            f"label.scorers={yaml.safe_dump(scorers, default_flow_style=True, width=10**6)}",
            "label.combine={kind: weighted_sum, calibration: round}",
            "label.threshold={kind: round_quantile, quantile: 0.5}",
        ],
    )
    job.wait_until(lambda: list(job.run.glob("rounds/00000/samples/*.parquet")))
    assert not (job.run / "rounds/00000/manifest.json").exists()
    # The one that takes seconds an image: the other is a small random model.
    max(job.actors("ScorerActor"), key=lambda process: process.memory_info().rss).kill()
    assert job.wait(580) == 0, job.output()
    assert "scorer image_reward: scorer actor died" in job.output()

    ledger = dict(RoundStore(Storage(str(job.run))).ledger().__dict__)
    assert ledger == {**ledger, "generated": 8, "labeled": 8, "failed": 0, "pending": 0, "trained_twice": 0}
    round_ = RoundStore(Storage(str(job.run))).round(0)
    scores = round_.scores()
    assert {score.scorer for score in scores} == {"image_reward", "hpsv2", "coin"}
    assert len(scores) == 24
    assert all(score.value is not None for score in scores)
    assert len({score.value for score in scores if score.scorer == "image_reward"}) > 1
    assert {score.scorer_version for score in scores} == {"1.0", "2.1", "1"}
    verdicts = round_.verdicts()
    assert sorted(verdict.label for verdict in verdicts) == ["desirable"] * 4 + ["undesirable"] * 4
    assert all("round_quantile@2(quantile=0.5" in verdict.rule for verdict in verdicts)
    assert all("coin" not in verdict.rule for verdict in verdicts)
    assert {"score/coin", "pictures/diversity"} <= round_.manifest.keys()
