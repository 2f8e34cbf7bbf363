"""The contract checks in a real actor: a scorer's crash and hang are findings, and the examples pass."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kto_ray.check.contract import check_scorer
from kto_ray.check.scorer_trial import SCORER_CHECKS
from kto_ray.config import Cluster
from kto_ray.records import Prompt


class Named:
    name = "named"
    version = "1"

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        return [float(image.mean()) for image in images_BHWC]


class Crashing(Named):
    """Ends its process at an empty batch."""

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        if not len(images_BHWC):
            os._exit(1)
        return super().score(images_BHWC, prompts)


class Hanging(Named):
    """Does not come back from scoring."""

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        time.sleep(600)
        return super().score(images_BHWC, prompts)


class ThisProcessOnly(Named):
    """Cannot be built anywhere else."""

    def __init__(self, pid: int) -> None:
        if os.getpid() != pid:
            raise RuntimeError("what I need lives in another process")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from kto_ray.cluster import connected

    with connected(Cluster(address="local")):
        yield


@pytest.mark.usefixtures("cluster")
def test_a_scorer_is_tried_in_an_actor_of_the_cluster() -> None:
    findings = check_scorer("examples.my_taste:Sharpness", size=(48, 80))
    assert [finding for finding in findings if not finding.passed] == []
    assert [finding.name for finding in findings[2:]] == list(SCORER_CHECKS)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("scorer", "arguments", "wait_s", "check", "words"),
    [
        (Crashing, {}, 120, "takes an empty batch", "its process died"),
        (Hanging, {}, 20, "scores a batch", "no answer within 20 s"),
        (ThisProcessOnly, {"pid": os.getpid()}, 120, "is built in a process of its own", "lives in another process"),
    ],
)
def test_what_breaks_the_process_is_the_last_finding(
    scorer: type, arguments: dict[str, Any], wait_s: float, check: str, words: str
) -> None:
    findings = check_scorer(f"{__name__}:{scorer.__name__}", arguments, wait_s=wait_s)
    assert [finding.passed for finding in findings] == [True] * (len(findings) - 1) + [False]
    assert findings[-1].name == check
    assert words in findings[-1].words


def test_without_a_cluster_it_starts_its_own_and_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    ray.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = check_scorer("redness")
    assert [finding for finding in findings if not finding.passed] == []
    assert not ray.is_initialized()
