"""Two drivers of one run: the second is refused while the first lives, and goes on where it was killed."""

from pathlib import Path

from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs


def test_a_second_driver_is_refused_and_takes_over_from_a_killed_one(tmp_path: Path, tiny_sd1_folder: Path) -> None:
    command = [f"model={tiny_sd1_folder}", "label.scorers.CoinScorer.args.seconds=0.2"]
    first = jobs.start(tmp_path, "run", command)
    first.wait_until(lambda: list(first.run.glob("rounds/00000/samples/*.parquet")))
    saved = (first.run / "config.yaml").read_bytes()

    second = jobs.start(tmp_path, "run", [*command, "cluster.wait_s=5"])
    assert second.wait() == 2
    assert f"run: {first.run} is in use by " in second.output()
    assert f"(process {first.process.pid}) since 20" in second.output()
    assert (first.run / "config.yaml").read_bytes() == saved

    assert first.process.poll() is None
    first.kill()
    third = jobs.start(tmp_path, "run", command)
    assert third.wait() == 0, third.output()
    assert f"{first.run} is taken over from " in third.output()
    ledger = jobs.summary(third.run)["ledger"]
    assert ledger["balances"], ledger
    assert ledger["generated"] == ledger["labeled"] == 48
    for round_ in RoundStore(Storage(str(third.run))).rounds():
        round_.verify()
