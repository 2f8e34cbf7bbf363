"""W&B and MLflow themselves, offline, writing to folders: figures, pictures and the resolved configuration arrive.

Both are extras, and not among what the tests install: where one is missing, its test is skipped.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kto_ray.config import RunConfig
from kto_ray.storage import Storage
from kto_ray.tracking import Metrics

COLOUR = (200, 30, 40)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), COLOUR).save(file, "png")
    return file.getvalue()


def log_a_run(config: RunConfig, folder: Path) -> None:
    """Begun, and continued."""
    for version in (0, 1):
        metrics = Metrics(config, Storage(str(folder / "run")))
        metrics.log("round", version, {"loss": 0.5 + version})
        metrics.log("evaluation", version, {"pass_rate": 0.25 + version / 2}, picture())
        metrics.close()


def assert_same_picture(file: Path) -> None:
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), np.full((6, 8, 3), COLOUR))


@pytest.mark.filterwarnings("default")  # their own
def test_wandb_keeps_figures_pictures_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracking = {"tensorboard": False, "wandb_project": "p"}
    log_a_run(RunConfig.model_validate({"run": "demo", "seed": 123, "tracking": tracking}), tmp_path)

    pictures = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/evaluation/pictures_*.png"))
    assert len(pictures) == 2
    for file in pictures:
        assert_same_picture(file)
    logs = b"".join(file.read_bytes() for file in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    for said in (b"evaluation/pass_rate", b"round/loss", b"images_per_round", b"123"):
        assert said in logs


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_figures_pictures_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    tracking = {"tensorboard": False, "mlflow_uri": uri}
    log_a_run(RunConfig.model_validate({"run": "demo", "seed": 123, "tracking": tracking}), tmp_path)

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("kto-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "evaluation.pass_rate")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.25), (1, 0.75)]
    config = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
    assert "seed: 123" in config.read_text()
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(pictures) == 2
    for name in pictures:
        assert_same_picture(Path(client.download_artifacts(run.info.run_id, name, str(tmp_path))))
