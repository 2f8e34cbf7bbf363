"""The tutorial is done as it says, from the wheel: its files are saved, its commands are given, one after the other."""

import json
import os
import re
import subprocess
from pathlib import Path

from tests import wheel

TUTORIAL = wheel.ROOT / "docs" / "tutorial.md"
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
    programs, mine = wheel.install(wheel.build(tmp_path), tmp_path / "environment"), tmp_path / "mine"
    mine.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PATH": f"{programs}{os.pathsep}{env['PATH']}"}
    said = ""
    for name, text in steps():
        if name:
            (mine / name).write_text(text)
            continue
        outcome = subprocess.run(["bash", "-euc", text], cwd=mine, env=env, capture_output=True, text=True, check=False)
        said += outcome.stdout
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "all 1" in said  # checks passed
    run = mine / "runs" / "dark"
    assert (run / "report.html").is_file()
    assert (mine / "dark-policy" / "README.md").is_file()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] == 3 * 48, summary["images"]
