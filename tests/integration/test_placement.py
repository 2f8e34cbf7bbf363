"""Whole runs that share one GPU by turns, or let generators go while training; the GPU is fictional."""

import asyncio
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from rich.console import Console

from kto_ray import loop, turns
from kto_ray.config import load
from kto_ray.stage import Role
from kto_ray.train.coordinator import RoundTask, TrainingReport
from kto_ray.train.job import Training
from tests.end_to_end.jobs import SMALL

ON_A_GPU = [
    *("generate.device=cpu", "generate.resources.num_cpus=1", "generate.resources.num_gpus=1"),
    *("train.device=cpu", "train.resources.num_cpus=1", "train.resources.num_gpus=1"),
]

pytestmark = pytest.mark.filterwarnings("default")
"""Ray Train is the driver's guest here: what Ray Data finds old about itself is no error of ours."""


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    monkeypatch.setattr(loop, "connected", lambda *_: contextlib.nullcontext())
    of_its_own = [f"runs_folder={folder}", "cluster.address=local", "evaluate.every=1", "tracking.tensorboard=false"]
    config = load("shapes_demo", [*SMALL, *of_its_own, *overrides])
    return loop.run_online_kto(config, Console(file=io.StringIO()))


def test_one_gpu_is_enough_for_a_run_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[frozenset[Role]] = []
    listen = turns.Sharing.__call__

    async def overheard(sharing: turns.Sharing, roles: frozenset[Role]) -> None:
        heard.append(roles)
        await listen(sharing, roles)

    monkeypatch.setattr(turns.Sharing, "__call__", overheard)
    # With policy lag, drawing and training would overlap if they could.
    summary = run(tmp_path, monkeypatch, "run=colocated", "max_policy_lag=1", *ON_A_GPU)
    assert summary["policy_version"] == 2
    assert summary["ledger"]["balances"]
    assert any("training" in roles for roles in heard)
    assert not any("training" in roles and roles & turns.DRAWING for roles in heard)
    for role in ("generators", "train_workers"):
        shares = summary["spent"][role]
        assert min(shares["sleep"], shares["work"]) > 0
        assert sum(shares.values()) == pytest.approx(1)


def test_generators_are_gone_while_others_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[loop.Generators] = []
    gone: list[int] = []
    train = Training.train

    class Generators(loop.Generators):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    async def train_alone(training: Training, task: RoundTask) -> TrainingReport:
        while await made[0].running():
            await asyncio.sleep(0.2)
        gone.append(task.round_index)
        return await train(training, task)

    monkeypatch.setattr(loop, "Generators", Generators)
    monkeypatch.setattr(Training, "train", train_alone)
    monkeypatch.setattr(turns.Breathing, "back_s", 0.0)  # as if they were back at once: it pays in any case
    cpus = ("generate.resources.num_cpus=0.4", "train.resources.num_cpus=0.4")
    summary = run(
        tmp_path, monkeypatch, "run=elastic", "cluster.placement=elastic", "generate.min_replicas=0", "rounds=2", *cpus
    )
    assert gone == [0, 1]
    assert summary["policy_version"] == 2
    assert summary["ledger"]["balances"]
