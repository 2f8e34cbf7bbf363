"""How long the parts of a run took, for its summary: the loop's with a `Stopwatch`, a role's processes with `Spent`."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Doing = Literal["work", "wait", "sleep", "load"]
"""load: come to be, take up weights, wake, and go to sleep."""
Seconds = Mapping[Doing, float]
"""That a process, or several, have spent."""


@dataclass(frozen=True)
class Stopwatch:
    """Seconds by what they were spent on; `measure` adds to one."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - began


class Laps:
    """Seconds from one call to the next, the first since it was made."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def __call__(self) -> float:
        since, self._since = self._since, time.monotonic()
        return self._since - since


class Spent:
    """What a process has spent its time on, from its first moment on, which it spends loading."""

    def __init__(self) -> None:
        self._seconds: dict[Doing, float] = dict.fromkeys(get_args(Doing), 0.0)
        self._doing: Doing = "load"
        self._since = time.monotonic()

    def turn_to(self, doing: Doing) -> None:
        """Be at something else from now on."""
        now = time.monotonic()
        self._seconds[self._doing] += now - self._since
        self._doing, self._since = doing, now

    @contextlib.contextmanager
    def on(self, doing: Doing) -> Iterator[None]:
        """Be at something else for as long as the context lasts."""
        before = self._doing
        self.turn_to(doing)
        try:
            yield
        finally:
            self.turn_to(before)

    def so_far(self) -> dict[Doing, float]:
        """Seconds by what they were spent on; may be asked by another thread than the one that tells."""
        seconds, doing, since = dict(self._seconds), self._doing, self._since
        seconds[doing] += time.monotonic() - since
        return seconds


def added(all_spent: Iterable[Seconds]) -> dict[Doing, float]:
    """What several processes have spent."""
    total: dict[Doing, float] = dict.fromkeys(get_args(Doing), 0.0)
    for spent in all_spent:
        for doing, seconds in spent.items():
            total[doing] += seconds
    return total


def as_figures(role: str, spent: Mapping[str, Seconds], before: Mapping[str, Seconds]) -> dict[str, Any]:
    """What a role's processes, by their names, have spent since then, as figures of a round.

    "spent/ROLE/DOING" are the seconds of all together. "processes/ROLE" has those of each, by its name and what they
    were spent on, as far as there were any.
    """
    new = {
        name: {doing: round(s - before.get(name, {}).get(doing, 0.0), 3) for doing, s in seconds.items()}
        for name, seconds in spent.items()
    }
    each = {name: {doing: s for doing, s in seconds.items() if s} for name, seconds in new.items()}
    return {
        **{f"spent/{role}/{doing}": seconds for doing, seconds in added(new.values()).items()},
        f"processes/{role}": {name: seconds for name, seconds in each.items() if seconds},
    }
