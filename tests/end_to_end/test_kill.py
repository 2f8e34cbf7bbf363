"""Whatever is killed, at any moment: the same command continues, nothing is lost and nothing counted twice."""

from pathlib import Path

import pytest

from kto_ray.policies import PolicyStore
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_folder: Path) -> Path:
    job = jobs.start(tmp_path_factory.mktemp("undisturbed"), "run", [f"model={tiny_sd1_folder}"])
    assert job.wait() == 0, job.output()
    return job.run


def assert_whole(run: Path, undisturbed: Path) -> None:
    """The ledger balances, sample ids are those of an undisturbed run, all files are as their digests say."""
    ledger = jobs.summary(run)["ledger"]
    assert ledger["balances"], ledger
    assert ledger["generated"] == ledger["labeled"] == 48
    assert ledger["trained_twice"] == 0
    assert jobs.sample_ids(run) == jobs.sample_ids(undisturbed)
    policies, rounds = PolicyStore(Storage(str(run))), RoundStore(Storage(str(run)))
    assert policies.versions() == [0, 1, 2]
    for version in policies.versions():
        policies.load(policies.resolve(version))
    for index, round_ in enumerate(rounds.rounds()):
        round_.verify()
        assert {sample.policy for sample in round_.samples()} == {policies.resolve(index)}


def test_a_killed_replica_scorer_train_worker_and_coordinator_cost_nothing(
    tmp_path: Path, tiny_sd1_folder: Path, undisturbed: Path
) -> None:
    # So that there is something under way when it is killed, on a fast machine, too.
    slow = ["generate.steps=25", "label.scorers.CoinScorer.args.seconds=0.5", "train.epochs=12"]
    job = jobs.start(tmp_path, "run", [f"model={tiny_sd1_folder}", *slow])

    job.wait_until(lambda: list(job.run.glob("rounds/00000/samples/*.parquet")))
    job.actors("ServeReplica")[0].kill()
    job.wait_until(lambda: list(job.run.glob("rounds/00000/scores/*.parquet")))
    job.actors("ScorerActor")[0].kill()
    job.wait_until(lambda: (job.run / "rounds/00000/manifest.json").exists())
    job.wait_until(lambda: job.actors("RayTrainWorker"))[0].kill()
    job.wait_until(lambda: "the train workers failed (rank 0: " in job.output())
    job.wait_until(lambda: job.actors("ray::Coordinator"))[0].kill()
    job.wait_until(lambda: (job.run / "rounds/00001/manifest.json").exists())
    job.wait_until(lambda: job.actors("ray::Coordinator"))[0].kill()
    job.wait_until(lambda: job.actors("RayTrainWorker"))[0].kill()

    assert job.wait() == 0, job.output()
    assert "a generator replica died" in job.output()
    assert "scorer CoinScorer: scorer actor died" in job.output()
    assert_whole(job.run, undisturbed)


def test_a_killed_driver_continues_where_it_was_and_no_other_may_before(
    tmp_path: Path, tiny_sd1_folder: Path, undisturbed: Path
) -> None:
    """Killed once more, where a policy is published and its round not yet recorded as trained: `test_s3.py`."""
    command = [f"model={tiny_sd1_folder}", "label.scorers.CoinScorer.args.seconds=0.2"]
    first = jobs.start(tmp_path, "run", command)
    first.wait_until(lambda: list(first.run.glob("rounds/00000/samples/*.parquet")))  # images of an open round
    saved = (first.run / "config.yaml").read_bytes()
    second = jobs.start(tmp_path, "run", [*command, "cluster.wait_s=5"])
    assert second.wait() == 2
    assert f"run: {first.run} is in use by " in second.output()
    assert f"(process {first.process.pid}) since 20" in second.output()
    assert (first.run / "config.yaml").read_bytes() == saved
    assert first.process.poll() is None
    first.kill()

    third = jobs.start(tmp_path, "run", command)
    third.wait_until((third.run / "rounds/00000/manifest.json").exists)  # a sealed round that is not trained
    third.kill()
    assert not (third.run / "summary.json").exists()

    job = jobs.start(tmp_path, "run", command)
    assert job.wait() == 0, job.output()
    assert f"{first.run} is taken over from " in job.output()
    assert_whole(job.run, undisturbed)
