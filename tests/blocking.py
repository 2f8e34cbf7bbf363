"""Finds what keeps an event loop waiting by its cause instead of by the clock, which differs from machine to machine.

    with blocking_calls() as calls: ...     `calls` has whatever of it is called on the thread of a running event loop

Watched are all public methods of `Storage`, those that it may have some day too, Parquet's readers and writers, and
`hashlib.sha256` of more than a few kilobytes. What runs in `asyncio.to_thread` is nobody's concern.
"""

import asyncio
import contextlib
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import kto_ray
from kto_ray.storage import Storage

PACKAGE, STORAGE = str(Path(kto_ray.__file__).parent), kto_ray.storage.__file__
CALLERS = 3
LARGE = 4096
"""Bytes to be hashed; ids and seeds take fewer."""
NO_INPUT_OR_OUTPUT = ("require_mine", "require_seen")


@dataclass(frozen=True)
class BlockingCall:
    """What was called, and the nearest lines of kto_ray outside of `storage.py` that led to it."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} by {self.where}"


class _Watch:
    """Wraps functions. Of calls within calls the outermost counts."""

    def __init__(self, calls: list[BlockingCall]) -> None:
        self.calls = calls
        self.inside = threading.local()

    def watched(self, what: str, function: Callable[..., Any], is_storage: bool = False) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.recorded(" ".join([what, *(str(arg) for arg in args[1:2])]) if is_storage else what):
                return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def recorded(self, what: str) -> Iterator[None]:
        if getattr(self.inside, "a_call", False):
            yield
            return
        if asyncio._get_running_loop() is not None:
            self.calls.append(BlockingCall(what, _callers()))
        self.inside.a_call = True
        try:
            yield
        finally:
            self.inside.a_call = False


class _Hash:
    """`hashlib.sha256`, watched; a hash that is fed piece by piece counts every large piece."""

    def __init__(self, watch: _Watch, data: Any = b"", **kwargs: Any) -> None:
        self._watch, self._hash = watch, _SHA256(**kwargs)
        self.update(data)

    def update(self, data: Any) -> None:
        large = memoryview(data).nbytes > LARGE
        with self._watch.recorded("hashlib.sha256") if large else contextlib.nullcontext():
            self._hash.update(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hash, name)


_SHA256 = hashlib.sha256


def _callers() -> str:
    """The lines of kto_ray that led here, innermost first; where there is none, the caller's."""
    frames, frame = [], sys._getframe(1).f_back
    while frame is not None:
        frames.append((frame.f_code.co_filename, f"{frame.f_lineno} {frame.f_code.co_name}"))
        frame = frame.f_back
    outside = [(path, line) for path, line in frames if path not in (__file__, contextlib.__file__, STORAGE)]
    ours = [(path, line) for path, line in outside if path.startswith(PACKAGE)]
    return " < ".join(f"{Path(path).name}:{line}" for path, line in ours[:CALLERS] or outside[:1])


@contextlib.contextmanager
def blocking_calls() -> Iterator[list[BlockingCall]]:
    """The calls, also those of the test itself: `clear()` begins anew."""
    calls: list[BlockingCall] = []
    watch = _Watch(calls)
    with pytest.MonkeyPatch.context() as patch:
        for name, member in list(vars(Storage).items()):
            if callable(member) and not name.startswith("_") and name not in NO_INPUT_OR_OUTPUT:
                patch.setattr(Storage, name, watch.watched(f"Storage.{name}", member, is_storage=True))
        for name in ("read_table", "write_table", "read_metadata", "read_schema"):
            patch.setattr(pq, name, watch.watched(f"parquet.{name}", getattr(pq, name)))
        for kind in (pq.ParquetFile, pq.ParquetWriter):
            public = [name for name, member in vars(kind).items() if callable(member) and not name.startswith("_")]
            for name in ("__init__", *public):
                patch.setattr(kind, name, watch.watched(f"parquet.{kind.__name__}.{name}", getattr(kind, name)))
        patch.setattr(hashlib, "sha256", lambda *args, **kwargs: _Hash(watch, *args, **kwargs))
        yield calls
