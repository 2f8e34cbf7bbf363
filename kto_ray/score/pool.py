"""Pools of Ray actors that run scorers: batches in, scores out, whatever dies or hangs on the way.

`Scorers` runs all scorers of a run side by side, each in its own pool; `loop.py` scores rounds with it and `evaluate/`
held-out images. Each actor (`actor.py`) builds its scorer once. A batch whose actor dies or does not answer in time is
handed to another, a bounded number of times. Whatever fails becomes a score without a value that carries the error:
never a number. An actor whose node is being drained works on until another one has been built elsewhere.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from kto_ray import telemetry
from kto_ray.cluster import noisily
from kto_ray.concurrency import as_done, together
from kto_ray.config import Cluster, Labeling, ScorerPoolSettings
from kto_ray.draining import drained, node_of, seconds_left
from kto_ray.errors import UserError
from kto_ray.lost import is_lost, last_words, pixels_lost, taken_away
from kto_ray.placement import Placement
from kto_ray.records import Score
from kto_ray.samples import Samples
from kto_ray.score.actor import Answers, ScorerActor, plain
from kto_ray.score.environments.finding import interpreter
from kto_ray.stopwatch import Seconds

logger = logging.getLogger(__name__)

LEAST_PATIENCE_S, MOST_PATIENCE_S = 1.0, 60.0
"""How long a batch waits at least, and at most, before another actor is built."""


@dataclass
class _Time:
    """Of an actor: when it began, and ended, and the seconds in which it worked, loaded and slept."""

    began: float
    ended: float | None = None
    work: float = 0
    load: float = 0
    sleep: float = 0

    @property
    def spent(self) -> Seconds:
        held = (self.ended or time.monotonic()) - self.began
        wait = max(0.0, held - self.work - self.load - self.sleep)
        return {"work": self.work, "wait": wait, "sleep": self.sleep, "load": self.load}


class ScorerPool:
    """Runs one scorer on `min_actors` to `max_actors` actors; grows while batches wait for one.

    A batch waits for as long as the last actor took to be built before another one is: what is over sooner would be
    over before that one is there.

    `start` must be awaited first. Use from one event loop.

    Args:
        name: the name that scores are stored under.
        field: of the configuration that the settings stand in, by name.
    """

    def __init__(self, name: str, settings: ScorerPoolSettings, cluster: Cluster, field: str = "label.scorers") -> None:
        self.name, self.settings, self.cluster, self.field = name, settings, cluster, field
        resources = settings.resources
        runtime_env: dict[str, Any] = {
            "env_vars": {"OMP_NUM_THREADS": str(resources.threads or max(1, int(resources.num_cpus)))}
        }
        if settings.env:
            runtime_env["py_executable"] = str(interpreter(settings.env))
        self._actor_class = ray.remote(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, runtime_env=runtime_env
        )(ScorerActor)
        self._actors: dict[Any, asyncio.Task[None]] = {}  # each with what offers it once it is built
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self._leaving: dict[Any, Any] = {}  # actors whose node is drained, each with the one in its place
        self.version = ""
        self._times: dict[Any, _Time] = {}  # also of actors that are gone
        self._asleep_since: float | None = None
        self._patience_s = LEAST_PATIENCE_S

    async def start(self) -> None:
        """Bring up `min_actors` actors and learn the scorer's version.

        Raises:
            UserError: the scorer could not be built; has its own last words.
        """
        for _ in range(self.settings.min_actors):
            self._add_actor()
        await asyncio.gather(*self._actors.values())
        try:
            described = await asyncio.gather(*(actor.describe.remote() for actor in self._actors))
        except RayError as error:
            raise UserError(f"{self.field}.{self.name} could not be built: {last_words(error)}") from error
        scorer, version = described[0]
        self.version = version if scorer == self.name else f"{scorer}@{version}"

    def _add_actor(self) -> Any:
        actor = self._actor_class.remote(self.settings.scorer or self.name, self.settings.args)
        self._times[actor] = _Time(time.monotonic())
        self._actors[actor] = asyncio.create_task(self._offer(actor))
        return actor

    async def _offer(self, actor: Any) -> None:
        """Let an actor have batches once its scorer is built; until then they go to others.

        One that cannot be built is offered, too: whoever takes it finds out why, and replaces it.
        """
        began = time.monotonic()
        async with noisily(f"an actor of scorer {self.name}", self.cluster, self.settings.resources):
            with contextlib.suppress(RayError):
                await actor.describe.remote()
                self._times[actor].load += time.monotonic() - began
                self._patience_s = min(max(LEAST_PATIENCE_S, time.monotonic() - began), MOST_PATIENCE_S)
        self._give_back(actor)

    async def leave(self, nodes: Mapping[str, float | None]) -> None:
        """Build others in the place of the actors on nodes that are drained, with the seconds that are left to them."""
        for actor, offer in list(self._actors.items()):
            node = await asyncio.to_thread(node_of, actor)
            if node is None or node not in nodes or actor not in self._actors or actor in self._leaving:
                continue
            logger.warning(
                "scorer %s: the node of an actor is taken away %s; another one is built elsewhere",
                *(self.name, seconds_left(nodes[node])),
            )
            if offer.done():
                self._leaving[actor] = self._add_actor()
            else:
                self._replace(actor)

    def _give_back(self, actor: Any) -> None:
        """Let others have an actor, and those go whose node is drained, once another one is built in their place."""
        self._idle.put_nowait(actor)
        for idle in self._all_idle():
            successor = self._leaving.get(idle)
            built = successor is actor or successor not in self._actors or self._actors[successor].done()
            if idle in self._leaving and built:
                self._dismiss(idle)
            else:
                self._idle.put_nowait(idle)

    def _all_idle(self) -> list[Any]:
        """Taken from the queue."""
        return [self._idle.get_nowait() for _ in range(self._idle.qsize())]

    @property
    def _staying(self) -> int:
        return len(self._actors) - len(self._leaving)

    def _dismiss(self, actor: Any) -> None:
        self._actors.pop(actor).cancel()
        self._leaving.pop(actor, None)
        self._times[actor].ended = time.monotonic()
        ray.kill(actor)

    def _replace(self, actor: Any) -> None:
        if actor in self._actors:  # the pool is open
            successor = self._leaving.get(actor)
            self._dismiss(actor)
            if successor not in self._actors:
                other = self._add_actor()
                self._leaving |= {left: other for left, next_one in self._leaving.items() if next_one is actor}

    async def score(self, samples: Samples) -> list[Score]:
        """Score samples, in order; never raises for what a scorer or its actor does."""
        answers = await self._ask(samples)
        failed = sum(error is not None for _, error in answers)
        for outcome, count in (("scored", len(answers) - failed), ("failed", failed)):
            telemetry.SCORES.add(count, scorer=self.name, outcome=outcome)
        return [
            Score(sample.id, self.name, self.version, value, error)
            for sample, (value, error) in zip(samples, answers, strict=True)
        ]

    async def _ask(self, samples: Samples) -> Answers:
        loop = asyncio.get_running_loop()
        tries, tried, failure = 1 + self.settings.max_retries, 0, ""
        while tried < tries:
            actor = await self._acquire()
            self._awake()
            try:
                reference = await samples.reference()
            except (OSError, ValueError, UserError, RayError) as error:
                self._give_back(actor)
                tried, failure = tried + 1, f"the pixels cannot be read: {last_words(error)}"
                continue
            except asyncio.CancelledError:
                self._give_back(actor)
                raise
            try:
                began = loop.time()
                async with asyncio.timeout(self.settings.timeout_s):
                    answers: Answers = await actor.score_plain.remote(reference, plain(samples.prompts))
            except TimeoutError:
                failure = f"no answer within {self.settings.timeout_s:g} s"
            except RayError as error:
                if pixels_lost(error):  # their replica was let go, or died: no fault of the scorer; storage has them
                    self._give_back(actor)
                    samples.lost(reference)
                    continue
                what = "died" if is_lost(error) else "failed"
                failure = f"scorer actor {what}: {last_words(error)}"
                if taken_away(error) or actor in self._leaving:
                    # No fault of the scorer, nor of its images.
                    tried, failure = tried - 1, "the actor went with its node, which was drained"
            except asyncio.CancelledError:
                self._replace(actor)  # it may be at it for long
                raise
            else:
                self._give_back(actor)
                seconds = loop.time() - began
                self._times[actor].work += seconds
                telemetry.SCORE_SECONDS.observe(seconds, scorer=self.name)
                return answers
            tried += 1
            logger.warning(
                "scorer %s: %s; the actor is replaced, its %d images %s",
                *(self.name, failure, len(samples), "go to another" if tried < tries else "count as failed"),
            )
            self._replace(actor)
        return [(None, f"{failure} (tried {tries} times)")] * len(samples)

    async def _acquire(self) -> Any:
        if self._staying < self.settings.max_actors:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience_s):
                    return await self._idle.get()
            if self._staying < self.settings.max_actors:
                self._add_actor()
        return await self._idle.get()

    async def sleep(self) -> None:
        """Let all actors leave their cards; the next batch wakes them."""
        if self.settings.resources.num_gpus:
            await asyncio.gather(*(actor.sleep.remote() for actor, offer in self._actors.items() if offer.done()))
            self._asleep_since = self._asleep_since or time.monotonic()

    def _awake(self) -> None:
        if self._asleep_since is not None:
            for actor in self._actors:
                self._times[actor].sleep += time.monotonic() - self._asleep_since
            self._asleep_since = None

    @property
    def busy_seconds(self) -> float:
        return sum(one.work for one in self._times.values())

    @property
    def spent(self) -> dict[str, Seconds]:
        """On what each actor has spent its seconds; sleep counts once it is over, and until the last one wakes."""
        return {f"{self.name} {number}": one.spent for number, one in enumerate(self._times.values(), 1)}

    def shrink(self) -> None:
        """Let go of actors above the minimum that are idle or not yet built."""
        idle = self._all_idle()
        building = [actor for actor, offer in self._actors.items() if not offer.done()]
        staying = [actor for actor in (*building, *idle) if actor not in self._leaving]
        surplus = staying[: max(0, self._staying - self.settings.min_actors)]
        for actor in surplus:
            self._dismiss(actor)
        for actor in idle:
            if actor in self._actors:
                self._idle.put_nowait(actor)

    def close(self) -> None:
        for actor in list(self._actors):
            self._dismiss(actor)


def require_scored(
    label: Labeling, what: str, failures: Sequence[Score], images: int, scorers: Collection[str] | None = None
) -> None:
    """Raises UserError when scorers failed on more of so many images than `label.max_failed_fraction`.

    Args:
        scorers: that must not; None: those that vote.
    """
    needed = label.voting if scorers is None else scorers
    of_needed = [score for score in failures if score.scorer in needed]
    failed = len({score.sample_id for score in of_needed})
    if failed > label.max_failed_fraction * images:
        first = of_needed[0]
        raise UserError(
            f"{what}: {failed} of {images} images could not be scored, more than "
            f"label.max_failed_fraction ({label.max_failed_fraction:g}) allows; "
            f"the first error of scorer {first.scorer}: {first.error}"
        )


class Scorers:
    """All scorers of a run, by the names their scores are stored under; see `ScorerPool`."""

    def __init__(self, label: Labeling, cluster: Cluster, placement: Placement | None = None) -> None:
        scorers = {
            name: placement.scorer(name, settings) if placement else settings
            for name, settings in label.scorers.items()
        }
        self.pools = {name: ScorerPool(name, settings, cluster) for name, settings in scorers.items()}
        self._watching: asyncio.Task[None] | None = None

    @property
    def busy_seconds(self) -> float:
        return sum(pool.busy_seconds for pool in self.pools.values())

    @property
    def spent(self) -> dict[str, Seconds]:
        """On what each actor has spent its seconds, by its scorer and number."""
        return {name: seconds for pool in self.pools.values() for name, seconds in pool.spent.items()}

    async def start(self) -> None:
        self._watching = asyncio.create_task(self._leave_drained())
        async with together() as group:
            for pool in self.pools.values():
                group.create_task(pool.start())

    async def _leave_drained(self) -> None:
        async for nodes in drained():
            for pool in self.pools.values():
                await pool.leave(nodes)

    async def score(self, samples: Samples, known: Sequence[Score] = ()) -> list[Score]:
        """Score samples by all scorers at the same time; gives the scores that are not `known` yet."""
        async with contextlib.aclosing(self.score_each(samples, known)) as answers:
            found = [score async for scores in answers for score in scores]
        order = list(self.pools)
        return sorted(found, key=lambda score: order.index(score.scorer))

    def score_each(self, samples: Samples, known: Sequence[Score] = ()) -> AsyncGenerator[list[Score], None]:
        """The same, scorer by scorer as they answer: a slow one keeps nobody's scores back. See `as_done`."""
        have = {(score.sample_id, score.scorer) for score in known}
        batches: dict[frozenset[str], Samples] = {}  # who lacks the same shares what is read

        def jobs() -> Iterator[Coroutine[Any, Any, list[Score]]]:
            for name, pool in self.pools.items():
                # After a crash scorers may lack different samples.
                if lacking := frozenset(sample.id for sample in samples if (sample.id, name) not in have):
                    yield pool.score(batches.setdefault(lacking, samples.only(lacking)))

        return as_done(jobs())

    async def sleep(self) -> None:
        """Raises RayError where an actor cannot."""
        await asyncio.gather(*(pool.sleep() for pool in self.pools.values()))

    def shrink(self) -> None:
        """Let go of idle actors above the minimum; the loop calls it when a round is sealed."""
        for pool in self.pools.values():
            pool.shrink()

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for pool in self.pools.values():
            pool.close()
