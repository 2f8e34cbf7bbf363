"""The job, with generators, scorers and train workers that a test can hold up.

A batch is drawn or scored, or an optimizer step taken, only once `hold-draw`, `hold-score` or `hold-train` is gone from
the folder of runs, or after as many seconds as are written there. Who waits first touches a file of that name and
`-reached`. Nothing else is changed, and waiting costs no CPU: what a test looks at is then under way for as long as it
looks, on a fast machine and on a slow one.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kto_ray.records import Prompt
from tests.plugins import CoinScorer

DRAW, SCORE, TRAIN = "hold-draw", "hold-score", "hold-train"


def hold(folder: Path, what: str) -> None:
    """Wait while there is such a file, for at most as many seconds as it says."""
    file, began = folder / what, time.monotonic()
    if file.exists():
        (folder / f"{what}-reached").touch()
    while file.exists() and time.monotonic() - began < float(file.read_text() or "inf"):
        time.sleep(0.1)


class HeldScorer(CoinScorer):
    """A coin that can be held up.

    Args:
        folder: of runs.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        hold(self.folder, SCORE)
        return super().score(images_BHWC, prompts)


def train_worker(arguments: dict[str, Any]) -> None:
    """With a learner that can be held up."""
    from kto_ray.train import worker
    from kto_ray.train.learner import Learner

    folder = Path(arguments["config"].runs_folder)

    class Held(Learner):
        def _optimizer_step(self, *arguments: Any) -> None:
            hold(folder, TRAIN)
            super()._optimizer_step(*arguments)

    worker.Learner = Held  # type: ignore[misc]
    worker.train_worker(arguments)


def main() -> int:
    """`jobs/online_kto.py`, with these."""
    from kto_ray.generate import client
    from kto_ray.train import job
    from tests.held_generator import Generator

    client.Generator = Generator  # type: ignore[misc]
    job.train_worker = train_worker
    sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
    from online_kto import main as run

    return int(run())
