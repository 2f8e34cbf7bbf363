"""Fixtures of all tests. Heavy libraries are imported by the fixtures that need them."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.blocking import BlockingCall

# Before torch is imported: tiny tensors gain nothing from threads, and nothing may be downloaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# What Ray's own processes do all the time, whether anything happens or not, takes a quarter of two cores.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")


@pytest.fixture(scope="session")
def tiny_sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in the layout of Stable Diffusion 1.5: epsilon prediction. Not to be written to."""
    from tests.pipelines import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in the layout of Stable Diffusion 2.1: v prediction. Not to be written to."""
    from tests.pipelines import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("sd2"), "sd2")


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def tiny_folder(request: pytest.FixtureRequest) -> Path:
    """Both of them, one after the other."""
    folder: Path = request.getfixturevalue(f"tiny_{request.param}_folder")
    return folder


@pytest.fixture(scope="session")
def scorer_arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Arguments of `image_reward` and `hpsv2`: random checkpoints, written in their environments.

    The environments are built under $KTO_RAY_ENVS, or else in .envs of this checkout, and stay there.
    """
    os.environ.setdefault("KTO_RAY_ENVS", str(Path(__file__).parents[1] / ".envs"))
    from rich.console import Console

    from kto_ray.score.environments import building, contents

    arguments = {}
    for name in contents.ENVIRONMENTS:
        folder = tmp_path_factory.mktemp(name)
        write = f"import json, pathlib; from kto_ray.score.scorers.{name} import random_checkpoint; "
        write += f"print(json.dumps(random_checkpoint(pathlib.Path({str(folder)!r}))))"
        python = building.build(name, Console())
        done = subprocess.run([python, "-I", "-c", write], stdout=subprocess.PIPE, text=True, check=True)
        arguments[name] = json.loads(done.stdout.splitlines()[-1])
    return arguments


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """The environment under which s3://... is a server on loopback."""
    from tests.s3 import s3_server

    with s3_server() as environment:
        yield environment


@pytest.fixture
def s3_bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://... of a bucket that this process can use."""
    from tests.s3 import make_bucket

    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_environment, "bucket")


@pytest.fixture
def calls_on_the_loop() -> Iterator[list["BlockingCall"]]:
    """What kept an event loop of this process waiting, see `tests/blocking.py`; a test says that there is nothing."""
    from tests.blocking import blocking_calls

    with blocking_calls() as calls:
        yield calls
