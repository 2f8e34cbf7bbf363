"""The queue's clock."""

import time


class Clock:
    """Seconds since 1970 that never go back and never jump, whatever happens to the machine's clock.

    Args:
        last: a time that has been before, by an earlier clock.
    """

    def __init__(self, last: float = 0) -> None:
        self._offset = max(time.time(), last) - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()
