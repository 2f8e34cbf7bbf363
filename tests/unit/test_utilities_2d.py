"""The 2-D job (`jobs/utilities_2d.py`) at its full size: where each utility lands, and that the figure is written.

The margins leave room around what seeds 0 to 5 gave (a table in the job's docstring).
"""

import copy
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

JOB = Path(__file__).parents[2] / "jobs" / "utilities_2d.py"

Landings = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def job() -> Iterator[ModuleType]:
    """The job as a module (`jobs` is no package), on one thread: its matrices are too small for more."""
    spec = importlib.util.spec_from_file_location("utilities_2d", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def clouds(job: ModuleType) -> dict[str, Tensor]:
    clouds: dict[str, Tensor] = job.run(seed=0)
    return clouds


@pytest.fixture(scope="module")
def landings(job: ModuleType, clouds: dict[str, Tensor]) -> Landings:
    return {name: job.landing(points_N2) for name, points_N2 in clouds.items()}


def test_every_cloud_has_the_papers_3500_points(job: ModuleType, clouds: dict[str, Tensor]) -> None:
    assert list(clouds) == ["data", "base", *job.METHODS]
    assert {tuple(points_N2.shape) for points_N2 in clouds.values()} == {(3500, 2)}


def test_base_draws_the_pretraining_cloud(clouds: dict[str, Tensor]) -> None:
    assert clouds["base"].mean(dim=0).tolist() == pytest.approx([0.5, 0.8], abs=0.03)
    assert clouds["base"].std(dim=0).tolist() == pytest.approx([0.2, 0.2], abs=0.03)


def test_sft_lands_on_the_desirable_cluster(landings: Landings) -> None:
    assert landings["sft"]["near_desirable"] > 0.75
    assert landings["sft"]["near_undesirable"] > 0.3  # the clusters overlap: it never learned to keep away


def test_kahneman_tversky_lands_on_the_desirable_cluster_and_avoids_the_undesirable(landings: Landings) -> None:
    found, sft, base = landings["kahneman_tversky"], landings["sft"], landings["base"]
    assert found["near_desirable"] > 0.7 > 2 * base["near_desirable"]
    assert (found["x"], found["y"]) == pytest.approx((0.3, 0.8), abs=0.08)
    assert found["near_undesirable"] < 0.7 * sft["near_undesirable"]
    assert found["closer_to_undesirable"] < 0.4 * sft["closer_to_undesirable"]


def test_loss_averse_stays_between_base_and_kahneman_tversky(landings: Landings) -> None:
    """Not as in the paper; the job's docstring says why."""
    found, bold, base = landings["loss_averse"], landings["kahneman_tversky"], landings["base"]
    assert base["near_desirable"] + 0.2 < found["near_desirable"] < bold["near_desirable"] - 0.03
    assert bold["closer_to_undesirable"] + 0.02 < found["closer_to_undesirable"] < base["closer_to_undesirable"] - 0.1


def test_risk_seeking_runs_away_past_the_desirable_cluster(landings: Landings) -> None:
    """Not as in the paper; the job's docstring says why."""
    found = landings["risk_seeking"]
    assert found["near_undesirable"] < 0.02
    assert found["near_desirable"] < landings["loss_averse"]["near_desirable"] - 0.1


def test_mirrored_even_risk_seeking_stays(landings: Landings) -> None:
    found, base = landings["risk_seeking, mirrored"], landings["base"]
    assert found["near_desirable"] > 0.7 > 2 * base["near_desirable"]
    assert (found["x"], found["y"]) == pytest.approx((0.3, 0.8), abs=0.08)
    assert found["closer_to_undesirable"] < 0.5 * base["closer_to_undesirable"]


def test_main_prints_the_landings_and_writes_the_figure(
    job: ModuleType,
    clouds: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(job, "run", lambda seed: clouds)
    path = tmp_path / "new folder" / "utilities.png"
    job.main(["--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in clouds)


def test_a_seed_gives_the_same_model_and_the_reference_stands_still(job: ModuleType) -> None:
    bases = [job.pretrain(seed=7, steps=3) for _ in range(2)]
    before = copy.deepcopy(bases[0].state_dict())
    policies = [job.finetune("kahneman_tversky", base, seed=7, steps=3) for base in bases]
    for name, weight in before.items():
        assert torch.equal(bases[0].state_dict()[name], weight)
        assert torch.equal(policies[0].state_dict()[name], policies[1].state_dict()[name])
    assert not torch.equal(policies[0].layers[0].weight, bases[0].layers[0].weight)
