"""How many bytes are read and written of storage, and in how many files, while a block runs."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from kto_ray.storage import Storage


@dataclass
class Moved:
    read: int = 0
    written: int = 0
    files_read: int = 0
    files_written: int = 0


class CountingFile(io.RawIOBase):
    """A file that is read through; what is read is added to a count."""

    def __init__(self, file: Any, count: Moved) -> None:
        self.file, self.count = file, count

    def read(self, size: int | None = -1) -> bytes:
        data: bytes = self.file.read(None if size is None or size < 0 else size)
        self.count.read += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def size(self) -> int:
        return int(self.file.size())

    def tell(self) -> int:
        return int(self.file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def counted() -> Iterator[Moved]:
    """Counts what this process reads and writes through `Storage`."""
    count, open_, read, write = Moved(), Storage.open, Storage.read, Storage.write

    def counting_open(self: Storage, name: str) -> Any:
        count.files_read += 1
        return CountingFile(open_(self, name), count)

    def counting_read(self: Storage, name: str) -> bytes:
        data = read(self, name)
        count.files_read += 1
        count.read += len(data)
        return data

    def counting_write(self: Storage, name: str, data: bytes) -> None:
        write(self, name, data)
        count.files_written += 1
        count.written += len(data)

    counting = {"open": counting_open, "read": counting_read, "write": counting_write}
    with mock.patch.multiple(Storage, **counting):
        yield count
