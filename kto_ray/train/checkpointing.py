"""What a checkpoint is made of: written and read by all train workers together.

    state.pt                     the learner's state, the policy's version and the report of its round
    __0_0.distcp .metadata ...   what is sharded of that state, in place of it (`train.strategy: fsdp`)
    shards.json                  the digest of each of these files

The second are of torch.distributed.checkpoint: another number of ranks can read them. `worker.py` hands Ray Train the
folder of each rank, whose files it puts into one; `checkpoints.py` looks at them from outside.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from kto_ray.errors import UserError
from kto_ray.train.checkpoints import SHARDS, STATE
from kto_ray.train.coordinator import TrainingReport
from kto_ray.train.learner import Learner

SHARDED = ("policy", "optimizer", "sampling")
"""Of a learner's state."""


def save(learner: Learner, version: int, report: TrainingReport, folder: Path) -> None:
    """Write this rank's part of a checkpoint; the first rank's, which is all of it where nothing is sharded.

    Raises:
        OSError, RuntimeError: the disk is full.
    """
    first, state = learner.rank == 0, learner.state_dict()
    if learner.policy.sharded:
        shards = {name: state.pop(name) for name in SHARDED}
        try:
            state_dict_saver.save(shards, storage_writer=FileSystemWriter(folder))
        except CheckpointException as error:  # no Exception, and on all ranks if on one
            raise RuntimeError(_said(error)) from error
        digests = _gathered({file.name: _sha256(file) for file in folder.iterdir()})
        if first:
            (folder / SHARDS).write_text(json.dumps(digests, indent=1, sort_keys=True))
    if first:
        torch.save({"learner": state, "version": version, "report": asdict(report)}, folder / STATE)


def load(learner: Learner, folder: Path) -> tuple[int, TrainingReport]:
    """Put the learner where the checkpoint left it; returns its policy version and that round's report.

    Raises:
        UserError: it was written under another `train.strategy`, or lacks what this learner has.
    """
    if (folder / SHARDS).exists() != learner.policy.sharded:
        other = "ddp" if learner.policy.sharded else "fsdp"
        raise UserError(
            f"train.strategy: {learner.config.strategy}, but the checkpoint {folder.name} was written under {other}; "
            f"give train.strategy={other}"
        )
    kept = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    state = kept["learner"]
    if learner.policy.sharded:
        own = learner.state_dict()
        shards = {name: own[name] for name in SHARDED}
        try:
            state_dict_loader.load(shards, storage_reader=FileSystemReader(folder))
        except CheckpointException as error:
            raise UserError(f"the shards of the checkpoint {folder.name} cannot be taken up: {_said(error)}") from error
        state |= shards
    learner.load_state_dict(state)
    return kept["version"], TrainingReport(**kept["report"])


def _said(error: CheckpointException) -> str:
    return "; ".join(str(failure) for failure, _ in error.failures.values())


def _gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have, by one another's keys."""
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, mine)
    return {name: value for theirs in everyones for name, value in theirs.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
