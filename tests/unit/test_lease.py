"""One driver a run: refused, taken over and lost, on a local disk, on fsspec and on S3."""

import asyncio
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kto_ray import lease as leases
from kto_ray.errors import UserError
from kto_ray.lease import Claim, Lease, LeaseLostError, held
from kto_ray.storage import Storage

ELSEWHERE = "another boot pid:[1]"


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return Storage(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}")
    return Storage({"local": str(tmp_path), "memory": f"memory:/{tmp_path}"}[request.param])


def claims(run: Storage) -> list[str]:
    return run.names("lease", suffix=".json")


def put(run: Storage, name: str, **facts: object) -> Claim:
    """A claim of a driver on another machine."""
    facts = {"host": "gpu-7", "machine": ELSEWHERE, "stale_s": 0.2, **facts}
    claim = dataclasses.replace(Claim.mine(60), **facts)  # type: ignore[arg-type]
    run.write_json(f"lease/{name}", dataclasses.asdict(claim))
    return claim


def fail(run: Storage) -> None:
    run.write("file", b"x")
    raise UserError("cannot read")


def test_the_lease_is_free_again_after_the_run_also_after_an_error(run: Storage) -> None:
    for _ in range(3):
        with pytest.raises(UserError, match="cannot read"), held(run, 10, 60) as (_, storage):
            fail(storage)
    assert len(claims(run)) == 1
    assert run.names() == ["file", "lease"]


def test_a_second_driver_is_refused_with_who_holds_it_and_since_when(run: Storage) -> None:
    with held(run, 10, 60), pytest.raises(UserError) as caught, held(run, 10, 60):
        pass
    for word in (f"run: {run} is in use by ", f"process {os.getpid()}", "since 20", "UTC", "another `run` name"):
        assert word in str(caught.value)
    with held(run, 10, 60):
        pass


def test_a_job_of_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "demo-1"}}')
    run = Storage(str(tmp_path))
    with held(run, 10, 60), pytest.raises(UserError, match="job demo-1"), held(run, 10, 60):
        pass


