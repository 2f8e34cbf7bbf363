"""Fixtures of all tests. Heavy libraries are imported by the fixtures that need them."""

import os
from pathlib import Path

import pytest

# Before torch is imported: tiny tensors gain nothing from threads, and nothing may be downloaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


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
