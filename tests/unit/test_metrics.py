"""`metrics.jsonl` is JSON for every reader, whatever the figures are."""

import json
import math
from pathlib import Path

from kto_ray.config import RunConfig
from kto_ray.storage import Storage
from kto_ray.tracking import Metrics, numbers

CONFIG = RunConfig.model_validate({"tracking": {"tensorboard": False}})


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_a_figure_that_is_not_finite_is_null_on_disk_none_in_memory_and_told_to_no_tracker(tmp_path: Path) -> None:
    metrics = Metrics(CONFIG, Storage(str(tmp_path)))
    metrics.log("round", 0, {"objective/loss": math.nan, "objective/z": -math.inf, "desirable": 3, "name": "x"})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = json.loads(line, parse_constant=refuse)
    assert (written["objective/loss"], written["objective/z"], written["desirable"]) == (None, None, 3)
    assert metrics.of("round") == [written] == Metrics(CONFIG, Storage(str(tmp_path))).of("round")
    assert numbers(written) == {"round/desirable": 3.0}
