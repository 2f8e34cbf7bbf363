"""The loop's side of the generators: deploy them, stream samples out of them, survive their deaths."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from kto_ray.cluster import noisily
from kto_ray.concurrency import as_done
from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.generate.cards import SEES_ALL
from kto_ray.generate.drawn import Drawn
from kto_ray.generate.pulling import Offering
from kto_ray.generate.replica import Generator
from kto_ray.lost import is_lost, last_words, taken_away
from kto_ray.placement import Placement, as_configured
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.records import PolicyRef, Sample, SampleRequest
from kto_ray.samples import Samples
from kto_ray.serving import QUIET, application_name, deploy, end_applications, running, scale
from kto_ray.stopwatch import Seconds
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

MAX_TRIES = 8  # of one batch that was lost, or whose replica had no room
BACK_OFF_S = 0.5  # after the first try; doubles
FINISHES_S = 60  # that a replica which is let go may take to finish what it draws


class Generators:
    """The Serve application of one run. Use as a context; requests go to whichever replica has room."""

    def __init__(
        self,
        config: RunConfig,
        run: Storage,
        drawing: str,
        placement: Placement | None = None,
        coordinator: Any = None,
    ) -> None:
        self._whole, self.config, self.cluster = config, config.generate, config.cluster
        self.placement = placement or as_configured(config)
        self.drawing = drawing
        self.batch_size = self.config.batch_size
        """Images of one request; once started, as many as a replica found that it can draw, if it was to."""
        self.name = ""  # of the application, once it is started
        self._run, self._offering = run, Offering(PolicyStore(run))
        self.busy_seconds = 0.0
        self._spent: dict[str, Seconds] = {}  # by replica, when it last answered
        self.came_s = 0.0
        """Seconds that the first replicas took to come."""
        self._coordinator = coordinator
        self._handle: DeploymentHandle[Generator] | None = None

    def _application(self) -> serve.Application:
        """For `deploy`, which has it made while nobody else makes one."""
        booked, (least, most) = self.placement.generator, self.placement.replicas
        deployment: Any = serve.deployment(Generator)
        number: dict[str, Any] = {
            "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 1}
        }
        if self.placement.kind == "elastic":
            number = {"num_replicas": max(1, least)}
        if self.placement.per_node:
            number |= {"max_replicas_per_node": self.placement.per_node}
        application: serve.Application = deployment.options(
            **number,
            max_ongoing_requests=self.config.max_ongoing_requests,
            max_queued_requests=self.config.max_queued_requests,
            ray_actor_options={
                **{"num_cpus": booked.num_cpus, "num_gpus": booked.num_gpus},
                **({"runtime_env": {"env_vars": SEES_ALL}} if self.placement.by_turns and booked.num_gpus else {}),
            },
            health_check_timeout_s=120,
            graceful_shutdown_timeout_s=FINISHES_S,
            logging_config=QUIET,
        ).bind(*(self._whole, self._run), *([self._coordinator] if self.placement.by_turns else []))
        return application

    async def start(self) -> None:
        """Deploy on Serve, and wait for the first replicas.

        Raises:
            UserError: they could not be built; has their own last words.
        """
        self.name = application_name(self._run, "generators")
        booked, (least, _) = self.placement.generator, self.placement.replicas
        began = time.monotonic()
        async with noisily("generator replicas", self.cluster, booked, max(1, least)):
            by_loop = self.placement.kind == "elastic"
            self._handle = await deploy("generate: a replica", self._application, self.name, scaled_by_us=by_loop)
            self.came_s = time.monotonic() - began
            if self.config.find_batch_size:
                self.batch_size = await self._handle.found_batch_size.remote()
                logger.info("generate.batch_size: a replica draws %d images at once", self.batch_size)

    async def sleep(self) -> None:
        """Let all replicas leave their cards; the next request wakes them.

        Raises:
            RayError, RayServeException: one of them cannot.
        """
        if self._handle is not None:
            await self._handle.broadcast("sleep").results_async()

    async def scale(self, replicas: int) -> None:
        """Have so many replicas; returns before they are there. For placement elastic."""
        await scale(self.name, Generator.__name__, replicas)

    async def running(self) -> int:
        """How many replicas there are that draw, or could."""
        return await running(self.name, Generator.__name__)

    @property
    def spent(self) -> dict[str, Seconds]:
        """On what each replica has spent its seconds, up to its last answer; numbered in the order of the first."""
        return {str(number): seconds for number, seconds in enumerate(self._spent.values(), 1)}

    def close(self) -> None:
        """Also what is only half deployed goes."""
        if self.name:
            end_applications([self.name])
        if self._handle is not None:
            self._handle.shutdown()  # type: ignore[no-untyped-call]  # its thread would begin a Ray of its own once this one is left
            self._handle = None

    def stream(
        self, requests: Sequence[SampleRequest], policy: PolicyRef, folder: Storage
    ) -> AsyncGenerator[tuple[Samples, list[Sample]], None]:
        """Draw all requests from this policy; batches come as they are done, in any order. See `as_done`.

        Gives the images, which are stored, and what is no image, which is not.

        Args:
            folder: of the round, within the run's, in which the replicas store what they draw.

        Raises:
            DigestError: a replica answered with another policy than asked for, or could not prove its own.
        """
        size = self.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        # More in flight than the replicas hold would only come back as back-pressure.
        room = asyncio.Semaphore(self.placement.replicas[1] * self.config.max_ongoing_requests)

        async def one(batch: Sequence[SampleRequest]) -> tuple[Samples, list[Sample]]:
            async with room:
                drawn = await self._draw(batch, policy, folder.uri.removeprefix(f"{self._run.uri}/"))
            return Samples(drawn.records, folder, drawn.pixels), drawn.failed

        return as_done(one(batch) for batch in batches)

    async def _draw(self, batch: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> Drawn:
        """Draw a batch; asks again, for the same images, when what was asked for is lost.

        What went with a node that was drained is asked for again however often that happens.
        """
        tries, waits = 0, False
        async with contextlib.AsyncExitStack() as waiting:
            while tries < MAX_TRIES:
                try:
                    drawn = await self._ask(batch, policy, folder)
                except BackPressureError:
                    tries, problem = tries + 1, "no replica had room"
                except RayError as error:
                    if isinstance(error, UserError):  # raised over there, under a page of traceback
                        raise UserError(last_words(error)) from error
                    if not is_lost(error):
                        raise
                    if not waits:
                        what, waits = f"{len(batch)} images that are asked for again", True
                        await waiting.enter_async_context(noisily(what, self.cluster, self.placement.generator))
                    problem = f"a generator replica died, or its node ({type(error).__name__}: {last_words(error)})"
                    if taken_away(error):
                        problem = "a generator replica went with its node, which was drained"
                    else:
                        tries += 1
                    logger.warning("%s; its %d images are asked for again", problem, len(batch))
                else:
                    if drawn.drawing != self.drawing:
                        raise DigestError(
                            f"a generator replica of {self.name} draws from another base model or with other settings "
                            f"({drawn.drawing[:8]}) than this run ({self.drawing[:8]})"
                        )
                    for sample in (*drawn.records, *drawn.failed):
                        if sample.policy != policy:
                            raise DigestError(f"asked for policy {policy}, got {sample.policy}")
                    self.busy_seconds += drawn.seconds
                    self._spent[drawn.replica] = drawn.spent
                    return drawn
                await asyncio.sleep(BACK_OFF_S * 2 ** max(0, tries - 1))
        raise RuntimeError(f"{len(batch)} images could not be drawn in {MAX_TRIES} tries; at last {problem}")

    async def _ask(self, batch: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> Drawn:
        assert self._handle is not None, "start() the generators first"
        offered = await self._offering(policy)
        response = self._handle.draw.remote(batch, policy, folder, *([offered] if offered else []))
        try:
            drawn: Drawn = await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]  # else it goes on being drawn, for nobody
            raise
        return drawn
