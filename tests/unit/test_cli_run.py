"""`kto-ray run` and the job file that is the same: what they print, and the codes they end with."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kto_ray import loop
from kto_ray.cli import main
from kto_ray.cli_run import in_a_sentence
from kto_ray.config import from_tree, yaml12

ROOT = Path(__file__).parents[2]


def test_a_dry_run_prints_a_configuration_that_can_be_read_again() -> None:
    said = CliRunner().invoke(main, ["run", "--dry-run", "rounds=3", "--gpu", "24"])
    assert said.exit_code == 0, said.output
    config = from_tree(yaml12.load(said.stdout.partition("\n\n")[0]))
    assert (config.rounds, config.cluster.gpu_gb) == (3, 24)
    assert "a train worker holds: " in said.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["roundz=3"], "error: unknown field 'roundz', did you mean 'rounds'?"),
        (["--recipe", "shapes_dem"], "error: unknown recipe 'shapes_dem', did you mean 'shapes_demo'?"),
    ],
)
def test_an_error_of_the_users_is_a_sentence_and_ends_with_2(words: list[str], sentence: str) -> None:
    said = CliRunner().invoke(main, ["run", *words])
    assert said.exit_code == 2
    assert said.stdout.startswith(sentence)
    assert said.stderr == ""


def test_an_interrupted_run_says_that_it_can_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run_online_kto", interrupted)
    said = CliRunner().invoke(main, ["run", f"runs_folder={tmp_path}"])
    assert said.exit_code == 130
    assert said.stdout.endswith("interrupted; the same command goes on from here\n")


def test_the_job_file_is_the_command(tmp_path: Path) -> None:
    """Called elsewhere than in the checkout, with a plug-in that lies where it is called."""
    (tmp_path / "mine.py").write_text("class Mine:\n    def score(self, images, prompts):\n        return [0.5]\n")
    words = ["--dry-run", "label.scorers=mine:Mine", "run=here"]
    command = [sys.executable, str(ROOT / "jobs/online_kto.py"), *words]
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    module = [sys.executable, "-m", "kto_ray", "run", *words]
    assert subprocess.check_output(module, cwd=tmp_path, text=True) == job.stdout


def test_a_summary_is_said_with_what_is_known() -> None:
    known = {"images": 48, "seconds": {"total": 61.2}, "people": None}
    rates = {"base": {"pass_rate": 0.5}, "final": {"pass_rate": 0.75, "win_rate": 0.6}}
    assert in_a_sentence(known | rates) == (
        "held-out images that pass: 50.0% -> 75.0%; win rate vs base 60.0%; 48 images drawn in 61 s"
    )
    asked = {"people": {"answers": 7}, "base": {}, "final": {}}
    assert in_a_sentence(known | asked) == "7 answers of people; 48 images drawn in 61 s"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_and_is_documented(name: str) -> None:
    assert f"kto-ray {name}" in (ROOT / "docs/cli.md").read_text()
    said = CliRunner().invoke(main, [name, "--help"])
    assert said.exit_code == 0
    assert main.commands[name].help


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str) -> None:
    said = CliRunner().invoke(main, ["completion", shell])
    assert said.exit_code == 0
    assert f"_KTO_RAY_COMPLETE={shell}_complete" in said.stdout
