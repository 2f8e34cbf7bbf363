"""Where figures go: `metrics.jsonl` always; TensorBoard, W&B and MLflow as configured.

The loop logs one flat row an event; `metrics.jsonl` is the record that summary and report are made from, also on a
resumed run, so a row for a (kind, step) that is there already replaces nothing and is not written again. A figure that
is not finite is null in it. The picture of an evaluation lies in `pictures/`. From there rows go to each tracker
through an `outbox.py`, which waits for servers that are away, and to Ray's metrics endpoint (`telemetry.py`), which has
the newest of each kind.
"""

import importlib.util
import io
import json
import math
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kto_ray import telemetry
from kto_ray.config import RunConfig, Tracking, public
from kto_ray.errors import UserError
from kto_ray.naming import unique_name
from kto_ray.outbox import Outbox, Row, join_all
from kto_ray.storage import Storage, to_json

KINDS = ("round", "evaluation", "fresh_evaluation")
"""Of rows; a round's step is its number, an evaluation's the version of the policy."""


class TensorBoardTracker:
    """Event files in `<run>/tensorboard`; where that is remote, one for each row, which is put there whole."""

    package = "tensorboardX"

    def __init__(self, config: RunConfig, run: Storage) -> None:
        self._run = run
        self._writer = self._open(run.local / "tensorboard") if run.local else None

    def log(self, row: Row) -> None:
        if self._writer is not None:
            self._add(self._writer, row)
            self._writer.flush()
            return
        with tempfile.TemporaryDirectory(prefix="kto-ray-") as here:
            writer = self._open(Path(here), f".{row['kind']}-{row['step']}")
            self._add(writer, row)
            writer.close()  # unlike flush(), it waits until all is written
            for file in Path(here).iterdir():
                self._run.write(f"tensorboard/{file.name}", file.read_bytes())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, folder: Path, suffix: str = "") -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(folder), filename_suffix=suffix)

    def _add(self, writer: Any, row: Row) -> None:
        if (picture := picture_of(self._run, row)) is not None:
            at = {"global_step": row["step"], "walltime": row["time"], "dataformats": "HWC"}
            writer.add_image(f"{row['kind']}/pictures", np.asarray(picture), **at)
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, row["step"], walltime=row["time"])


class WandbTracker:
    """A Weights & Biases run of the same name, and of an id of its own; continued when the run is."""

    package = "wandb"

    def __init__(self, config: RunConfig, run: Storage) -> None:
        import wandb

        self._folder, self._wandb = run, wandb
        self._run = wandb.init(
            project=config.tracking.wandb_project,
            name=config.run,
            id=unique_name(run),
            resume="allow",
            config=public(config),
        )
        for kind in KINDS:
            # W&B's own step must grow with every row, also after a continuation: of a row at an earlier one, or of the
            # other kind at the same one, nothing would be kept.
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def log(self, row: Row) -> None:
        figures: dict[str, Any] = numbers(row) | {f"{row['kind']}/step": row["step"]}
        if (picture := picture_of(self._folder, row)) is not None:
            figures[f"{row['kind']}/pictures"] = self._wandb.Image(picture)
        self._run.log(figures)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run in the experiment "kto-ray", continued when the run is."""

    package = "mlflow"

    def __init__(self, config: RunConfig, run: Storage) -> None:
        from mlflow import MlflowClient

        self._folder, name = run, unique_name(run)
        self._client = MlflowClient(tracking_uri=config.tracking.mlflow_uri)
        experiment = self._client.get_experiment_by_name("kto-ray")
        number = experiment.experiment_id if experiment else self._client.create_experiment("kto-ray")
        earlier = self._client.search_runs([number], f"attributes.run_name = '{name}'")
        self._run = (earlier[0] if earlier else self._client.create_run(number, run_name=name)).info.run_id
        self._client.update_run(self._run, status="RUNNING")
        self._client.log_dict(self._run, public(config), "config.yaml")  # of the last continuation; params never change

    def log(self, row: Row) -> None:
        from mlflow.entities import Metric

        at = int(1000 * row["time"])
        figures = numbers(row).items()
        self._client.log_batch(
            self._run, [Metric(name.replace("/", "."), value, at, row["step"]) for name, value in figures]
        )
        if (picture := picture_of(self._folder, row)) is not None:
            self._client.log_image(self._run, picture, key=f"{row['kind']}.pictures", step=row["step"], timestamp=at)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def wanted(settings: Tracking) -> dict[str, Any]:
    """The classes of the trackers that `tracking` asks for, by name."""
    asked = {
        "tensorboard": (TensorBoardTracker, settings.tensorboard),
        "wandb": (WandbTracker, settings.wandb_project),
        "mlflow": (MlflowTracker, settings.mlflow_uri),
    }
    return {name: tracker for name, (tracker, asked_for) in asked.items() if asked_for}


def make_outboxes(config: RunConfig, run: Storage) -> list[Outbox]:
    """One for each tracker that `tracking` asks for. Raises UserError when its package is not installed."""
    check(config.tracking)
    trackers = wanted(config.tracking)
    return [Outbox(name, partial(tracker, config, run), run) for name, tracker in trackers.items()]


def check(settings: Tracking) -> None:
    """Raises UserError when the package of a tracker that is asked for is not installed."""
    for name, tracker in wanted(settings).items():
        if importlib.util.find_spec(tracker.package) is None:
            install = tracker.package if name == "tensorboard" else f"'kto-ray[{name}]'"
            raise UserError(f"tracking: {name} is asked for but not installed: pip install {install}")


class Metrics:
    """The rows of a run, in `metrics.jsonl` and in the trackers."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        self.run = run
        self.outboxes = make_outboxes(config, run)
        telemetry.of_run(unique_name(run))
        text = run.read("metrics.jsonl").decode() if run.exists("metrics.jsonl") else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]
        self._post(self.rows)

    def log(self, kind: str, step: int, figures: Mapping[str, Any], picture: bytes | None = None) -> None:
        """Add the row of one event; `kind` is "round" or "evaluation", `step` the round or policy version.

        Args:
            picture: a PNG file that trackers show beside the figures.
        """
        if self.row(kind, step):
            return
        if picture is not None:
            self.run.write(picture_file(kind, step), picture)  # first: a row is sent with its picture
        # As it will be read again: what is null on disk is None here.
        row = json.loads(to_json({"kind": kind, "step": step, "time": time.time(), **figures}))
        self.rows.append(row)
        self.run.write("metrics.jsonl", "".join(to_json(row) + "\n" for row in self.rows).encode())
        self._post([row])
        telemetry.tell_figures(kind, row)

    def row(self, kind: str, step: int) -> Row | None:
        return next((row for row in self.rows if row["kind"] == kind and row["step"] == step), None)

    def of(self, kind: str) -> list[Row]:
        return sorted((row for row in self.rows if row["kind"] == kind), key=lambda row: int(row["step"]))

    def close(self) -> None:
        """Wait, not for ever, until trackers have what they can be sent."""
        join_all(self.outboxes)

    def _post(self, rows: list[Row]) -> None:
        for outbox in self.outboxes:
            outbox.post(rows)


def picture_file(kind: str, step: int) -> str:
    """In a run's folder."""
    return f"pictures/{kind}-{step:05}.png"


def picture_of(run: Storage, row: Row) -> Image.Image | None:
    """What an event looks like, if there is a picture of it."""
    name = picture_file(row["kind"], row["step"])
    return Image.open(io.BytesIO(run.read(name))) if run.exists(name) else None


def numbers(row: Row) -> dict[str, float]:
    """The figures of a row that are finite numbers, under "kind/name"."""
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in ("step", "time")
    }
