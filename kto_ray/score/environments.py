"""Python environments of scorers whose packages cannot live beside the loop's: what is in them, how they are built.

`pool.py` starts a scorer's actors with the `interpreter` of its environment; `kto-ray env` (`cli.py`) builds, checks
and lists them. Each is a *layer*, a virtual environment with a few packages of its own, over one *base* (Ray, torch,
torchvision: 6 GB) that a .pth file puts behind them on sys.path. A layer holds exactly the packages named here: the
requirements that they state exclude one another, or ask for what is never imported. Where a package is broken as it was
published, a repair mends the installed files, in the open. docs/environments.md has all reasons.

This module is imported in the environments, too (`try_scorer`): it imports only what is there.
"""

import contextlib
import difflib
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import kto_ray
from kto_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

MARKER = "kto-ray-environment.json"  # written last: an environment without it is not finished
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # one cluster, one minor version


# -- repairs ----------------------------------------------------------------------------------------------------------


class Repair(Protocol):
    """A change to installed files. Raises UserError where it does not find what it repairs."""

    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...

    def apply(self, packages: Path) -> None:
        """Change the files under `packages`, which is a site-packages folder."""


@dataclass(frozen=True)
class Rewrite:
    """Puts another line in the place of a line that a file has exactly once; None leaves it out."""

    name: str
    reason: str
    file: str
    line: str
    becomes: str | None = None

    def apply(self, packages: Path) -> None:
        path = packages / self.file
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        if lines.count(self.line) != 1:
            raise _no_longer_fits(self, f"the line {self.line!r} once in {path}")
        place = lines.index(self.line)
        lines[place : place + 1] = [] if self.becomes is None else [self.becomes]
        path.write_text("\n".join(lines) + "\n", "utf-8")


@dataclass(frozen=True)
class Supply:
    """Puts a file that a package lacks in its place, from another package."""

    name: str
    reason: str
    file: str
    source: str
    sha256: str

    def apply(self, packages: Path) -> None:
        path, source = packages / self.file, packages / self.source
        if path.exists() or not path.parent.is_dir():
            raise _no_longer_fits(self, f"a folder {path.parent} without {path.name}")
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != self.sha256:
            raise _no_longer_fits(self, f"{source} with SHA-256 {self.sha256}")
        shutil.copyfile(source, path)


def _no_longer_fits(repair: Repair, wanted: str) -> UserError:
    return UserError(f"repair {repair.name!r} does not find {wanted}: this is not the package that it was written for")


# -- what is in them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """What an environment is built from: pinned packages, installed as named and without others, and repairs."""

    name: str
    packages: tuple[str, ...]
    repairs: tuple[Repair, ...] = ()

    @property
    def folder(self) -> Path:
        return root() / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{PYTHON}" / "site-packages"


BASE = Environment(
    "base", ("numpy==2.4.6", "pillow==13.0.0", "pyarrow==26.0.1", "torch==2.14.1", "torchvision==0.29.1")
)
"""Shared by all layers; with the Ray that runs here, and with what these packages require."""

ENVIRONMENTS: dict[str, Environment] = {
    environment.name: environment
    for environment in (
        Environment(
            "image_reward",
            (
                "image-reward==1.5",
                "timm==0.6.13",  # as the package asks
                "fairscale==0.4.13",  # as the package asks
                "transformers==4.55.4",  # the last whose modeling_utils has apply_chunking_to_forward
                *("tokenizers==0.21.4", "huggingface-hub==0.36.2"),  # as transformers asks
                *("safetensors==0.8.0", "regex==2026.11.15", "tqdm==4.70.1"),
                "clip-anytorch==2.6.0",  # the module `clip`; PyPI's package of that name is another one
                *("ftfy==6.3.1", "wcwidth==0.9.4"),
            ),
            (
                Rewrite(
                    "no-training",
                    "importing the package imports its trainer, which needs diffusers, datasets and accelerate",
                    "ImageReward/__init__.py",
                    "from .ReFL import *",
                ),
                Rewrite(
                    "no-pkg-resources",
                    "clip takes packaging from pkg_resources, which setuptools has no more since version 82",
                    "clip/clip.py",
                    "from pkg_resources import packaging",
                    "import packaging.version",
                ),
            ),
        ),
        Environment(
            "hpsv2",
            (
                "hpsv2==1.2.0",
                "open_clip_torch==3.3.0",  # for the file that the repair takes out of it
                *("clint==0.5.1", "args==0.1.0", "huggingface-hub==0.36.2", "tqdm==4.70.1"),
                *("ftfy==6.3.1", "wcwidth==0.9.4", "regex==2026.11.15"),
            ),
            (
                Rewrite(
                    "no-turtle",
                    "an import that nobody uses needs Tk, which a server's Python often lacks",
                    "hpsv2/src/open_clip/factory.py",
                    "from turtle import forward",
                ),
                Supply(
                    "vocabulary",
                    "the wheel lacks the tokenizer's vocabulary; open_clip, of which it is a fork, has the same file",
                    "hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz",
                    "open_clip/bpe_simple_vocab_16e6.txt.gz",
                    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
                ),
            ),
        ),
    )
}


