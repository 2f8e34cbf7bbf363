"""Samples on their way from the generators to scorers and labelers, and the way to their pixels.

A replica stores what it draws and answers with records and a reference to the pixels in Ray's object store. Whoever
needs pixels takes them from there, or from storage when the object is gone (its replica was let go, or died): but
for these, and where a labeler asks for them, no pixels pass through the loop's process.

Shape suffixes: B samples; H, W height and width of pixels (BHWC).
"""

import asyncio
import pickle
from collections.abc import Iterator, Sequence, Set
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from kto_ray.parts import read_arrays
from kto_ray.records import Prompt, Sample, SampleRecord
from kto_ray.storage import Storage

Pixels = npt.NDArray[np.uint8]


class Samples(Sequence[SampleRecord]):
    """Records of samples of one batch, in order; `pixels_BHWC` gives their pixels.

    Args:
        folder: the round's, in which they are stored.
        reference: to their pixels in Ray's object store, in the same order: a buffer, and its shape (B, H, W, 3), which
            every Python environment can read.
        pixels_BHWC: the pixels themselves, where they are in this process.
    """

    def __init__(
        self,
        records: Sequence[SampleRecord],
        folder: Storage | None = None,
        reference: Any = None,
        pixels_BHWC: Pixels | None = None,
    ) -> None:
        self.records, self.folder = list(records), folder
        self._reference, self._pixels = reference, pixels_BHWC
        self._putting: asyncio.Task[Any] | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Samples":
        """Whole samples that are in this process; all pixels of one shape."""
        pixels_BHWC = np.stack([sample.pixels_HWC for sample in samples]) if samples else np.zeros((0, 1, 1, 3), "u1")
        pixels_BHWC.flags.writeable = False
        return cls([sample.record() for sample in samples], pixels_BHWC=pixels_BHWC)

    @overload
    def __getitem__(self, place: int) -> SampleRecord: ...

    @overload
    def __getitem__(self, place: slice) -> "Samples": ...

    def __getitem__(self, place: int | slice) -> "SampleRecord | Samples":
        if isinstance(place, int):
            return self.records[place]
        pixels_BHWC = None if self._pixels is None else self._pixels[place]
        return Samples(self.records[place], self.folder, pixels_BHWC=pixels_BHWC)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[SampleRecord]:
        return iter(self.records)

    @property
    def prompts(self) -> list[Prompt]:
        return [record.prompt for record in self.records]

    def only(self, ids: Set[str]) -> "Samples":
        """Those with these ids; itself, if that is all of them."""
        places = [place for place, record in enumerate(self.records) if record.id in ids]
        if len(places) == len(self.records):
            return self
        pixels_BHWC = None if self._pixels is None else self._pixels[places]
        return Samples([self.records[place] for place in places], self.folder, pixels_BHWC=pixels_BHWC)

    async def pixels_BHWC(self) -> Pixels:
        """uint8 RGB of shape (B, H, W, 3), read-only.

        Raises:
            ValueError: they are stored, and have changed since.
        """
        if self._pixels is None and self._reference is not None:
            from ray.exceptions import RayError

            from kto_ray.lost import is_lost

            try:
                data, shape = await self._reference
                return np.frombuffer(data, np.uint8).reshape(shape)
            except RayError as error:
                if not is_lost(error):
                    raise
                self.lost(self._reference)
        return await asyncio.to_thread(self._read)

    def _read(self) -> Pixels:
        pixels_BHWC: Pixels | None = self._pixels
        if pixels_BHWC is None:
            assert self.folder is not None
            pixels_BHWC = read_arrays(self.folder, "pixels", self.records)
        pixels_BHWC.flags.writeable = False
        return pixels_BHWC

    async def reference(self) -> Any:
        """To the pixels in Ray's object store; they are put there when they are not."""
        if self._reference is None:
            putting = self._putting = self._putting or asyncio.create_task(asyncio.to_thread(self._put))
            try:
                self._reference = await asyncio.shield(putting)  # others may wait for it, too
            finally:
                if putting.done() and self._putting is putting:
                    self._putting = None  # whoever asks after an error tries again
        return self._reference

    def _put(self) -> Any:
        return _put(self._read())

    def lost(self, reference: Any) -> None:
        """What `reference` gave is gone; the next one is made from storage."""
        if reference is self._reference:
            self._reference = self._putting = None


def put_pixels(samples: Sequence[Sample]) -> Any:
    """Pixels of whole samples into Ray's object store; gives the reference to them, None when there are no samples."""
    return _put(np.stack([sample.pixels_HWC for sample in samples])) if samples else None


def _put(pixels_BHWC: Pixels) -> Any:
    import ray

    # In a buffer they are copied once, and read where they lie.
    return ray.put((pickle.PickleBuffer(np.ascontiguousarray(pixels_BHWC).data), pixels_BHWC.shape))
