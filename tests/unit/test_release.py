"""A release writes its version in both places, or says in words why not, before anything is written."""

import importlib.util
from pathlib import Path

import pytest
import yaml

import kto_ray

ROOT = Path(kto_ray.__file__).parents[1]


def prepare(root: Path, version: str) -> None:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare(root, version)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What of the repository a release writes to."""
    (tmp_path / "kto_ray").mkdir()
    for name in ("kto_ray/__init__.py", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_version_and_changelog_are_written(tree: Path) -> None:
    prepare(tree, "99.0.1")
    assert '\n__version__ = "99.0.1"\n' in (tree / "kto_ray/__init__.py").read_text()
    before, after = (ROOT / "CHANGELOG.md").read_text(), (tree / "CHANGELOG.md").read_text()
    assert after == before.replace("## Unreleased\n", "## Unreleased\n\n## 99.0.1\n")
    with pytest.raises(SystemExit, match='says nothing under "## Unreleased"'):
        prepare(tree, "99.0.2")


@pytest.mark.parametrize(
    ("version", "words"),
    [("", "is no version"), ("1.2", "is no version"), ("v1.2.3", "is no version"), ("0.0.9", "must be larger than")],
)
def test_a_version_that_cannot_be_is_refused(tree: Path, version: str, words: str) -> None:
    before = (tree / "kto_ray/__init__.py").read_text()
    with pytest.raises(SystemExit, match=words):
        prepare(tree, version)
    assert (tree / "kto_ray/__init__.py").read_text() == before


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    assert "make docs" in commands


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_an_issue_template_is_whole(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert [part for part in form["body"] if part["type"] != "markdown" and not part["attributes"].get("label")] == []
