"""Runs on labelled images: what is refused before anything is spent, and what is counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kto_ray.config import implied, load
from kto_ray.errors import UserError
from kto_ray.loop import run_online_kto
from kto_ray.offline.loop import Intervals, run_offline_kto
from kto_ray.offline.planning import CONTRARY
from kto_ray.prepared import PreparedSet, keep_set, set_of
from kto_ray.storage import Storage
from tests.factories import make_set


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
