"""Trackers: what they are sent, in which order, and what becomes of rows while a server is away."""

import json
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kto_ray import loop, tracking
from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.outbox import Outbox, Row, join_all
from kto_ray.storage import Storage
from kto_ray.tracking import Metrics

WAIT_S = 60.0


class Server:
    """What a tracking server was sent; it is away while `down` is set."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.down = self.closed = False
        self.tried = threading.Semaphore(0)

    def connect(self) -> "Connection":
        self.answer()
        return Connection(self)

    def answer(self) -> None:
        self.tried.release()
        if self.down:
            raise ConnectionError("POST https://me:secret@host/api failed")


class Connection:
    def __init__(self, server: Server) -> None:
        self.server = server

    def log(self, row: Row) -> None:
        self.server.answer()
        self.server.rows.append(row)

    def close(self) -> None:
        self.server.closed = True


def row(step: int, kind: str = "round", time: float = 0.0) -> Row:
    return {"kind": kind, "step": step, "time": time or float(step), "loss": 0.5}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def outbox(server: Server, tmp_path: Path) -> Callable[[], Outbox]:
    return lambda: Outbox("mine", server.connect, Storage(str(tmp_path)))


def test_rows_arrive_in_their_order(server: Server, outbox: Callable[[], Outbox]) -> None:
    box = outbox()
    for step in range(5):
        box.post([row(step)])
    join_all([box])
    assert server.rows == [row(step) for step in range(5)]
    assert server.closed


@pytest.mark.parametrize("when", ["before the first row", "after the first row"])
def test_what_a_server_missed_is_sent_when_it_answers_again(
    server: Server, outbox: Callable[[], Outbox], caplog: pytest.LogCaptureFixture, when: str
) -> None:
    caplog.set_level(logging.WARNING)
    server.down = when.startswith("before")
    box = outbox()
    box.post([row(0)])
    for _ in range(1 if server.down else 2):  # to connect, and to send
        assert server.tried.acquire(timeout=WAIT_S)
    for step in range(1, 4):
        server.down = True
        box.post([row(step)])
        assert server.tried.acquire(timeout=WAIT_S)
    server.down = False
    box.post([row(4)])
    join_all([box])
    assert server.rows == [row(step) for step in range(5)]
    assert [text.partition(" (")[0] for text in caplog.messages] == [
        "tracking: mine does not answer",
        "tracking: mine answers again, and has what it missed",
    ]
    assert "secret" not in caplog.text


def test_a_continued_run_sends_what_an_earlier_one_could_not(
    server: Server, outbox: Callable[[], Outbox], caplog: pytest.LogCaptureFixture
) -> None:
    first = outbox()
    first.post([row(0)])
    join_all([first])
    server.down = True
    second = outbox()
    second.post([row(0), row(1)])
    join_all([second])
    assert "1 rows could not be sent to mine" in caplog.text
    server.down = False
    third = outbox()
    third.post([row(0), row(1), row(2)])
    join_all([third])
    assert server.rows == [row(0), row(1), row(2)]


def test_a_round_that_was_done_again_is_sent_again(server: Server, outbox: Callable[[], Outbox]) -> None:
    for time in (1.0, 2.0):
        box = outbox()
        box.post([row(0, time=time)])
        join_all([box])
    assert server.rows == [row(0, time=1.0), row(0, time=2.0)]


def test_a_server_that_hangs_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    let_go = threading.Event()

    class Hanging(Connection):
        def log(self, row: Row) -> None:
            let_go.wait(WAIT_S)

    box = Outbox("mine", lambda: Hanging(Server()), Storage(str(tmp_path)))
    box.post([row(0)])
    join_all([box], timeout_s=0.01)
    assert "1 rows could not be sent to mine" in caplog.text
    let_go.set()
    box.join(WAIT_S)


# -- metrics and their trackers ---------------------------------------------------------------------------------------


@pytest.fixture
def config(server: Server, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    class Mine(Connection):
        package = "json"

        def __init__(self, *_: Any) -> None:
            super().__init__(server)
            server.answer()

    monkeypatch.setattr(tracking, "MlflowTracker", Mine)
    return RunConfig.model_validate({"run": "r", "tracking": {"tensorboard": False, "mlflow_uri": "http://here"}})


def test_a_run_goes_on_while_its_tracker_is_away(server: Server, config: RunConfig, tmp_path: Path) -> None:
    server.down = True
    metrics = Metrics(config, Storage(str(tmp_path)))
    metrics.log("round", 0, {"loss": 0.5})
    metrics.close()
    server.down = False
    continued = Metrics(config, Storage(str(tmp_path)))
    continued.log("round", 0, {"loss": 9})
    continued.log("evaluation", 1, {"pass_rate": 0.5})
    continued.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert server.rows == rows == continued.rows
    assert [(row["kind"], row["step"]) for row in rows] == [("round", 0), ("evaluation", 1)]


@dataclass
class Checked:
    """A run that nothing is wrong with."""

    run: Storage

    def begin(self, config: RunConfig) -> None: ...


def test_a_finished_run_that_is_begun_again_sends_what_its_tracker_missed(
    server: Server, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(str(tmp_path))
    monkeypatch.setattr(loop.Preflight, "check", lambda _: Checked(run))
    server.down = True
    metrics = Metrics(config, run)
    metrics.log("round", 0, {"loss": 0.5})
    metrics.close()
    run.write_json("summary.json", {"policy_version": config.rounds})
    server.down = False
    for _ in range(2):
        assert loop.run_online_kto(config) == {"policy_version": config.rounds}
        assert server.rows == metrics.rows


def test_a_tracker_whose_package_is_missing_is_refused(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.MlflowTracker, "package", "not_installed_anywhere")
    with pytest.raises(UserError, match=r"mlflow is asked for but not installed: pip install 'kto-ray\[mlflow\]'"):
        Metrics(config, Storage(str(tmp_path)))


def test_tensorboard_on_s3_needs_nothing_but_the_storage(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorboardX.record_writer.S3_ENABLED", False)  # as without boto3
    run = Storage(f"{s3_bucket}/{tmp_path.name}")
    tracker = tracking.TensorBoardTracker(RunConfig(), run)
    tracker.log(row(3))
    (first,) = run.names("tensorboard")
    assert b"round/loss" in run.read(f"tensorboard/{first}")
    tracker.log(row(3, "evaluation"))
    tracker.close()
    (second,) = {*run.names("tensorboard")} - {first}
    assert b"evaluation/loss" in run.read(f"tensorboard/{second}")


class FakeWandb(ModuleType):
    """Keeps W&B's rule: a run has a step of its own, begins at 0 or after the last one that is kept of an earlier
    process, and drops what is logged at an earlier step. What a chart shows is drawn over its step metric."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.kept: dict[int, dict[str, float]] = {}
        self.axes: dict[str, str] = {}

    def init(self, **_: Any) -> "FakeWandb":
        self.step = max(self.kept, default=-1) + 1
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        if step is not None and step < self.step:
            return
        self.step = self.step if step is None else step
        self.kept[self.step] = self.kept.get(self.step, {}) | figures
        self.step += step is None

    def finish(self) -> None: ...


def test_a_continued_run_of_wandb_keeps_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking.WandbTracker, "package", "json")
    config = RunConfig.model_validate({"tracking": {"tensorboard": False, "wandb_project": "p"}})
    for rounds in ([0, 1], [2, 3]):
        metrics = Metrics(config, Storage(str(tmp_path)))
        for index in rounds:
            metrics.log("round", index, {"loss": 0.5})
        metrics.log("evaluation", rounds[-1] + 1, {"pass_rate": 0.5})
        metrics.close()
    assert wandb.axes == {f"{kind}/*": f"{kind}/step" for kind in ("round", "evaluation", "fresh_evaluation")}
    kept = [wandb.kept[step] for step in sorted(wandb.kept)]
    assert [row["round/step"] for row in kept if "round/loss" in row] == [0, 1, 2, 3]
    assert [row["evaluation/step"] for row in kept if "evaluation/pass_rate" in row] == [2, 4]
