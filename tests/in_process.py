"""Generators and scorers of this process, for tests of what calls them; Ray's are tested in `integration/`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence

import numpy as np

from kto_ray.parts import write_part
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef, Sample, SampleRecord, SampleRequest, Score
from kto_ray.samples import Samples
from kto_ray.stopwatch import Seconds
from kto_ray.storage import Storage
from tests.factories import make_sample, ruined

Value = Callable[[SampleRecord], float | None]


class InProcess:
    """Draws what is asked for, and scores it with functions by scorer (None fails); keeps a list of both.

    Args:
        values: by scorer.
        batch_size: images drawn at a time.
    """

    def __init__(self, values: Mapping[str, Value], batch_size: int = 2) -> None:
        self.values, self.batch_size = values, batch_size
        self.drawn: list[str] = []
        self.scored: list[tuple[str, str]] = []
        self.ruined: set[str] = set()  # prompts whose images are none
        self.policies: PolicyStore | None = None  # where those that it draws with have to be
        self.busy_seconds = 0.0
        self.spent: dict[str, Seconds] = {"1": {"work": 0.0}}
        self.drawing = "as always"
        self.shrunk = 0
        self.answering = asyncio.Event()
        self.answering.set()

    async def stream(
        self, requests: Sequence[SampleRequest], policy: PolicyRef, folder: Storage
    ) -> AsyncIterator[tuple[Samples, list[Sample]]]:
        for start in range(0, len(requests), self.batch_size):
            await asyncio.sleep(0)
            if self.policies:
                await asyncio.to_thread(self.policies.load, policy)
            batch = requests[start : start + self.batch_size]
            self.drawn += [request.id for request in batch]
            drawn = [self._draw(request, policy) for request in batch]
            images = [sample for sample in drawn if sample.error is None]
            records = await asyncio.to_thread(write_part, folder, images) if images else []
            pixels_BHWC = np.stack([sample.pixels_HWC for sample in images]) if images else None
            yield (
                Samples(records, folder, pixels_BHWC=pixels_BHWC),
                [sample for sample in drawn if sample.error is not None],
            )

    def _draw(self, request: SampleRequest, policy: PolicyRef) -> Sample:
        sample = make_sample(request, policy)
        return ruined(sample) if request.prompt.id in self.ruined else sample

    async def score(self, samples: Sequence[SampleRecord], known: Iterable[Score] = ()) -> list[Score]:
        await self.answering.wait()
        have = {(score.sample_id, score.scorer) for score in known}
        lacking = [(sample, name) for name in self.values for sample in samples if (sample.id, name) not in have]
        self.scored += [(sample.id, name) for sample, name in lacking]
        return [self._score(sample, name) for sample, name in lacking]

    async def score_each(
        self, samples: Sequence[SampleRecord], known: Iterable[Score] = ()
    ) -> AsyncGenerator[list[Score], None]:
        yield await self.score(samples, known)

    def _score(self, sample: SampleRecord, name: str) -> Score:
        value = self.values[name](sample)
        return Score(sample.id, name, "1", value, "RuntimeError: no" if value is None else None)

    def shrink(self) -> None:
        self.shrunk += 1
