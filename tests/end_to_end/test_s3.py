"""A run whose folder is on S3, continued after a kill; a bucket that is not there is a sentence."""

from pathlib import Path

import pytest

from kto_ray.policies import PolicyStore
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs


def test_a_run_on_s3_continues_where_it_was_killed(tmp_path: Path, tiny_sd1_folder: Path, s3_bucket: str) -> None:
    run = Storage(f"{s3_bucket}/runs") / "run"
    command = [f"runs_folder={s3_bucket}/runs", f"model={tiny_sd1_folder}"]
    job = jobs.start(tmp_path, "run", command)
    job.wait_until(lambda: run.exists("policies/00001/policy.json"))
    job.kill()

    again = jobs.start(tmp_path, "run", command)
    assert again.wait() == 0, again.output()
    assert f"{s3_bucket}/runs/run/report.html" in again.output()
    ledger = run.read_json("summary.json")["ledger"]
    assert ledger["balances"], ledger
    assert ledger["generated"] == ledger["labeled"] == 48
    assert ledger["trained_twice"] == 0
    for round_ in RoundStore(run).rounds():
        round_.verify()
    policies = PolicyStore(run)
    assert policies.versions() == [0, 1, 2]
    for version in policies.versions():
        policies.load(policies.resolve(version))
    assert [name for name in run.names("tensorboard") if name.startswith("events")]
    assert run.exists("report.html")


@pytest.mark.usefixtures("s3_bucket")
def test_a_bucket_that_is_not_there_ends_the_command_before_the_cluster(tmp_path: Path, tiny_sd1_folder: Path) -> None:
    job = jobs.start(tmp_path, "run", ["runs_folder=s3://no-such-bucket/runs", f"model={tiny_sd1_folder}"])
    assert job.wait() == 2
    assert "there is no bucket 'no-such-bucket'" in job.output()
    assert "Traceback" not in job.output()
