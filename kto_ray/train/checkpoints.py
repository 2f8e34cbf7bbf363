"""The checkpoints of a run, as Ray Train keeps them, looked at from outside: which can be used, and which shall be.

    checkpoints/checkpoint_2026-11-25_09-12-33.123456/state.pt ...  one of each kept policy version (`checkpointing.py`)
                checkpoint_manager_snapshot.json                    Ray Train's list of them; it starts from the latest

Ray Train starts from the latest of its list, whatever is left of it, and does not start at all when one of the list is
gone. So `job.py` takes what cannot be used off the list before it begins, and `rewind.py` what shall not be used. The
workers train the rounds after the checkpoint that is left again, to the same bytes (`worker.py`).
"""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

STATE, SHARDS = "state.pt", "shards.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
READ_AT_ONCE = 2**24  # bytes: of an object store every read is a request
BEGINNING = "rewound.json"
"""In the run's folder: the policy that a run without checkpoint begins from, since it was rewound to it."""
REWINDING = "rewinding.json"
"""In the run's folder while it is being rewound; what is left of it has to be done before the run goes on."""


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint on Ray Train's list: its folder's name, and the policy version that it holds."""

    name: str
    version: int


def kept_checkpoints(run: Storage) -> list[KeptCheckpoint]:
    """Those on Ray Train's list, oldest first.

    Raises:
        UserError: the list cannot be read.
    """
    folder = run / "checkpoints"
    if not folder.exists(SNAPSHOT):
        return []
    try:
        listed = json.loads(folder.read(SNAPSHOT))["checkpoint_results"]
        return [KeptCheckpoint(entry["checkpoint_dir_name"], int(entry["metrics"]["version"])) for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/{SNAPSHOT} is damaged ({error}); the run goes on from a published policy, without the "
            f"optimizer's state, after: kto-ray rewind {run} --to {PolicyStore(run).newest()}"
        ) from error


def flaw_of(run: Storage, checkpoint: KeptCheckpoint) -> str | None:
    """Why a checkpoint cannot be used; None: it is as it was written, by the checksums in it."""
    folder = run / "checkpoints" / checkpoint.name
    try:
        with (
            folder.open(STATE) as file,
            io.BufferedReader(file, READ_AT_ONCE) as buffered,
            zipfile.ZipFile(buffered) as archive,
        ):
            damaged = archive.testzip()
        shards = folder.read_json(SHARDS) if folder.exists(SHARDS) else {}
        damaged = damaged or next((name for name, digest in shards.items() if _sha256(folder, name) != digest), None)
    except FileNotFoundError:
        return "it is gone"
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        return f"it is damaged: {error}"
    return f"it is damaged: {damaged} is not as it was written" if damaged else None


def _sha256(folder: Storage, name: str) -> str:
    with folder.open(name) as file, io.BufferedReader(file, READ_AT_ONCE) as buffered:
        return hashlib.file_digest(buffered, "sha256").hexdigest()


def keep_only(run: Storage, kept: Sequence[KeptCheckpoint]) -> None:
    """Take all other checkpoints off Ray Train's list; their folders stay."""
    folder, names = run / "checkpoints", [checkpoint.name for checkpoint in kept]
    snapshot: dict[str, Any] = json.loads(folder.read(SNAPSHOT))
    pairs = zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
    left = [(result, index) for result, index in pairs if result["checkpoint_dir_name"] in names]
    snapshot["checkpoint_results"] = [result for result, _ in left]
    snapshot["checkpoint_report_indices"] = [index for _, index in left]
    snapshot["latest_checkpoint_result"] = left[-1][0] if left else None
    folder.write_json(SNAPSHOT, snapshot)


def use_good_ones(run: Storage) -> None:
    """Let the run start from the newest checkpoint that can be used, and say so when that is not the newest.

    Raises:
        UserError: none can be used, although the run has trained.
    """
    listed, flaws = kept_checkpoints(run), dict[KeptCheckpoint, str]()
    for checkpoint in reversed(listed):
        flaw = flaw_of(run, checkpoint)
        if flaw is None:
            break
        flaws[checkpoint] = flaw
    # Older ones are not looked into, but must be there.
    good = [c for c in listed if c not in flaws and run.exists(f"checkpoints/{c.name}/{STATE}")]
    trained = PolicyStore(run).newest()
    found = "; ".join(f"{run}/checkpoints/{checkpoint.name}: {flaw}" for checkpoint, flaw in flaws.items())
    if not good and trained not in (0, beginning(run)):
        raise UserError(
            f"this run has no checkpoint to go on from ({found or f'{run}/checkpoints has none'}). Policy {trained} is "
            f"published; the run goes on from it, without the optimizer's state, after: kto-ray rewind {run} --to "
            f"{trained}"
        )
    if len(good) < len(listed):
        keep_only(run, good)
    if flaws:
        version = good[-1].version if good else beginning(run)
        logger.warning(
            "a checkpoint cannot be used (%s); the run goes on from policy %d, and trains round %d again",
            *(found, version, version),
        )


def beginning(run: Storage) -> int:
    """The version that workers without a checkpoint begin from."""
    return int(run.read_json(BEGINNING)["to"]) if run.exists(BEGINNING) else 0
