"""The tutorial is done as it says: its files are saved, its commands are given in a shell, one after the other."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.jobs import REPOSITORY

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
NAMED = r"[Ss]ave(?: it)? as `(?P<name>[\w.]+)`[^`]*(?:\([^)]*\))?[^`]*"
STEP = re.compile(rf"(?:{NAMED})?```(?:sh|python|yaml)\n(?P<text>.*?)```", re.DOTALL)


def steps() -> list[tuple[str, str]]:
    """Files with their names, and commands with "", up to where a GPU is needed; without setting up."""
    text = TUTORIAL.read_text().partition("## On one GPU")[0].partition("## 2.")[2]
    found = [(step["name"] or "", step["text"]) for step in STEP.finditer(text)]
    assert [name for name, _ in found if name] == ["taste.py", "dark.yaml"]
    assert len(found) == 7
    return found


def test_the_tutorial(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "jobs", tmp_path / "jobs")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    said = ""
    for name, text in steps():
        if name:
            (tmp_path / name).write_text(text)
            continue
        outcome = subprocess.run(
            ["bash", "-euc", text.replace("PYTHONPATH=.", f"PYTHONPATH=.:{REPOSITORY}")],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        said += outcome.stdout
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "all 1" in said  # checks passed
    run = tmp_path / "runs" / "dark"
    assert (run / "report.html").is_file()
    assert (tmp_path / "dark-policy" / "README.md").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] == 3 * 48, summary["images"]
