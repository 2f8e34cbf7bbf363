"""Numbers that are not finite, damaged checkpoints, and the way back to an earlier policy, in whole runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import CLIPTokenizer

from kto_ray.policies import PolicyStore
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.end_to_end import jobs
from tests.factories import write_prompts

WORD = "red"
# With a cosine, a round that is trained again after `rounds` was raised has another learning rate.
CHECKED = ["train.keep_checkpoints=2", "train.decay=constant", "tracking.tensorboard=false"]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_folder: Path) -> Path:
    """A model whose numbers overflow, as those of half precision do, whenever a prompt has a certain word in it."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(tiny_sd1_folder, folder)
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = safetensors.torch.load_file(weights)
    (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
    (word,) = CLIPTokenizer.from_pretrained(folder / "tokenizer")(WORD, add_special_tokens=False).input_ids
    tensors[name][word] = torch.inf
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def own_lines(job: jobs.Job) -> str:
    """What the driver itself said; Ray's actors may stumble over another Ray on the machine."""
    return "\n".join(line for line in job.output().splitlines() if " pid=" not in line)


def strict_rows(run: Path) -> list[dict[str, Any]]:
    """Of `metrics.jsonl`, read by a reader that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_images_that_are_none_are_counted_and_the_run_goes_on_with_the_others(
    tmp_path: Path, overflowing: Path, one_ray: dict[str, str]
) -> None:
    texts = [
        f"{color} {shape}{on}" for color in ("red", "blue") for shape in ("circle", "square") for on in ("", " on")
    ]
    prompts = [
        f"prompts.train={write_prompts(tmp_path / 'train.jsonl', texts)}",
        f"prompts.held_out={write_prompts(tmp_path / 'held_out.jsonl', ['a red one', 'a blue one', 'white', 'black'])}",
    ]
    job = jobs.start(
        tmp_path, "run", [f"model={overflowing}", *prompts, "label.max_failed_fraction=0.8", *CHECKED], one_ray
    )
    assert job.wait() == 0, job.output()
    store = RoundStore(Storage(str(job.run)))
    failed = {sample.id for round_ in store.rounds() for sample in round_.samples() if sample.error}
    expected = {s.id for round_ in store.rounds() for s in round_.samples() if WORD in s.prompt.text.split()}
    assert failed == expected != set()
    ledger = jobs.summary(job.run)["ledger"]
    assert ledger["balances"], ledger
    assert ledger["failed"] == len(failed)
    assert not failed & {sample_id for round_ in store.rounds() for sample_id in round_.trained_ids()}
    assert sum(row["failed_draws"] for row in strict_rows(job.run) if "failed_draws" in row) == len(failed)
    for version in (1, 2):
        weights = PolicyStore(Storage(str(job.run))).load(PolicyStore(Storage(str(job.run))).resolve(version))
        assert weights is not None
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())

    strict = jobs.start(tmp_path, "strict", [f"model={overflowing}", *prompts, "label.max_failed_fraction=0"], one_ray)
    assert strict.wait() == 2
    assert "latents or pixels that are not finite, more than label.max_failed_fraction (0) allows" in strict.output()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_folder: Path, one_ray: dict[str, str]) -> jobs.Job:
    """A finished run of two rounds."""
    job = jobs.start(tmp_path_factory.mktemp("sound"), "run", [f"model={tiny_sd1_folder}", *CHECKED], one_ray)
    assert job.wait() == 0, job.output()
    return job


def older_run(sound: jobs.Job, folder: Path) -> tuple[Path, set[str]]:
    """A run as an older version may have left it: its first round has latents that are no numbers, with verdicts."""
    (folder / "rounds").mkdir(parents=True)
    shutil.copy(sound.run / "config.yaml", folder)
    origin, copy = RoundStore(Storage(str(sound.run))).round(0), RoundStore(Storage(str(folder))).round(0)
    samples = origin.samples()
    ruined = {sample.id for sample in samples[::6]}
    copy.add_samples(
        [replace(s, latents_CHW=np.full_like(s.latents_CHW, np.nan)) if s.id in ruined else s for s in samples]
    )
    copy.add_scores(origin.scores())
    copy.add_verdicts(origin.verdicts())
    copy.seal(round=0, labeler={})
    return folder, ruined


def test_a_step_that_would_ruin_the_policy_ends_the_run_at_once_and_it_goes_on_without_these_samples(
    tmp_path: Path, tiny_sd1_folder: Path, sound: jobs.Job, one_ray: dict[str, str]
) -> None:
    older, ruined = older_run(sound, tmp_path / "older")
    replaying = [f"model={tiny_sd1_folder}", f"replay.run={older}", "train.gamma=0.5", *CHECKED]
    job = jobs.start(tmp_path, "run", replaying, one_ray)
    assert job.wait() == 2, job.output()
    assert "round 0, step " in job.output()
    assert "the denoising error is not finite; the step was not taken, policy 0 is the last good one" in job.output()
    assert any(sample_id in job.output() for sample_id in ruined)
    assert "train.on_nonfinite=leave_out" in job.output()
    assert "Traceback" not in own_lines(job)
    assert not list(job.run.glob("checkpoints/checkpoint_*"))
    assert not (job.run / "policies/00001/policy.json").exists()

    again = jobs.start(tmp_path, "run", [*replaying, "train.on_nonfinite=leave_out"], one_ray)
    assert again.wait() == 0, again.output()
    assert "were left out" in again.output()
    training = json.loads((again.run / "rounds/00000/training.json").read_text())
    left_out = set(training["left_out"])
    assert left_out <= ruined
    assert left_out
    round_ = RoundStore(Storage(str(again.run))).round(0)
    assert not left_out & set(round_.trained_ids())
    assert jobs.summary(again.run)["ledger"]["balances"]
    (row,) = (row for row in strict_rows(again.run) if (row["kind"], row["step"]) == ("round", 0))
    assert row["objective/left_out"] == len(left_out)


def digests(run: Path) -> list[str]:
    store = PolicyStore(Storage(str(run)))
    return [store.resolve(version).digest for version in store.versions()]


def rewind(run: Path, to: int, *overrides: str) -> str:
    """What the command says."""
    done = subprocess.run(
        [sys.executable, "-c", "from kto_ray.cli import main; main()", "rewind", str(run), "--to", str(to), *overrides],
        capture_output=True,
        text=True,
        check=False,
        env=jobs.environment(),
        cwd=jobs.REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_older_checkpoint_serves_and_a_rewound_run_comes_to_the_same(
    tmp_path: Path, tiny_sd1_folder: Path, sound: jobs.Job, one_ray: dict[str, str]
) -> None:
    shutil.copytree(sound.run, tmp_path / "run")
    before = digests(tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").glob("checkpoint_*/state.pt"))
    newest.write_bytes(newest.read_bytes()[:20_000])
    further = [f"model={tiny_sd1_folder}", "rounds=3", *CHECKED]
    job = jobs.start(tmp_path, "run", further, one_ray)
    assert job.wait() == 0, job.output()
    assert newest.parent.name in job.output()
    assert "the run goes on from policy 1, and trains round 1 again" in job.output()
    assert "Traceback" not in own_lines(job)
    after = digests(job.run)
    assert after[:3] == before  # trained again, to the same bytes
    assert jobs.summary(job.run)["ledger"]["balances"]

    assert "trained again: 2" in rewind(job.run, 2)
    assert digests(job.run) == before
    again = jobs.start(tmp_path, "run", further, one_ray)
    assert again.wait() == 0, again.output()
    assert digests(again.run) == after
    assert jobs.summary(again.run)["ledger"]["balances"]
    assert [row["step"] for row in strict_rows(again.run) if row["kind"] == "round"] == [0, 1, 2]

    # Further back than checkpoints reach, and with another setting from there on.
    assert "the optimizer's state after policy 1 is not kept" in rewind(job.run, 1, "train.learning_rate=1e-5")
    slower = jobs.start(tmp_path, "run", [*further[:1], *CHECKED, "train.learning_rate=1e-5"], one_ray)
    assert slower.wait() == 0, slower.output()
    assert digests(slower.run)[:2] == after[:2]
    assert len(digests(slower.run)) == 3
    assert digests(slower.run)[2] != after[2]
    assert jobs.summary(slower.run)["ledger"]["balances"]
