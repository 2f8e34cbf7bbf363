"""The model hub's errors in words: what is to be done when a name cannot be had. For all that is downloaded."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kto_ray.errors import UserError
from kto_ray.secrets import hide

CONFIG_FILES = ["*.json", "*.txt", "*.model"]
"""What is fetched of a hub's folder where its weights are not needed."""


def cache_folder() -> Path:
    """Where this project keeps what it makes of models, and copies of files on storage."""
    return Path(os.environ.get("KTO_RAY_CACHE") or "~/.cache/kto-ray").expanduser().absolute()


def configs_of(
    repository: str, revision: str | None = None, download: bool = True, field: str = "model.name", advice: str = ""
) -> Path | None:
    """A hub's diffusers folder without its weights, from its cache where it is there; None: it needs a download.

    Args:
        field, advice: see `download_of`.

    Raises:
        UserError: the hub does not have it, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with contextlib.suppress(LocalEntryNotFoundError):
        cached = Path(
            snapshot_download(repository, revision=revision, allow_patterns=CONFIG_FILES, local_files_only=True)
        )
        if (cached / "model_index.json").is_file():
            return cached
    if not download:
        return None
    with download_of(field, repository, advice or "check the name, the network, HF_TOKEN"):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=CONFIG_FILES))


@contextlib.contextmanager
def download_of(field: str, name: str, advice: str) -> Iterator[None]:
    """Around a download.

    Args:
        field: of the configuration, that asks for it.
        name: on the hub.
        advice: what to do where the hub does not have it or cannot be reached.

    Raises:
        UserError: in the place of the hub's own errors.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        said = hide(str(error))
        if _is_gated(error):
            raise UserError(
                f"{field}: {name!r} is gated: accept its terms on its page of the model hub, and give a token of the "
                f"account that did as HF_TOKEN, on every node: {said}"
            ) from error
        raise UserError(f"{field}: {name!r} could not be had from the model hub ({advice}): {said}") from error


def _is_gated(error: BaseException) -> bool:
    """diffusers says of some that it could not reach the hub; what really happened is the cause."""
    from huggingface_hub.errors import GatedRepoError

    cause = error.__cause__ or error.__context__
    return isinstance(error, GatedRepoError) or (cause is not None and _is_gated(cause))
