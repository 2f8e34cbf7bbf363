"""Where figures go: `metrics.jsonl` always; TensorBoard, W&B and MLflow as configured.

The loop logs one flat row an event; `metrics.jsonl` is the record that summary and report are made from, also on a
resumed run, so a row for a (kind, step) that is there already replaces nothing and is not written again.
"""

import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

from kto_ray.config import RunConfig, Tracking
from kto_ray.errors import UserError
from kto_ray.storage import Storage

Row = dict[str, Any]


class Tracker(Protocol):
    """A service that takes numbers."""

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(f"{run.local or run.uri}/tensorboard")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run of the same name, continued when the run is."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        import wandb

        self._run = wandb.init(
            project=config.tracking.wandb_project,
            name=config.run,
            id=config.run,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run in the experiment "kto-ray", continued when the run is."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        import mlflow

        mlflow.set_tracking_uri(config.tracking.mlflow_uri)
        mlflow.set_experiment("kto-ray")
        earlier = mlflow.search_runs(filter_string=f"attributes.run_name = '{config.run}'", output_format="list")
        self._client = mlflow
        mlflow.start_run(run_id=earlier[0].info.run_id if earlier else None, run_name=config.run)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._client.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._client.end_run()


def make_trackers(config: RunConfig, run: Storage) -> list[Tracker]:
    """The trackers that `tracking` asks for. Raises UserError when one's package is not installed."""
    settings: Tracking = config.tracking
    wanted: dict[str, Any] = {
        "tensorboard": TensorBoardTracker if settings.tensorboard else None,
        "wandb": WandbTracker if settings.wandb_project else None,
        "mlflow": MlflowTracker if settings.mlflow_uri else None,
    }
    trackers: list[Tracker] = []
    for name, tracker in wanted.items():
        if tracker is not None:
            try:
                trackers.append(tracker(config, run))
            except ImportError as error:
                raise UserError(
                    f"tracking: {name} is asked for but not installed: pip install 'kto-ray[{name}]'"
                ) from error
    return trackers


class Metrics:
    """The rows of a run, in `metrics.jsonl` and in the trackers."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        self.run = run
        self.trackers = make_trackers(config, run)
        text = run.read("metrics.jsonl").decode() if run.exists("metrics.jsonl") else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]

    def log(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        """Add the row of one event; `kind` is "round" or "evaluation", `step` the round or policy version."""
        if any(row["kind"] == kind and row["step"] == step for row in self.rows):
            return
        self.rows.append({"kind": kind, "step": step, "time": time.time(), **figures})
        self.run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        numbers = {f"{kind}/{name}": float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(step, numbers)

    def of(self, kind: str) -> list[Row]:
        return sorted((row for row in self.rows if row["kind"] == kind), key=lambda row: int(row["step"]))

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
