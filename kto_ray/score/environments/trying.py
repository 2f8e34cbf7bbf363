"""Trying an environment: its scorer on a random checkpoint in the true format, and one picture."""

import importlib
import json
import os
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from kto_ray.errors import UserError
from kto_ray.score.environments.finding import interpreter, named


def check(name: str) -> dict[str, Any]:
    """Build the scorer in its environment, on a random checkpoint in the true format, and score one picture.

    It is the environment that is checked: nothing is downloaded, and no true weights are read.

    Returns:
        What `try_scorer` printed.

    Raises:
        UserError: see `interpreter`; or the scorer does not work, with its last words.
    """
    program = f"from kto_ray.score.environments.trying import try_scorer; try_scorer({name!r})"
    done = subprocess.run(
        [interpreter(named(name).name), "-I", "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"environment {name!r} is built, but its scorer does not work in it: {words[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def try_scorer(name: str) -> None:
    """Runs inside the environment: print score, seconds and versions as JSON. Raises whatever goes wrong."""
    import numpy as np

    from kto_ray.score.actor import ScorerActor
    from kto_ray.score.scorers import SCORERS

    began = time.monotonic()
    module = importlib.import_module(SCORERS[name].partition(":")[0])
    picture_BHWC = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        actor = ScorerActor(name, module.random_checkpoint(Path(folder)))
        [(score, error)] = actor.score_plain(
            (picture_BHWC.tobytes(), picture_BHWC.shape), [("check", "a red circle on black", {})]
        )
    if error is not None:
        raise RuntimeError(error)
    versions = {package: metadata.version(package) for package in ("ray", "torch", "torchvision", "numpy")}
    print(json.dumps({"score": score, "seconds": time.monotonic() - began, "versions": versions}))
