"""Building environments with pip, one builder at a time; an interrupted one leaves nothing that is taken for whole."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import kto_ray
from kto_ray.errors import UserError
from kto_ray.score.environments import contents
from kto_ray.score.environments.contents import PYTHON, Environment, requirements, root, specification
from kto_ray.score.environments.finding import MARKER, find_flaw, interpreter, named

if TYPE_CHECKING:
    from rich.console import Console


def build(name: str, console: "Console") -> Path:
    """Build an environment, and the base below it, unless they are there. Returns its Python.

    What an interrupted build left is thrown away, and so is what was built for something else.

    Raises:
        UserError: unknown name, a folder that cannot be written, pip fails, or a repair finds nothing to repair.
    """
    environment = named(name)
    with _alone(console):
        for layer in (contents.BASE, environment):
            if flaw := find_flaw(layer):
                console.print(f"{layer.name} {flaw}: building it in {layer.folder}", markup=False, highlight=False)
                _build(layer, console)
            else:
                console.print(f"{layer.name} is built", markup=False, highlight=False)
    return interpreter(name)


@contextlib.contextmanager
def _alone(console: "Console") -> Iterator[None]:
    """Hold the lock of the root; waits for another builder, and says so."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        lock = os.open(root() / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"environments cannot be kept in {root()}: {error}; set KTO_RAY_ENVS to a folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for another `kto-ray env build` to end in {root()}", markup=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _build(environment: Environment, console: "Console") -> None:
    began = time.monotonic()
    is_base, packages = environment is contents.BASE, requirements(environment)

    def say(step: str) -> None:
        console.print(f"{environment.name}: {step}", style="bold", markup=False, highlight=False)

    if environment.folder.exists():
        say("removing what is there")
        (environment.folder / MARKER).unlink(missing_ok=True)  # first: half removed is not built
        shutil.rmtree(environment.folder)
    say(f"a virtual environment of Python {PYTHON}")
    _run(sys.executable, "-m", "venv", *([] if is_base else ["--without-pip"]), str(environment.folder))
    say(f"packages {', '.join(packages)}")
    pip = (contents.BASE.python, "-m", "pip", "--disable-pip-version-check", "--python", environment.python)
    # Byte code of what is used is written when it is first imported; of 6 GB it would take a minute.
    _run(*pip, "install", "--no-compile", *([] if is_base else ["--no-deps"]), *packages)
    for repair in environment.repairs:
        say(f"repair {repair.name}: {repair.reason}")
        repair.apply(environment.site_packages)
    if not is_base:
        (environment.site_packages / "kto_ray_base.pth").write_text(f"{contents.BASE.site_packages}\n")
        (environment.site_packages / "kto_ray").symlink_to(Path(kto_ray.__file__).resolve().parent)
    files = (path.lstat() for path in environment.folder.rglob("*"))
    content = {**specification(environment), "size": sum(file.st_size for file in files)}
    unfinished = environment.folder / f"{MARKER}.unfinished"
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.rename(environment.folder / MARKER)
    say(f"built in {time.monotonic() - began:.0f} s, {content['size'] / 1e6:,.0f} MB")


def _run(*command: str | Path) -> None:
    """Run a step of a build; its output is the user's to see."""
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    status = subprocess.run(command, env=surroundings, check=False).returncode
    if status:
        raise UserError(f"the build failed with status {status} of: {' '.join(map(str, command))}")
