"""Whole runs, as processes: any diffusers folder by name, every mode of training, and what a run leaves behind."""

import json
import re
from pathlib import Path

from click.testing import CliRunner
from diffusers import StableDiffusionPipeline

from kto_ray.cli import main
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs

OWN = re.compile(
    r"(images|optimizer steps|effective batch|draws of a sample): "  # what the configuration implies
    r"|round \d+: |  policy \d+: |held-out images that pass: |.*/report\.html$"
    r"|WARNING: (still waiting for |round \d+: |prompts\.\w+: )"  # busy machine; few verdicts; a tiny model
)
"""How the lines begin that a run says itself, where nothing goes wrong."""


def foreign_lines(job: jobs.Job) -> list[str]:
    """Those of everybody else, an empty one among them."""
    summary = jobs.summary(job.run)
    opinions = (*summary["hints"], *summary["doubts"])
    lines = [line for line in job.output().splitlines() if not OWN.match(line)]
    return [line for line in lines if not line or not any(opinion.endswith(line) for opinion in opinions)]


def test_a_run_leaves_report_summary_metrics_rounds_and_policies(
    tmp_path: Path, tiny_sd1_folder: Path, one_ray: dict[str, str]
) -> None:
    job = jobs.start(tmp_path, "run", [f"model={tiny_sd1_folder}", "evaluate.every=1"], program=[jobs.JOB])
    assert job.wait() == 0, job.output()
    assert job.output().rstrip().endswith("run/report.html")
    assert foreign_lines(job) == []
    (log,) = (job.run / "logs").iterdir()
    assert "(TrainController pid=" in log.read_text()

    summary = jobs.summary(job.run)
    assert summary["images"] == 48
    assert {"pass_rate", "mean_score"} <= summary["base"].keys()
    assert {"pass_rate", "mean_score", "win_rate"} <= summary["final"].keys()
    assert summary["seconds"]["total"] > 0
    ledger = summary["ledger"]
    assert (ledger["generated"], ledger["labeled"], ledger["pending"], ledger["failed"]) == (48, 48, 0, 0)
    assert 0 < ledger["trained"] <= 48

    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "round"] == [0, 1]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [0, 1, 2]
    assert all(row["policy_lag_mean"] == 0 for row in rows if row["kind"] == "round")
    assert list(job.run.glob("tensorboard/events*"))
    assert "<html" in (job.run / "report.html").read_text()

    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_sd1_folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(job.run / "policies/00002", weight_name="policy.safetensors")

    report = tmp_path / "again.html"
    said = CliRunner().invoke(main, ["report", str(job.run), "--out", str(report)])
    assert said.exit_code == 0, said.output
    assert report.read_text() == (job.run / "report.html").read_text()

    again = jobs.start(tmp_path, "run", [f"model={tiny_sd1_folder}", "evaluate.every=1"], one_ray)
    assert again.wait() == 0
    assert jobs.summary(job.run) == summary

    other = jobs.start(tmp_path, "run", [f"model={tiny_sd1_folder}", "train.objective.beta=7"])
    assert other.wait() == 2
    assert "train.objective.beta: the run has 75.0, this command says 7.0" in other.output()


def test_failed_scores_are_counted_and_never_trained_on(
    tmp_path: Path, tiny_sd1_folder: Path, one_ray: dict[str, str]
) -> None:
    brittle = [
        "label.scorers=tests.plugins:BrittleScorer",
        "label.scorers.BrittleScorer.max_retries=1",
        "label.scorers.BrittleScorer.max_actors=1",
        "rounds=1",
        "generate.batch_size=1",
    ]

    strict = jobs.start(tmp_path, "strict", [f"model={tiny_sd1_folder}", *brittle], one_ray)
    assert strict.wait() == 2
    assert "label.max_failed_fraction (0.1)" in strict.output()

    bearing = [f"model={tiny_sd1_folder}", *brittle, "label.max_failed_fraction=1"]
    tolerant = jobs.start(tmp_path, "tolerant", bearing, one_ray)
    assert tolerant.wait() == 0, tolerant.output()
    round_ = RoundStore(Storage(str(tolerant.run))).round(0)
    failed = {score.sample_id: score.error or "" for score in round_.scores() if score.value is None}
    of_prompt = {sample.id: sample.prompt.text for sample in round_.samples()}
    expected = {sample_id for sample_id, text in of_prompt.items() if text.split()[2] in ("circle", "ring", "cross")}
    assert failed.keys() == expected
    assert any("no circles, please" in error for error in failed.values())
    assert any("the score is nan" in error for error in failed.values())
    assert any("died" in error for error in failed.values())
    assert not failed.keys() & set(round_.trained_ids())
    ledger = jobs.summary(tolerant.run)["ledger"]
    assert ledger["failed"] == len(failed)
    assert ledger["balances"]
