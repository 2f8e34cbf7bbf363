"""Which card of its node a replica has, where Ray books shares of cards: one that has room for another replica.

Ray puts shares onto as few cards as they fit on, so that all replicas of a node would get the same one. Under
`SEES_ALL` a replica sees every card of its node, and takes one by locking a file, which its end unlocks, whatever ends
it. `replica.py` does so first of all: which cards a process sees must be said before it has worked on any.
"""

import fcntl
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kto_ray.errors import UserError

SEES_ALL = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
VISIBLE = "CUDA_VISIBLE_DEVICES"

_taken: list[int] = []  # files, open for as long as this process lives


def take_card(run: str, share: float) -> None:
    """Have this process see one card only, until it ends.

    Args:
        run: its unique name. Replicas of other runs do not count.
        share: of a card that a replica asks for, above 0.

    Raises:
        UserError: all cards of this node are taken.
    """
    folder = Path(tempfile.gettempdir()) / f"kto-ray-cards-{run}"
    os.environ[VISIBLE] = lock_one(_cards(), folder, max(1, int(1 / share)))


def lock_one(cards: Sequence[str], folder: Path, replicas: int = 1) -> str:
    """The first of the cards with the fewest replicas, of which each takes so many. Raises UserError: all are taken."""
    folder.mkdir(exist_ok=True)
    for place, card in itertools.product(range(replicas), cards):
        lock = os.open(folder / f"{card}.{place}", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            _taken.append(lock)
            return card
    raise UserError(
        f"generate.max_replicas: none of the {len(cards)} cards of this node has room for another replica of this run; "
        "give fewer, or the cluster more cards"
    )


def _cards() -> list[str]:
    """All of this node."""
    import torch

    if listed := os.environ.get(VISIBLE):
        return listed.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
