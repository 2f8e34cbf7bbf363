"""What `pip install` brings: everything that a run needs is in the wheel, outside of any checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kto_ray"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy: setuptools leaves folders where it builds, and takes what it finds in them."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, source / "kto_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built), str(source)]
    subprocess.run([*PIP, *build], check=True)
    (file,) = built.glob("*.whl")
    return file


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    tracked = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == tracked


def test_a_run_can_be_begun_from_it_anywhere(wheel: Path, tmp_path: Path) -> None:
    """The embedded world's model, prompts and recipe are found."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([*PIP, *install], check=True)
    env = os.environ | {"PYTHONPATH": str(site)}

    def ran(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ran("-c", "import kto_ray; print(kto_ray.__file__)").startswith(str(site))
    dry = ran("-m", "kto_ray", "run", "--recipe", "shapes_demo", "--dry-run")
    assert "prompts: 144 for training, 48 held out" in dry
    assert "a train worker holds: " in dry
    assert (site / "bin/kto-ray").is_file()
    assert list(elsewhere.iterdir()) == []
