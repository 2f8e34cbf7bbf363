"""An export's way to a model hub (`--push`), by huggingface_hub. `cli_export.py` calls it.

The repository is made before anything is written: a token that is missing or not allowed to is known at once.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx2
from huggingface_hub import HfApi

from kto_ray.errors import UserError


def open_repository(repository: str) -> None:
    """Make a repository of models, unless it is there. Raises UserError: no token, no right, no such owner, no hub."""
    with _told(repository):
        HfApi().create_repo(repository, exist_ok=True)


def push(folder: Path, repository: str, message: str) -> str:
    """Upload a folder as one commit; gives its address.

    Raises:
        UserError: as `open_repository`, or the upload broke off. The folder stays.
    """
    with _told(repository, f"; {folder} is written, upload it later with: hf upload {repository} {folder}"):
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)


@contextlib.contextmanager
def _told(repository: str, rest: str = "") -> Iterator[None]:
    try:
        yield
    # Of OSError are the library's own errors; RuntimeError is what its transfers give.
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--push: {repository!r} was not pushed: {why} (it takes OWNER/NAME, a token with the right to write in "
            f"HF_TOKEN or by `hf auth login`, and the hub, HF_ENDPOINT, in reach){rest}"
        ) from error
