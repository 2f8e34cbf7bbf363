"""A pool of Ray actors that run one scorer: batches in, scores out, whatever dies or hangs on the way.

`scorer_labeler.py` labels with it and `evaluate/` measures with it. Each actor builds the scorer once. A batch whose
actor dies is handed to another, a bounded number of times; a batch that outlasts the time-out fails, and its actor is
killed and replaced. Whatever fails becomes a score without a value that carries the error: never a number.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayActorError

from kto_ray.cluster import noisily
from kto_ray.config import RunConfig
from kto_ray.label.protocol import Scorer, load_plugin
from kto_ray.label.scorers import SCORERS
from kto_ray.records import Prompt, Sample, Score

logger = logging.getLogger(__name__)


class ScorerActor:
    """Holds one scorer. Batches that raise are scored image by image, so that one bad image costs one score."""

    def __init__(self, scorer: str, arguments: dict[str, Any]) -> None:
        self.scorer: Scorer = load_plugin("label.scorer", scorer, SCORERS)(**arguments)

    def describe(self) -> tuple[str, str]:
        """Name and version of the scorer; returns once it is built."""
        return self.scorer.name, self.scorer.version

    def score(
        self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]
    ) -> list[tuple[float | None, str | None]]:
        """(value, None) or (None, error) for each image."""
        try:
            return self._score(images_BHWC, prompts)
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything; it goes into the record
            if len(prompts) == 1:
                return [(None, f"{type(error).__name__}: {error}")]
        return [self.score(images_BHWC[i : i + 1], [prompt])[0] for i, prompt in enumerate(prompts)]

    def _score(
        self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]
    ) -> list[tuple[float | None, str | None]]:
        values = [float(value) for value in self.scorer.score(images_BHWC, prompts)]
        if len(values) != len(prompts):
            raise ValueError(f"{self.scorer.name} gave {len(values)} scores for {len(prompts)} images")
        return [(value, None) if math.isfinite(value) else (None, f"the score is {value}") for value in values]


class ScorerPool:
    """Scores samples on `min_actors` to `max_actors` actors; grows while batches wait for one.

    `start` must be awaited first. Use from one event loop.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.cluster = config.label, config.cluster
        resources = self.config.resources
        self._actor_class = ray.remote(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(resources.threads or 1)}},
        )(ScorerActor)
        self._actors: list[Any] = []
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._waiting = 0
        self.name = self.version = ""
        self.busy_seconds = 0.0

    async def start(self) -> None:
        """Bring up `min_actors` actors and learn the scorer's name and version. Raises what building it raises."""
        for _ in range(self.config.min_actors):
            self._add_actor()
        async with noisily("scorer actors", self.cluster, self.config.resources, self.config.min_actors):
            described = await asyncio.gather(*(actor.describe.remote() for actor in self._actors))
        self.name, self.version = described[0]

    def _add_actor(self) -> None:
        actor = self._actor_class.remote(self.config.scorer, self.config.scorer_args)
        self._actors.append(actor)
        self._idle.put_nowait(actor)

    def _replace(self, actor: Any) -> None:
        ray.kill(actor)
        self._actors.remove(actor)
        self._add_actor()

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Score samples, in order; never raises for what a scorer or its actor does."""
        images_BHWC = np.stack([sample.pixels_HWC for sample in samples])
        answers = await self._ask(images_BHWC, [sample.prompt for sample in samples])
        return [
            Score(sample.id, self.name, self.version, value, error)
            for sample, (value, error) in zip(samples, answers, strict=True)
        ]

    async def _ask(
        self, images_BHWC: npt.NDArray[np.uint8], prompts: list[Prompt]
    ) -> list[tuple[float | None, str | None]]:
        loop = asyncio.get_running_loop()
        images, failure = ray.put(images_BHWC), ""
        for _ in range(1 + self.config.max_retries):
            actor = await self._acquire()
            began = loop.time()
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    answers: list[tuple[float | None, str | None]] = await actor.score.remote(images, prompts)
            except RayActorError as error:
                failure = f"scorer actor died: {error}"
                logger.warning("a scorer actor died; its %d images go to another", len(prompts))
                self._replace(actor)
            except TimeoutError:
                failure = f"no answer within {self.config.timeout_s:g} s"
                logger.warning(
                    "a scorer actor gave %s; it is replaced and its %d images count as failed", failure, len(prompts)
                )
                self._replace(actor)
                break
            else:
                self._idle.put_nowait(actor)
                self.busy_seconds += loop.time() - began
                return answers
        return [(None, failure)] * len(prompts)

    async def _acquire(self) -> Any:
        if self._idle.empty() and len(self._actors) < self.config.max_actors:
            self._add_actor()
        return await self._idle.get()

    def shrink(self) -> None:
        """Let go of idle actors above the minimum; the loop calls it when a round is sealed."""
        while len(self._actors) > self.config.min_actors and not self._idle.empty():
            actor = self._idle.get_nowait()
            self._actors.remove(actor)
            ray.kill(actor)

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayActorError):
                ray.kill(actor)
        self._actors.clear()
