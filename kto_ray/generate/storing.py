"""How a replica stores what it draws, while it draws the next batch: `replica.py` calls it, nobody else need to."""

import asyncio
from collections.abc import Sequence
from typing import Any

from kto_ray.concurrency import Gathering
from kto_ray.parts import PART_SIZE, write_part
from kto_ray.records import Sample, SampleRecord
from kto_ray.samples import put_pixels
from kto_ray.storage import Storage


class Storing:
    """Images go to storage in as few parts as its slowness asks for, and their pixels into Ray's object store.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._gathered = Gathering(self._write)

    async def __call__(self, folder: str, images: Sequence[Sample]) -> tuple[list[SampleRecord], Any]:
        """Records of the images, once they are stored, and the reference to their pixels (None: there are no images).

        Args:
            folder: of the round that they belong to, in the run's.

        Raises:
            UserError: they cannot be stored.
        """
        records, pixels = await asyncio.gather(
            self._gathered([(folder, sample) for sample in images]), asyncio.to_thread(put_pixels, images)
        )
        return [*records], pixels

    def _write(self, those: Sequence[tuple[str, Sample]]) -> list[SampleRecord]:
        """In order."""
        parts: dict[tuple[str, tuple[int, ...]], list[Sample]] = {}
        for folder, sample in those:
            parts.setdefault((folder, sample.pixels_HWC.shape), []).append(sample)
        written = {
            (folder, record.id): record
            for (folder, _), samples in parts.items()
            for start in range(0, len(samples), PART_SIZE)
            for record in write_part(self._run / folder, samples[start : start + PART_SIZE])
        }
        return [written[folder, sample.id] for folder, sample in those]
