"""A run that is continued on less memory and with another password, and whether a secret is left anywhere."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kto_ray.config.resuming import changes_of
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage
from tests.end_to_end import jobs
from tests.end_to_end.cluster import free_port
from tests.postgres import Server, server  # noqa: F401  a fixture

FIRST, SECOND, KEY = "hunter2-first-secret", "hunter2-second-secret", "hunter2-api-key"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its sessions and logs; in a short path, as its sockets want it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_goes_on_with_less_memory_and_other_secrets_and_leaves_none(
    tmp_path: Path,
    tiny_sd1_folder: Path,
    server: Server,  # noqa: F811
    sessions: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = server.fresh()
    overrides = [
        *(f"model={tiny_sd1_folder}", "label.labeler=human", f"label.human.port={free_port()}"),
        *("label.deadline_s=1", "label.human.on_deadline=scorer", f"label.scorers.CoinScorer.args.api_key={KEY}"),
        *("generate.resources.num_cpus=0.4", "train.resources.num_cpus=0.6"),
    ]
    first = f"label.human.database={database.replace('tests@', f'tests:{FIRST}@')}"
    job = jobs.start(tmp_path, "run", [*overrides, first, "rounds=1"])
    assert job.wait() == 0, job.output()

    less = ["generate.batch_size=1", "train.gradient_checkpointing=true", "train.micro_batch=4"]
    monkeypatch.setenv("KTO_TEST_PASSWORD", SECOND)
    second = f"label.human.database={database.replace('tests@', 'tests:$KTO_TEST_PASSWORD@')}"
    job = jobs.start(tmp_path, "run", [*overrides, second, *less, "rounds=2"])
    assert job.wait() == 0, job.output()
    assert "from round 1 on" in job.output()

    run = Storage(str(job.run))
    assert [(row["round"], row["field"]) for row in changes_of(run)] == [
        (1, field) for field in ("rounds", "generate.batch_size", "train.micro_batch", "train.gradient_checkpointing")
    ]
    human = saved_config(run).label.human
    assert human.database is not None
    assert ":$KTO_TEST_PASSWORD@" in human.database.get_secret_value()
    assert jobs.summary(job.run)["ledger"]["balances"]

    left = [path for root in (tmp_path, sessions) for path in root.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "run.log", "raylet.out"} <= {path.name for path in left}
    telling = {str(path) for path in left for secret in (FIRST, SECOND, KEY) if secret.encode() in path.read_bytes()}
    assert not telling
