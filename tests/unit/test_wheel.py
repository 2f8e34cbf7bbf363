"""What `pip install` brings: everything that a run needs is in the wheel, outside of any checkout."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.wheel import PACKAGE, ROOT, build, install


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built"))


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    tracked = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == tracked


def test_a_run_can_be_begun_from_it_anywhere(wheel: Path, tmp_path: Path) -> None:
    """The embedded world's model, prompts and recipe are found."""
    programs, elsewhere = install(wheel, tmp_path / "environment"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def ran(program: str, *arguments: str) -> str:
        command = [programs / program, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ran("python", "-c", "import kto_ray; print(kto_ray.__file__)").startswith(str(programs.parent))
    dry = ran("kto-ray", "run", "--recipe", "shapes_demo", "--dry-run")
    assert "prompts: 144 for training, 48 held out" in dry
    assert "a train worker holds: " in dry
    assert list(elsewhere.iterdir()) == []
