"""The project's wheel, and an environment in which nothing but it was installed."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kto_ray"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def build(folder: Path) -> Path:
    """Build it of a copy: setuptools leaves folders where it builds, and takes what it finds in them."""
    source, built = folder / "source", folder / "wheel"
    shutil.copytree(PACKAGE, source / "kto_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built)]
    subprocess.run([*PIP, "wheel", *options, str(source)], check=True)
    (file,) = built.glob("*.whl")
    return file


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment of it; returns the folder of its programs.

    What the wheel needs is borrowed from the tests' own environment, which pip made of the same list. The checkout is
    not: a path that a path file adds is not searched for further path files, and so not for editable installations.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    options = ["--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*PIP, "--python", str(python), "install", *options, str(wheel)], check=True)
    return folder / "bin"
