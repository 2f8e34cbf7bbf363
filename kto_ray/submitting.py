"""How a run is handed to a cluster as a Ray job: what is uploaded, what is called there, and under which id.

    Submission.of(recipe, overrides, ...)  ->  send(submission, client)  ->  outcome(client, id)

`cli_submit.py` asks for it. What the cluster calls is `python -m kto_ray run`, so kto-ray must be installed there; from
a checkout, the checkout is uploaded and called instead.
"""

import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import kto_ray
from kto_ray.config import load
from kto_ray.errors import UserError
from kto_ray.secrets import hide

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
LEFT_OUT = ["/.git/", "/.venv/", "/.envs/", "/runs/", "/build/", "/dist/", "**/__pycache__/"]
"""Of a folder that is uploaded, as .gitignore has it."""


@dataclass(frozen=True)
class Submission:
    """A job that can be sent.

    Args:
        id: no job of the cluster has it yet.
        command: that the cluster calls.
        folder: whose content is uploaded; None: only `files`.
        files: where these are looked for there, relative, and what they are here.
        variables: of the job's environment. Whoever sees the cluster's dashboard can read them.
    """

    id: str
    command: str
    folder: Path | None
    files: Mapping[str, Path] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        recipe: str,
        overrides: Sequence[str],
        id_: str | None = None,
        folder: Path | None = None,
        variables: Sequence[str] = (),
        dry_run: bool = False,
    ) -> "Submission":
        """Work out everything; the configuration is read, so that what is wrong with it is said here.

        Args:
            folder: to upload; None: the checkout, where this is called in one, and else recipe and prompts alone.
            variables: NAME=VALUE, or NAME of one that this process has.
            dry_run: see `kto-ray run`; where the cluster's machines and files are, rather than here.

        Raises:
            UserError: see `config.load`; or a variable that is not there.
        """
        config = load(recipe, overrides)
        folder = folder or _checkout()
        files, words = {}, list(overrides)
        if (path := Path(recipe)).is_file():
            recipe, files[path.name] = path.name, path
        for name, prompts in (("train", config.prompts.train), ("held_out", config.prompts.held_out)):
            if (path := Path(prompts.source)).is_file():
                there = f"{name}-{path.name}"
                files[there] = path
                words.append(f"prompts.{name}.source={there}")
        if "://" not in config.runs_folder and not Path(config.runs_folder).expanduser().is_absolute():
            # There it would lie in a folder that goes with the job.
            words.append(f"runs_folder={Path(config.runs_folder).absolute()}")
        checked = ["--dry-run"] if dry_run else []
        return cls(
            id_ or f"{config.run}-{time.strftime('%Y%m%d-%H%M%S')}",
            shlex.join(["python", "-m", "kto_ray", "run", "--recipe", recipe, *checked, *words]),
            folder,
            files,
            dict(map(_variable, variables)),
        )

    @contextmanager
    def uploaded(self) -> Iterator[Path]:
        """The folder as it is uploaded: `folder` itself, where there are no other files to put into it."""
        if self.folder is not None and all((self.folder / there).exists() for there in self.files):
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="kto-ray-") as temporary:
            target = Path(temporary)
            if self.folder is not None:
                names = [pattern.strip("/*") for pattern in LEFT_OUT]
                shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns(*names), dirs_exist_ok=True)
            for there, here in self.files.items():
                shutil.copy(here, target / there)
            yield target


def _checkout() -> Path | None:
    """The repository in which this is called, if this package is that repository's."""
    here = Path.cwd()
    return here if Path(kto_ray.__file__).parent == here / "kto_ray" and (here / "pyproject.toml").is_file() else None


def _variable(text: str) -> tuple[str, str]:
    name, given, value = text.partition("=")
    if given:
        return name, value
    if name not in os.environ:
        raise UserError(f"--env: {name} is not in this environment; set it, or give {name}=VALUE")
    return name, os.environ[name]


def use_token() -> None:
    """Let Ray's client send the token of this machine, where there is one and nothing else is said."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or Path(path).expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(address: str | None = None) -> "tuple[JobSubmissionClient, str]":
    """Ray's client, and the address it talks to: as given, RAY_API_SERVER_ADDRESS, or a head on this machine.

    Raises:
        UserError: nobody answers there, or not to this token.
    """
    use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    try:
        return JobSubmissionClient(address), address
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise UserError(
            f"--address: {hide(address)} does not take jobs: {hide(str(error)).splitlines()[0]}; it is the address of "
            "the head's dashboard, and the token of the cluster must be in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from error


def send(submission: Submission, client: "JobSubmissionClient") -> None:
    """Upload and begin.

    Raises:
        UserError: the cluster does not take it, for instance because it has a job of that id.
    """
    from ray.exceptions import AuthenticationError

    environment = {"env_vars": dict(submission.variables)} if submission.variables else {}
    with submission.uploaded() as folder:
        settings = {"working_dir": str(folder), "excludes": LEFT_OUT} | environment
        try:
            client.submit_job(entrypoint=submission.command, submission_id=submission.id, runtime_env=settings)
        except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
            raise UserError(f"the cluster does not take the job {submission.id}: {hide(str(error))}") from error


def outcome(client: "JobSubmissionClient", id_: str) -> tuple[str, int]:
    """Of a job that has ended: its state in Ray's words, and the exit code of what it called."""
    from ray.job_submission import JobStatus

    info = client.get_job_info(id_)
    if info.status == JobStatus.SUCCEEDED:
        return str(info.status.value), 0
    return str(info.status.value), info.driver_exit_code or 1
