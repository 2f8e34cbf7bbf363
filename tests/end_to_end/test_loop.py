"""Whole runs, as processes: any diffusers folder by name, every mode of training, and what a run leaves behind."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline

from kto_ray.bake_off.plain_loop import PlainLoop
from kto_ray.cli import main
from kto_ray.config import load
from kto_ray.policies import PolicyStore
from kto_ray.prompts import round_requests
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


OVERRIDES = ["evaluate.every=1", "generate.resources.threads=1"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_folder: Path) -> jobs.Job:
    """A run that ended well."""
    folder, overrides = tmp_path_factory.mktemp("loop"), [f"model={tiny_sd1_folder}", *OVERRIDES]
    job = jobs.start(folder, "run", overrides, program=[jobs.JOB])
    assert job.wait() == 0, job.output()
    return job


def test_a_run_leaves_report_summary_metrics_rounds_and_policies(
    job: jobs.Job, tmp_path: Path, tiny_sd1_folder: Path, one_ray: dict[str, str]
) -> None:
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

    again = jobs.start(job.run.parent, "run", [f"model={tiny_sd1_folder}", *OVERRIDES], one_ray)
    assert again.wait() == 0
    assert jobs.summary(job.run) == summary

    other = jobs.start(job.run.parent, "run", [f"model={tiny_sd1_folder}", "train.objective.beta=7"])
    assert other.wait() == 2
    assert "train.objective.beta: the run has 75.0, this command says 7.0" in other.output()


def test_the_loop_without_ray_makes_the_same_images(job: jobs.Job, tiny_sd1_folder: Path) -> None:
    """`bake_off/plain_loop.py`, in this process: a round of the base, one of the policy that learned from it, and what
    that learned."""
    config, run = load("shapes_demo", [*jobs.SMALL, f"model={tiny_sd1_folder}", *OVERRIDES]), Storage(str(job.run))
    plain = PlainLoop(config, threads=1)
    for index in range(2):
        stored = {sample.id: sample for sample in RoundStore(run).round(index).samples()}
        requests = round_requests(
            *(plain.train_prompts, config.seed, f"round-{index:05}", index),
            *(config.generate.images_per_round, config.generate.images_per_prompt),
        )
        latents_NCHW, pixels_NHWC = plain._draw(requests)
        assert stored.keys() == {request.id for request in requests}
        for request, latents_CHW, pixels_HWC in zip(requests, latents_NCHW, pixels_NHWC, strict=True):
            assert np.allclose(stored[request.id].latents_CHW, latents_CHW, atol=1e-4)
            assert np.abs(stored[request.id].pixels_HWC.astype(int) - pixels_HWC).max() <= 1
        assert plain.run_round(index).figures
        policies = PolicyStore(run)
        learned, base = plain.learner.sampling.tensors(), policies.load(policies.resolve(index))
        for name, tensor in policies.load(policies.resolve(index + 1)).items():
            assert np.allclose(tensor, learned[name].cpu(), atol=1e-6), name
            assert not base or not np.allclose(tensor, base[name], atol=1e-6), name


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
