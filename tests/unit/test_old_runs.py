"""A run folder that release 0.1.0 has written still opens: it is read, judged anew and replayed."""

import shutil
from pathlib import Path

import pytest

from kto_ray.config import Replay, load
from kto_ray.relabel import Replayed, relabel, saved_config, sealed_rounds
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage

WRITTEN = Path(__file__).parents[1] / "data" / "run-0.1.0"
"""`python jobs/online_kto.py --recipe shapes_demo` with two rounds of 16 images: its configuration and rounds."""


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    shutil.copytree(WRITTEN, tmp_path / "old")
    return Storage(str(tmp_path / "old"))


def test_its_configuration_is_read(run: Storage) -> None:
    config = saved_config(run)
    assert config.run == "old"
    assert config.train.objective == load("shapes_demo").train.objective


def test_its_rounds_are_as_they_were_sealed(run: Storage) -> None:
    rounds = sealed_rounds(run)
    assert [round_.trained for round_ in rounds] == [True, True]
    for round_ in rounds:
        round_.verify()
        assert len(round_.samples()) == len(round_.scores()) == len(round_.verdicts()) == 16
    ledger = RoundStore(run).ledger()
    assert (ledger.generated, ledger.trained, ledger.balances) == (32, 32, True)


def test_it_is_judged_anew_and_replayed(run: Storage, tmp_path: Path) -> None:
    relabeled = relabel(run, "half", ["label.threshold=round_quantile"])
    assert [round_.labels["desirable"] for round_ in relabeled] == [8, 8]
    config = load("shapes_demo", ["run=new", f"runs_folder={tmp_path}"])
    replayed = Replayed(Replay(run=str(run), labels="half"), config)
    assert replayed.rounds == 2
    round_ = RoundStore(Storage(str(tmp_path / "new"))).round(1)
    replayed.fill(1, round_)
    assert round_.sample_ids == {sample.id for sample in sealed_rounds(run)[1].samples()}
    assert sum(verdict.label == "desirable" for verdict in round_.verdicts()) == 8
