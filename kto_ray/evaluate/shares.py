"""What the processes of each role have spent their seconds on, by the rows of rounds."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from kto_ray.stopwatch import Doing

ROLES = ("generators", "scorers", "train_workers")


def shares_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By role: shares of its processes' seconds in which they worked, waited, slept, and loaded or moved weights."""
    shares: dict[str, dict[str, float]] = {}
    for role in ROLES:
        spent = {doing: sum(row.get(f"spent/{role}/{doing}") or 0.0 for row in rows) for doing in get_args(Doing)}
        if whole := sum(spent.values()):
            shares[role] = {doing: seconds / whole for doing, seconds in spent.items()}
    return shares
