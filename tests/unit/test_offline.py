"""Runs on labelled images: what is refused before anything is spent, and what is counted."""

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from kto_ray.config import implied, load
from kto_ray.data.sources import source_of
from kto_ray.errors import UserError
from kto_ray.evaluate.summary import write_results
from kto_ray.loop import run_online_kto
from kto_ray.offline.encoding import Encoding
from kto_ray.offline.loop import Intervals, _OfflineLoop, run_offline_kto
from kto_ray.offline.planning import CONTRARY
from kto_ray.offline.preparing import Preparing
from kto_ray.placement import as_configured
from kto_ray.preflight import Preflight
from kto_ray.prepared import PreparedSet, keep_set, set_of
from kto_ray.records import Prompt
from kto_ray.rounds import Round
from kto_ray.storage import Storage
from tests.factories import make_set
from tests.in_process import InProcess


@pytest.mark.parametrize(
    ("run", "overrides", "message"),
    [
        (run_offline_kto, ["data=null"], "data: a run on labelled images needs some"),
        (run_online_kto, [], "jobs/offline_kto.py"),
    ],
)
def test_each_job_names_the_other(run: Callable[..., Any], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(load("shapes_offline", overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.objective={kind: nft}", "nft, reference: round.* drawn by none of this run's"),
        ("train.objective.reference=ema", "reference: ema"),
        ("train.objective={kind: dpo, pairs: scores}", "use pairs: verdicts"),
        ("train.own_noise=0.5", "train.own_noise .0.5.: the noise .* is not known"),
        ("replay.run=runs/other", "replay and data: give one of them"),
        ("data.prepare.background=[0, 0, 300]", "data.prepare.background.2.*less than or equal to 255"),
        ("data.prepare.max_encoders=0", "data.prepare.max_encoders.*greater than or equal to 1"),
        ("data.stream.step=1", "unknown field 'data.stream.step'.* did you mean 'steps'"),
    ],
)
def test_what_labelled_images_cannot_teach_is_said(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("shapes_offline", [override])


def test_pairs_need_no_images_of_ones_own() -> None:
    assert load("shapes_offline", ["train.objective={kind: dpo}"]).generate.images_per_prompt == 1


def test_a_run_says_how_many_steps_it_takes() -> None:
    config = load(
        "shapes_offline", ["rounds=3", "data.stream.steps=7", "train.global_batch=10", "train.micro_batch=10"]
    )
    assert implied(config)["optimizer steps"] == "7 an interval x 3 intervals = 21"
    assert implied(config)["images drawn"] == "210 in all"


def test_the_ledger_counts_the_images_of_the_source(tmp_path: Path) -> None:
    prepared = make_set(tmp_path / "set", [True, False, True])
    prepared.manifest["left_out"] = {"the file is empty": 2, CONTRARY: 1}
    intervals = Intervals(Storage(str(tmp_path / "run")), prepared)
    for index, draws in enumerate([{"a": 2, "b": 0}, {"a": 1, "c": 4}]):
        intervals.round(index).record_training(draws, {})
    ledger = intervals.ledger()
    assert (ledger.generated, ledger.labeled, ledger.abstained, ledger.failed, ledger.trained) == (6, 3, 1, 2, 2)
    assert ledger.balances


def test_a_run_knows_its_set(tmp_path: Path) -> None:
    run, prepared = Storage(str(tmp_path / "run")), make_set(tmp_path / "set", [True, False])
    keep_set(run, prepared)
    assert set_of(run).key == prepared.key
    prepared.storage.write_json("set.json", prepared.manifest | {"images": 3})
    with pytest.raises(UserError, match="another one now"):
        set_of(run)
    prepared.storage.delete("set.json")
    with pytest.raises(UserError, match="which is gone; bring it back"):
        set_of(run)


def test_a_set_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    prepared = make_set(tmp_path / "set", [True, False])
    prepared.storage.write_json("set.json", prepared.manifest | {"format": 99})
    with pytest.raises(UserError, match="newer version of kto-ray: its format is 99"):
        _ = PreparedSet(prepared.folder, prepared.key).manifest


async def learned(folder: Path, prepared: PreparedSet, monkeypatch: pytest.MonkeyPatch, rounds: int) -> dict[str, Any]:
    """What a run comes to, with generators and scorers of this process, and a training that only takes note."""
    workers = InProcess({"shapes": lambda sample: float(sample.seed % 97) / 96})
    for part in ("Caretaker", "Training"):
        monkeypatch.setattr(f"kto_ray.offline.loop.{part}", lambda *_: SimpleNamespace(coordinator=None))
    for part in ("Generators", "Scorers"):
        monkeypatch.setattr(f"kto_ray.offline.loop.{part}", lambda *_: workers)
    small = ["data.stream.steps=5", "train.global_batch=12", "train.micro_batch=12", "tracking.tensorboard=false"]
    config = load("shapes_offline", [f"rounds={rounds}", "evaluate.every=1", *small])
    held_out = [Prompt(f"p{place}", f"prompt {place}") for place in range(3)]
    preflight = Preflight(Storage(str(folder)), [], held_out, "b" * 64, {"unet": "b" * 64})
    loop = _OfflineLoop(config, preflight, prepared, Console(file=io.StringIO(), width=1000), as_configured(config))

    async def train(_: object, index: int, round_: Round) -> None:
        interval = loop.stream.interval(index)
        draws = dict(zip(interval.ids, interval.draws_N.tolist(), strict=True))
        weights = {"weight": torch.full((1,), float(index))}
        await asyncio.to_thread(loop.learning.policies.publish, index + 1, weights, {})
        await asyncio.to_thread(round_.record_training, draws, {"figures": {"seconds/train": 0.0}})

    monkeypatch.setattr(loop.learning, "_train", train)
    await asyncio.wait_for(loop.learning.learn(loop), 300)
    await loop.retention.close()
    what = loop.config, loop.run_storage, loop.metrics, loop.rounds, loop.evaluation, loop.fresh
    return await asyncio.to_thread(write_results, *what, {})


async def test_intervals_are_learned_from_and_reported_as_rounds_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = make_set(tmp_path / "set", [n % 2 == 0 for n in range(12)])
    prepared.manifest["left_out"] = {"the file is empty": 1}
    run = tmp_path / "run"
    first = await learned(run, prepared, monkeypatch, rounds=2)
    assert (first["policy_version"], first["rounds"]) == (2, 2)
    summary = await learned(run, prepared, monkeypatch, rounds=3)  # goes on
    assert (summary["policy_version"], summary["rounds"], summary["images"]) == (3, 3, 13)
    assert summary["ledger"]["balances"]
    assert summary["ledger"]["trained"] == 12
    assert summary["evaluation_images"] == 4 * 3 * 5
    assert {"base", "final", "difference"} <= summary.keys()
    rows = [Round(Storage(f"{run}/rounds/{index:05}"), "") for index in range(3)]
    assert all(row.sealed and row.manifest["desirable"] + row.manifest["undesirable"] == 60 for row in rows)
    assert "12" in (run / "report.html").read_text()


def test_another_run_looks_at_its_source_anew(tmp_path: Path) -> None:
    """The files have the names that they had, whatever verdicts have come since."""

    def key(run: str) -> str:
        config = load("shapes_offline", [f"run={run}", f"data={{kind: table, path: {tmp_path}/liked.csv}}"])
        assert config.data is not None
        encoding = Encoding("a" * 64, "family", (64, 64), 8, "crop", (255, 255, 255), "mean", "float32")
        source, folder = source_of(config.data), Storage(str(tmp_path / "prepared"))
        return Preparing(config, source, encoding, [], folder, Console(file=io.StringIO())).set.key

    (tmp_path / "liked.csv").write_text("prompt,image,label\na cat,1.png,1\n")
    first = key("one")
    assert key("one") == first
    assert key("two") != first