def requirements(environment: Environment) -> list[str]:
    """What pip is asked for. The base has the Ray that runs here: one cluster, one Ray."""
    return [*environment.packages, *([f"ray=={metadata.version('ray')}"] if environment is BASE else [])]


def specification(environment: Environment) -> dict[str, Any]:
    """What an environment would be built from here and now. One built from anything else is not used."""
    layers = [BASE] if environment is BASE else [BASE, environment]
    return {
        "Python": PYTHON,
        "Ray": metadata.version("ray"),
        "packages": [package for layer in layers for package in layer.packages],
        "repairs": [repr(repair) for repair in environment.repairs],
    }


# -- where they are ---------------------------------------------------------------------------------------------------


def root() -> Path:
    """The folder of all environments: $KTO_RAY_ENVS, or ~/.cache/kto-ray/envs. The same path on every node."""
    return Path(os.environ.get("KTO_RAY_ENVS") or "~/.cache/kto-ray/envs").expanduser().absolute()


def interpreter(name: str) -> Path:
    """The Python of a built environment; an absolute path is taken as the Python of one's own environment.

    Raises:
        UserError: there is no such environment, or it is not built, or not for this Ray, this Python and these pins.
    """
    if Path(name).is_absolute():
        if not Path(name).is_file() or not os.access(name, os.X_OK):
            raise UserError(
                f"environment {name} is no program; give the path of a Python that is the same on all nodes"
            )
        return Path(name)
    environment = named(name)
    if flaw := find_flaw(environment):
        raise UserError(
            f"environment {name!r} {flaw}; build it with: kto-ray env build {name} "
            f"(environments are kept in {root()}; KTO_RAY_ENVS names another folder)"
        )
    return environment.python


def named(name: str) -> Environment:
    """Raises UserError for a name that is not in `ENVIRONMENTS`; suggests the nearest."""
    if name not in ENVIRONMENTS:
        close = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"unknown environment {name!r}{suggestion}; there are: {', '.join(sorted(ENVIRONMENTS))}; "
            "or give the absolute path of a Python of your own"
        )
    return ENVIRONMENTS[name]


def find_flaw(environment: Environment) -> str | None:
    """Why an environment cannot be used, to be read after its name; None: it can."""
    built = _read_marker(environment)
    if built is None:
        return "is built only in part" if environment.folder.exists() else "is not built"
    for field, wanted in specification(environment).items():
        had = built.get(field, "unknown")
        if had != wanted:
            if isinstance(wanted, str):
                return f"was built for {field} {had}, this is {field} {wanted}"
            changed = [item for item in wanted if item not in had]
            return f"was built with other {field} than {', '.join(changed)}" if changed else f"has too many {field}"
    if not environment.python.is_file():
        return f"has no {environment.python} any more"
    if environment is BASE:
        return None
    if flaw := find_flaw(BASE):
        return f"rests on a base that {flaw}"
    linked, here = environment.site_packages / "kto_ray" / "__init__.py", Path(kto_ray.__file__)
    if not linked.is_file() or linked.read_bytes() != here.read_bytes():
        return f"is linked to another version of kto_ray than {kto_ray.__version__}"
    return None