@pytest.mark.parametrize("run", ["local", "s3"], indirect=True)  # fsspec's memory:// cannot be read by two at once
def test_of_many_that_come_at_once_one_holds_at_a_time(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TRIES", 1)  # one of them gets it, without luck
    start, inside, most, won = threading.Barrier(6), [0], [0], [0]
    counting = threading.Lock()

    def driver() -> None:
        start.wait()
        try:
            with held(run, 10, 60):
                with counting:
                    inside[0] += 1
                    won[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.05)
                with counting:
                    inside[0] -= 1
        except UserError:
            pass

    threads = [threading.Thread(target=driver) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert won[0] >= 1


def test_a_killed_process_of_this_machine_is_taken_over_from_at_once(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    hold = (
        "import sys, time; from kto_ray.lease import held; from kto_ray.storage import Storage\n"
        "with held(Storage(sys.argv[1]), 10, 1e9): print('held', flush=True); time.sleep(1e6)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, run.uri], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {process.pid}"), held(run, 10, 60):
            pass
        process.send_signal(signal.SIGKILL)
    with held(run, 10, 60) as (lease, _):
        assert claims(run) == [lease.name]


def test_who_is_silent_for_long_is_taken_over_from(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    put(run, "00004-aaaaaaaa.json")
    with held(run, 0.05, 60) as (lease, _):
        assert claims(run) == [lease.name]
        assert lease.name.startswith("00005-")
    assert "waiting up to 0 s for a sign of life" in caplog.text
    assert "gpu-7" in caplog.text


def test_who_gives_a_sign_of_life_is_not_taken_over_from(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(run, 0.05, 1000) as (lease, storage):
        monkeypatch.setattr(leases, "_machine", lambda: ELSEWHERE)  # as seen from another machine
        with pytest.raises(UserError, match="is in use by"), held(run, 0.05, 1000):
            pass
        storage.write("file", b"x")
        assert claims(run) == [lease.name]


def test_who_is_renewed_at_the_last_moment_keeps_the_lease(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, write = put(run, "00004-aaaaaaaa.json"), Lease._write

    def late(lease: Lease) -> None:  # the silent one speaks after it was given up
        run.write_json("lease/00004-aaaaaaaa.json", dataclasses.asdict(dataclasses.replace(silent, renewals=1)))
        write(lease)

    monkeypatch.setattr(Lease, "_write", late)
    monkeypatch.setattr(leases, "TRIES", 1)
    with pytest.raises(UserError, match="at the same moment"), held(run, 0.05, 60):
        pass
    assert claims(run) == ["00004-aaaaaaaa.json"]


def test_a_crashed_newcomer_does_not_hide_who_holds(run: Storage) -> None:
    with held(run, 10, 60) as (lease, _):
        put(run, f"{lease.name[:6]}zzzzzzzz.json")
        with pytest.raises(UserError, match=f"process {os.getpid()}"), held(run, 0.05, 60):
            pass


def test_a_driver_that_lost_its_lease_writes_no_more(run: Storage) -> None:
    with held(run, 1000, 3000) as (lease, storage):
        (storage / "rounds").write("before", b"x")
        worker: Storage = pickle.loads(pickle.dumps(storage))  # one of its train workers
        worker.write("by a worker", b"x")
        put(run, "00009-aaaaaaaa.json")
        with pytest.raises(LeaseLostError, match=r"taken over by .* on gpu-7"):
            worker.write("by a worker again", b"x")
        with pytest.raises(LeaseLostError):
            lease.renew()
        with pytest.raises(LeaseLostError, match=r"taken over by .* on gpu-7"):
            (storage / "rounds").write("after", b"x")
    assert run.names("rounds") == ["before"]
    assert claims(run) == ["00009-aaaaaaaa.json"]
    assert not run.read_json("lease/00009-aaaaaaaa.json")["released"]


async def test_what_is_under_way_is_cancelled_when_the_lease_is_lost(tmp_path: Path) -> None:
    run, ended = Storage(str(tmp_path)), []

    async def work() -> None:
        put(run, "00009-aaaaaaaa.json")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with held(run, 0.05, 60) as (lease, _), pytest.raises(LeaseLostError, match="gpu-7"):
        await lease.while_held(work())
    assert ended == [True]


async def test_what_comes_of_the_work_comes_through(tmp_path: Path) -> None:
    async def work() -> int:
        return 7

    async def trouble() -> None:
        raise ValueError("trouble")

    with held(Storage(str(tmp_path)), 10, 60) as (lease, _):
        assert await lease.while_held(work()) == 7
        with pytest.raises(ValueError, match="trouble"):
            await lease.while_held(trouble())


def test_a_removed_claim_ends_the_run(run: Storage) -> None:
    with held(run, 1000, 3000) as (lease, storage):
        run.delete(f"lease/{lease.name}")
        with pytest.raises(LeaseLostError, match="was removed"):
            pickle.loads(pickle.dumps(storage)).write("file", b"x")


def test_a_machine_that_sees_another_folder_is_told(tmp_path: Path) -> None:
    with held(Storage(str(tmp_path / "one")), 10, 60) as (lease, storage):
        pickle.loads(pickle.dumps(storage)).require_seen()
        elsewhere = Storage(str(tmp_path / "other"), Lease(Storage(str(tmp_path / "other/lease")), *_parts(lease)))
        with pytest.raises(UserError, match=r"runs_folder: .* does not see what .* all machines of the cluster share"):
            elsewhere.require_seen()


def _parts(lease: Lease) -> tuple[str, Claim]:
    return lease.name, lease.claim


def test_what_is_no_claim_is_named(run: Storage) -> None:
    run.write("lease/00001-aaaaaaaa.json", b"{}")
    with pytest.raises(UserError, match=r"lease/00001-aaaaaaaa.json is not a driver's claim"), held(run, 10, 60):
        pass
