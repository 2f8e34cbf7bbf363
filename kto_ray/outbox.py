"""What a tracker is still to be sent: rows go to it from a thread of their own, so that nobody waits for its server.

`tracking.py` makes one for each tracker. A server that is away is said once; every further row, and the end of the run,
tries again. Which rows it has stands in the run's folder (`tracking/wandb.json`), so that a continued run sends what
an earlier one could not.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kto_ray.secrets import hide
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

CLOSE_S = 30.0
"""So long the end of a run waits for what is still on its way."""

Row = dict[str, Any]
"""One event: "kind", "step", "time" (seconds since 1970) and figures."""


class Tracker(Protocol):
    """A service that takes rows. It is made, called and closed in one thread, and may raise whatever it likes."""

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


class Outbox:
    """Rows on their way to one tracker, in their order.

    Args:
        name: of the tracker, for messages and files.
        make: connects to it, when there is a row for it; is tried again where it raises.
        run: the run's folder.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], run: Storage) -> None:
        self.name = name
        self._make, self._run, self._file = make, run, f"tracking/{name}.json"
        self._sent: set[str] = set(run.read_json(self._file)["sent"]) if run.exists(self._file) else set()
        self._waiting: list[Row] = []
        self._told, self._closing = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def post(self, rows: Sequence[Row]) -> None:
        """Send rows, but for those that the tracker has; returns at once."""
        with self._changed:
            self._waiting += [row for row in rows if _name(row) not in self._sent]
            self._told += 1
            self._changed.notify()

    def close(self) -> None:
        """Send what is left and close the tracker; returns at once, see `join`."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait until it is closed, and say what could not be sent."""
        self._thread.join(timeout_s)
        if self._waiting:
            logger.warning(
                "tracking: %d rows could not be sent to %s; they stand in metrics.jsonl, and are sent when the same "
                "command is run again",
                *(len(self._waiting), self.name),
            )
        elif self._thread.is_alive():
            logger.warning("tracking: %s has all rows, but does not end; it is not waited for", self.name)

    def _work(self) -> None:
        tracker: Tracker | None = None
        away, told, closing = False, 0, False
        while not closing:
            with self._changed:
                while self._told == told and not self._closing:
                    self._changed.wait()
                told, closing = self._told, self._closing
            try:
                if self._waiting:
                    tracker = tracker or self._make()
                    self._send(tracker)
                if closing and tracker:
                    tracker.close()
            except Exception as error:  # noqa: BLE001  a tracker's package raises what it likes
                if not away:
                    logger.warning(
                        "tracking: %s does not answer (%s: %s); the run goes on, and what is missing is sent later",
                        *(self.name, type(error).__name__, hide(str(error))),
                    )
                away = True
            else:
                if away:
                    logger.warning("tracking: %s answers again, and has what it missed", self.name)
                away = False

    def _send(self, tracker: Tracker) -> None:
        before = len(self._sent)
        try:
            while self._waiting:
                tracker.log(self._waiting[0])
                self._sent.add(_name(self._waiting[0]))
                del self._waiting[0]
        finally:
            if len(self._sent) > before:
                self._run.write_json(self._file, {"sent": sorted(self._sent)})


def join_all(outboxes: Sequence[Outbox], timeout_s: float | None = None) -> None:
    """Close all of them at the same time, and wait for them no longer than `timeout_s` (`CLOSE_S`) in all."""
    for outbox in outboxes:
        outbox.close()
    deadline = time.monotonic() + (CLOSE_S if timeout_s is None else timeout_s)
    for outbox in outboxes:
        outbox.join(max(0.0, deadline - time.monotonic()))


def _name(row: Row) -> str:
    """With its time: a round that was done again is another row."""
    return f"{row['kind']} {row['step']} {row['time']}"
