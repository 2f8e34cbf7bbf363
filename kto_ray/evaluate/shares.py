"""What the processes of each role have spent their seconds on, by the rows of rounds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from kto_ray.stopwatch import Doing

ROLES = ("generators", "scorers", "train_workers")


def shares_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By role: shares of its processes' seconds in which they worked, waited, slept, and loaded or moved weights."""
    found = {role: as_shares(spent_in(row, role) for row in rows) for role in ROLES}
    return {role: shares for role, shares in found.items() if shares}


def spent_in(row: Mapping[str, Any], role: str, process: str | None = None) -> Mapping[str, float]:
    """Seconds of a role in a round, or of one of its processes, by what they were spent on."""
    if process is not None:
        seconds: Mapping[str, float] = row.get(f"processes/{role}", {}).get(process, {})
        return seconds
    return {doing: row.get(f"spent/{role}/{doing}") or 0.0 for doing in get_args(Doing)}


def processes_in(rows: Sequence[Mapping[str, Any]], role: str) -> list[str]:
    """The names of a role's processes, "3" or "SCORER 3", in order; rows of earlier versions have none."""
    names = {name for row in rows for name in row.get(f"processes/{role}", {})}
    return sorted(names, key=lambda name: (name.rpartition(" ")[0], int(name.rpartition(" ")[2])))


def as_shares(spent: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of all seconds, by what they were spent on; empty where there are none."""
    several = list(spent)
    seconds = {doing: sum(one.get(doing, 0.0) for one in several) for doing in get_args(Doing)}
    whole = sum(seconds.values())
    return {doing: s / whole for doing, s in seconds.items()} if whole else {}