def _read_marker(environment: Environment) -> dict[str, Any] | None:
    marker = environment.folder / MARKER
    if not marker.is_file():
        return None
    try:
        content = json.loads(marker.read_text())
    except ValueError:
        return {}  # damaged: it says nothing of what the environment was built for
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class State:
    """An environment as `kto-ray env list` shows it; `flaw` is None when it can be used."""

    environment: Environment
    flaw: str | None
    size: int
    """Bytes on disk; 0 when it is not built."""


def states() -> list[State]:
    """The base and all environments, as they are now."""
    return [
        State(environment, find_flaw(environment), (_read_marker(environment) or {}).get("size", 0))
        for environment in (BASE, *ENVIRONMENTS.values())
    ]


# -- building ---------------------------------------------------------------------------------------------------------


def build(name: str, console: "Console") -> Path:
    """Build an environment, and the base below it, unless they are there. Returns its Python.

    What an interrupted build left is thrown away, and so is what was built for something else.

    Raises:
        UserError: unknown name, a folder that cannot be written, pip fails, or a repair finds nothing to repair.
    """
    environment = named(name)
    with _alone(console):
        for layer in (BASE, environment):
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
    is_base, packages = environment is BASE, requirements(environment)

    def say(step: str) -> None:
        console.print(f"{environment.name}: {step}", style="bold", markup=False, highlight=False)

    if environment.folder.exists():
        say("removing what is there")
        (environment.folder / MARKER).unlink(missing_ok=True)  # first: half removed is not built
        shutil.rmtree(environment.folder)
    say(f"a virtual environment of Python {PYTHON}")
    _run(sys.executable, "-m", "venv", *([] if is_base else ["--without-pip"]), str(environment.folder))
    say(f"packages {', '.join(packages)}")
    pip = (BASE.python, "-m", "pip", "--disable-pip-version-check", "--python", environment.python)
    # Byte code of what is used is written when it is first imported; of 6 GB it would take a minute.
    _run(*pip, "install", "--no-compile", *([] if is_base else ["--no-deps"]), *packages)
    for repair in environment.repairs:
        say(f"repair {repair.name}: {repair.reason}")
        repair.apply(environment.site_packages)
    if not is_base:
        (environment.site_packages / "kto_ray_base.pth").write_text(f"{BASE.site_packages}\n")
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


# -- checking ---------------------------------------------------------------------------------------------------------


def check(name: str) -> dict[str, Any]:
    """Build the scorer in its environment, on a random checkpoint in the true format, and score one picture.

    It is the environment that is checked: nothing is downloaded, and no true weights are read.

    Returns:
        What `try_scorer` printed.

    Raises:
        UserError: see `interpreter`; or the scorer does not work, with its last words.
    """
    program = f"from kto_ray.score.environments import try_scorer; try_scorer({name!r})"
    done = subprocess.run(
        [interpreter(named(name).name), "-I", "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"environment {name!r} is built, but its scorer does not work in it: {words[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def require(module: str, environment: str) -> Any:
    """Import a module that only an environment has. Raises UserError elsewhere, which says where to run the scorer."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and broken
        raise UserError(
            f"there is no {error.name} in {sys.executable}: this scorer runs in an environment of its own; "
            f"set env: {environment} in its settings, and build it with: kto-ray env build {environment}"
        ) from error


def try_scorer(name: str) -> None:
    """Runs inside the environment: print score, seconds and versions as JSON. Raises whatever goes wrong."""
    import numpy as np

    from kto_ray.images import to_png
    from kto_ray.score.actor import ScorerActor
    from kto_ray.score.scorers import SCORERS

    began = time.monotonic()
    module = importlib.import_module(SCORERS[name].partition(":")[0])
    picture_BHWC = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        actor = ScorerActor(name, module.random_checkpoint(Path(folder)))
        [(score, error)] = actor.score_png(to_png(picture_BHWC), [("check", "a red circle on black", {})])
    if error is not None:
        raise RuntimeError(error)
    versions = {package: metadata.version(package) for package in ("ray", "torch", "torchvision", "numpy")}
    print(json.dumps({"score": score, "seconds": time.monotonic() - began, "versions": versions}))
