"""Whether this machine can do what a run asks of it: each part looked at, what is wrong, and the command that mends it.

`cli_doctor.py` shows it. Nothing is started, and nothing is left behind. What a run asks of its own configuration is
preflight's, behind `kto-ray run --dry-run`.
"""

import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kto_ray.errors import UserError
from kto_ray.storage import Storage

State = Literal["fine", "note", "wrong"]
"""A note is something that only some runs need."""

PYTHONS = ">=3.11,<3.13"
LEAST_DISK = 5e9
"""Bytes free where Ray keeps its logs and what memory has no room for."""
LEAST_SHM = 2e9
"""Bytes of shared memory, below which Ray puts its object store on the disk."""
LISTENERS = {"the page on which people label (label.human.port)": 8000, "Ray's dashboard": 8265}


@dataclass(frozen=True)
class Diagnosis:
    """One thing that was looked at.

    Args:
        part: of the machine.
        found: in words.
        remedy: the command, or what is to be done; "" where there is nothing to mend.
    """

    part: str
    state: State
    found: str
    remedy: str = ""


def examine(runs_folder: str | None = None) -> Iterator[Diagnosis]:
    """Look at everything, one part after the other.

    Args:
        runs_folder: where runs are to be kept, a local path or a URI: a small file is written there, read and deleted.
    """
    parts: list[Callable[[], Iterator[Diagnosis]]] = [_python, _packages, _torch, _ray, _disks, _environments, _ports]
    for part in parts:
        yield from part()
    if runs_folder is not None:
        yield storage(runs_folder)


def _python() -> Iterator[Diagnosis]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = SpecifierSet(PYTHONS).contains(version)
    remedy = "" if fits else "make an environment with Python 3.11: python3.11 -m venv .venv"
    yield Diagnosis("python", "fine" if fits else "wrong", f"{version}, {sys.executable}", remedy)


def _packages() -> Iterator[Diagnosis]:
    try:
        wanted = importlib.metadata.requires("kto-ray") or []
    except importlib.metadata.PackageNotFoundError:
        yield Diagnosis("packages", "note", "kto-ray is not installed here, so it is unknown what it needs")
        return
    requirements = [Requirement(line) for line in wanted]
    needed = [requirement for requirement in requirements if not requirement.marker or requirement.marker.evaluate()]
    flaws = list(filter(None, map(unmet, needed)))
    if flaws:
        yield Diagnosis("packages", "wrong", "; ".join(flaws), "pip install --upgrade kto-ray")
    else:
        yield Diagnosis("packages", "fine", f"all {len(needed)} that are needed, within their bounds")


