"""What `kto-ray submit` works out, without a cluster; tests/integration has one."""

import shlex
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from kto_ray.cli import main
from kto_ray.errors import UserError
from kto_ray.submitting import Submission

PROMPTS = "a red circle\na blue ring\n"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is no checkout, in which the command is called."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_of_a_built_in_recipe_nothing_is_uploaded(elsewhere: Path) -> None:
    submission = Submission.of("shapes_demo", ["run=mine", "rounds=3"])
    assert submission.id.startswith("mine-20")
    assert shlex.split(submission.command) == [
        *("python", "-m", "kto_ray", "run", "--recipe", "shapes_demo", "run=mine", "rounds=3"),
        f"runs_folder={elsewhere / 'runs'}",
    ]
    with submission.uploaded() as folder:
        assert list(folder.iterdir()) == []


def test_recipe_and_prompts_go_along(elsewhere: Path) -> None:
    (elsewhere / "own").mkdir()
    (elsewhere / "own/mine.yaml").write_text("prompts: {train: own/colors.txt}\n")
    (elsewhere / "own/colors.txt").write_text(PROMPTS)
    submission = Submission.of("own/mine.yaml", ["runs_folder=s3://bucket/runs"])
    words = shlex.split(submission.command)
    said = ["runs_folder=s3://bucket/runs", "prompts.train.source=train-colors.txt"]
    assert words[4:] == ["--recipe", "mine.yaml", *said]
    with submission.uploaded() as folder:
        assert {path.name for path in folder.iterdir()} == {"mine.yaml", "train-colors.txt"}
        assert (folder / "train-colors.txt").read_text() == PROMPTS
    assert not folder.exists()


def test_a_folder_with_plug_ins_goes_along(elsewhere: Path) -> None:
    for name in ("plug", "plug/.git"):
        (elsewhere / name).mkdir()
    (elsewhere / "plug/taste.py").write_text("")
    (elsewhere / "mine.yaml").write_text("{}")
    with Submission.of("mine.yaml", [], folder=elsewhere / "plug").uploaded() as folder:
        assert {path.name for path in folder.iterdir()} == {"mine.yaml", "taste.py"}
    with Submission.of("shapes_demo", [], folder=elsewhere / "plug").uploaded() as folder:
        assert folder == elsewhere / "plug"


def test_from_a_checkout_the_checkout_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    assert Submission.of("shapes_demo", []).folder == root


def test_variables_are_named_or_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.delenv("NOT_THERE", raising=False)
    given = Submission.of("shapes_demo", [], variables=["AWS_REGION", "MODE=a=b"]).variables
    assert given == {"AWS_REGION": "eu-central-1", "MODE": "a=b"}
    with pytest.raises(UserError, match="--env: NOT_THERE is not in this environment"):
        Submission.of("shapes_demo", [], variables=["NOT_THERE"])


def test_what_is_wrong_is_said_before_anything_is_sent() -> None:
    wrong = CliRunner().invoke(main, ["submit", "roundz=3"])
    assert wrong.exit_code == 2
    assert "did you mean 'rounds'?" in wrong.stderr
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    nobody = CliRunner().invoke(main, ["submit", "--address", address])
    assert nobody.exit_code == 2
    assert f"--address: {address} does not take jobs" in nobody.stderr
