"""Real environments: built by pip, their scorers compared with the packages' own functions, and an actor in one.

Environments are kept in $KTO_RAY_ENVS, or else in .envs of the checkout; building them takes minutes and 6 GB, once.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from kto_ray.cli import main
from kto_ray.config import Cluster
from kto_ray.score.actor import ScorerActor
from kto_ray.score.environments import building, finding

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def root() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KTO_RAY_ENVS", os.environ.get("KTO_RAY_ENVS") or str(ROOT / ".envs"))
        yield


def inside(name: str, folder: Path) -> dict[str, Any]:
    """What inside_environment.py answers in an environment, which is built if it is not there; on all cores."""
    python = building.build(name, Console())
    done = subprocess.run(
        [python, "-I", Path(__file__).with_name("inside_environment.py"), name, folder],
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return inside("hpsv2", tmp_path_factory.mktemp("hpsv2"))


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return inside("image_reward", tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(params=["hpsv2", "image_reward"])
def answers(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found


def test_a_batch_scores_as_the_package_does_one_by_one(answers: dict[str, Any]) -> None:
    assert answers["ours"] == pytest.approx(answers["package"], abs=1e-4)
    assert np.ptp(answers["package"]) > 0.02  # or else it would say little
    assert answers["empty"] == []


def test_the_random_checkpoint_of_image_reward_has_all_that_scores(image_reward: dict[str, Any]) -> None:
    unused = [f"blip.{name}.{part}" for name in ("text_proj", "vision_proj") for part in ("bias", "weight")]
    assert image_reward["missing"] == unused


def test_the_random_checkpoint_of_hpsv2_has_the_names_of_the_true_one(hpsv2: dict[str, Any]) -> None:
    assert hpsv2["missing"] == []


def test_hpsv2_scores_the_same_alone(hpsv2: dict[str, Any]) -> None:
    assert hpsv2["ours"] == pytest.approx(hpsv2["single"], abs=1e-5)


def test_hpsv2_in_other_precisions(hpsv2: dict[str, Any]) -> None:
    assert hpsv2["compressed"] == pytest.approx(hpsv2["ours"], abs=2e-3)
    assert hpsv2["bfloat16"] == pytest.approx(hpsv2["ours"], abs=2e-2)
    assert hpsv2["bfloat16"] != hpsv2["ours"]


def test_hpsv2_knows_its_version(hpsv2: dict[str, Any]) -> None:
    assert hpsv2["versions"] == ["2.0", "2.1"]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("missing", "spoilt.pt does not exist; give the path of a file"),
        ("truncated", "spoilt.pt cannot be read; it is truncated"),
        ("incomplete", "spoilt.pt has no '"),
        ("another shape", "weight' has shape (1, "),
    ],
)
def test_a_spoilt_checkpoint_is_refused(problem: str, words: str, answers: dict[str, Any]) -> None:
    assert words in answers["refused"][problem]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("no tokenizer", "nowhere is no folder with vocab.txt"),
        ("other tokenizer", "has 60 tokens, "),
        ("no med_config", "nowhere.json does not exist"),
        ("other med_config", "does not describe a text tower"),
    ],
)
def test_image_reward_refuses_what_does_not_fit(problem: str, words: str, image_reward: dict[str, Any]) -> None:
    assert words in image_reward["refused"][problem]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("true architecture", "has shape (77, 32), this model wants (77, 1024)"),
        ("unknown architecture", "'ViT-H14' is not in the package's model_configs, did you mean 'ViT-H-14'?"),
        ("no architecture", "nowhere.json does not exist"),
        ("unknown version", "version '3' is not one of 2.0, 2.1"),
    ],
)
def test_hpsv2_refuses_what_does_not_fit(problem: str, words: str, hpsv2: dict[str, Any]) -> None:
    assert words in hpsv2["refused"][problem]


@pytest.mark.usefixtures("hpsv2")
def test_the_check_scores_a_picture() -> None:
    ran = CliRunner().invoke(main, ["env", "check", "hpsv2"])
    assert ran.exit_code == 0, ran.output
    assert "hpsv2: its scorer works, with random weights" in ran.stdout
    assert "torch 2.14.1" in ran.stdout


def test_an_actor_lives_in_an_environment(hpsv2: dict[str, Any]) -> None:
    """The base has plain Ray, the cluster has more of it."""
    import ray

    from kto_ray.cluster import connected

    environment = {"py_executable": str(finding.interpreter("hpsv2"))}
    images_BHWC = np.random.default_rng(0).integers(0, 256, (5, 64, 48, 3), np.uint8)
    with connected(Cluster(address="local")):
        actor = ray.remote(num_cpus=0, runtime_env=environment)(ScorerActor).remote("hpsv2", hpsv2["arguments"])
        assert ray.get(actor.describe.remote()) == ("hpsv2", "2.1")
        answers = ray.get(
            actor.score_plain.remote((images_BHWC.tobytes(), images_BHWC.shape), [("1", "a red circle", {})] * 5)
        )
    assert [error for _, error in answers] == [None] * 5
    assert answers[0][0] == pytest.approx(hpsv2["ours"][0], abs=1e-5)
    assert answers[3][0] == pytest.approx(hpsv2["ours"][3], abs=1e-5)