def unmet(requirement: Requirement) -> str | None:
    """What an installed package lacks of a requirement; None: nothing."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, not {requirement.specifier}"


def _torch() -> Iterator[Diagnosis]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of its is missing
        yield Diagnosis("torch", "wrong", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    yield Diagnosis("torch", "fine", torch.__version__)
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        for index, card in enumerate(cards):
            yield Diagnosis(f"gpu {index}", "fine", f"{card.name}, {card.total_memory / 1e9:.0f} GB")
    elif not has_driver:
        yield Diagnosis("gpu", "note", "none: the embedded world needs none, every other model does")
    elif torch.version.cuda is None:
        yield Diagnosis(
            "gpu", "wrong", f"there is a driver, and torch {torch.__version__} is built without CUDA",
            "pip uninstall torch, then pip install torch from the index that pytorch.org names for this driver",
        )  # fmt: skip
    else:
        yield Diagnosis(
            "gpu", "wrong", f"there is a driver, and torch for CUDA {torch.version.cuda} cannot use it",
            "nvidia-smi says the newest CUDA that the driver knows; update it, or install a torch for an older CUDA",
        )  # fmt: skip


def _ray() -> Iterator[Diagnosis]:
    import ray

    yield Diagnosis("ray", "fine", ray.__version__)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    has_token = "RAY_AUTH_TOKEN" in os.environ or token.is_file()
    if os.environ.get("RAY_AUTH_MODE") == "token" and not has_token:
        yield Diagnosis("ray token", "wrong", f"RAY_AUTH_MODE is token, and there is no {token}",
                        "ray get-auth-token --generate, or copy the file of the cluster's head")  # fmt: skip
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield _reached("ray cluster", address, "RAY_ADDRESS", 6379)
    else:
        yield Diagnosis("ray cluster", "fine", "RAY_ADDRESS is not set: a run starts a cluster on this machine")


def _reached(part: str, address: str, variable: str, default_port: int) -> Diagnosis:
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not host:
        host, port = port, str(default_port)
    if host == "auto":
        return Diagnosis(part, "note", f"{variable} is {address!r}: the one that runs on this machine, if there is one")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return Diagnosis(part, "fine", f"{address} answers")
    except (OSError, ValueError) as error:
        return Diagnosis(
            part, "wrong", f"{variable} is {address!r}, which cannot be reached: {error}",
            f"unset {variable}, or start the cluster: ray start --head",
        )  # fmt: skip


def _disks() -> Iterator[Diagnosis]:
    temporary = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    yield roomy("temporary disk", temporary, LEAST_DISK, "make room, or set RAY_TMPDIR to a folder that has some")
    memory = Path("/dev/shm")
    if memory.is_dir():
        yield roomy("shared memory", memory, LEAST_SHM, "in a container: docker run --shm-size=8g ...")


def roomy(part: str, folder: Path, least: float, remedy: str) -> Diagnosis:
    """Whether a folder has so many bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Diagnosis(part, "wrong", f"{folder}: {error.strerror}", remedy)
    found = f"{folder} has {free / 1e9:.1f} GB free"
    if free >= least:
        return Diagnosis(part, "fine", found)
    return Diagnosis(part, "wrong", f"{found}, less than {least / 1e9:.0f} GB", remedy)


def _environments() -> Iterator[Diagnosis]:
    from kto_ray.score.environments import contents, finding

    for state in finding.states():
        name = state.environment.name
        if state.environment is contents.BASE:
            continue
        part = f"environment {name}"
        if state.flaw is None:
            yield Diagnosis(part, "fine", str(state.environment.folder))
        elif not state.environment.folder.exists():
            yield Diagnosis(part, "note", f"is not built; the scorer {name} needs it", f"kto-ray env build {name}")
        else:
            yield Diagnosis(part, "wrong", state.flaw, f"kto-ray env build {name}")


def _ports() -> Iterator[Diagnosis]:
    for what, port in LISTENERS.items():
        yield listening(what, port)


def listening(what: str, port: int) -> Diagnosis:
    """Whether a port of loopback is free. One that is not is no flaw: it may be a run's own."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return Diagnosis(f"port {port}", "note", f"{what} would use it: {error.strerror}",
                             f"see what has it: ss -ltnp 'sport = :{port}'")  # fmt: skip
    return Diagnosis(f"port {port}", "fine", f"free for {what}")


def storage(runs_folder: str) -> Diagnosis:
    """Whether a file can be written, read and deleted where runs are to be kept."""
    run, name, data = Storage(runs_folder), f"kto-ray-doctor-{uuid.uuid4().hex}", b"written by kto-ray doctor"
    try:
        run.require_room(0)
        run.write(name, data)
        read = run.read(name)
        run.delete(name)
    except UserError as error:
        return Diagnosis("storage", "wrong", str(error), "see docs/recovery.md; credentials are read where boto looks")
    if read != data:
        return Diagnosis("storage", "wrong", f"{run} gives back other bytes than were written", "use another folder")
    return Diagnosis("storage", "fine", f"{run} can be written and read")


def as_rows(diagnoses: list[Diagnosis]) -> list[dict[str, Any]]:
    """For programs."""
    return [vars(diagnosis) for diagnosis in diagnoses]
