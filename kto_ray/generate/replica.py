"""The Serve deployment that draws images from the current policy; `client.py` calls it.

Every request names the policy it wants. A replica that holds another one loads it from the policy store first, on the
one thread that ever touches the pipeline, and proves it: bytes against the digest, then the weights that sit in the
model against the bytes. Every sample is stamped with the policy that made it. A replica that cannot prove its digest
makes no samples. An image whose numbers are not finite is a sample with an `error`.

Before its first request it draws for nobody what `generate.batch_size: auto` and `generate.compile` need.

Where cards are shared by turns, the loop has replicas sleep when it is others' turn, and the next request wakes them.
One that is born in the meantime waits with its model until nobody trains.

A replica stores what it draws itself, while it draws the next batch, and answers with records: pixels go from here to
storage and into Ray's object store, where scorers take them from, and latents to storage alone.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from kto_ray import telemetry
from kto_ray.config import HELD_OUT_STAGES, RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import DTYPES, compile_denoiser, load_family, offload, pick_device, renew_offloaded
from kto_ray.diffusion.policy import make_policy
from kto_ray.diffusion.sampling import as_asked, draw, drawing_digest
from kto_ray.diffusion.texts import Texts, texts_of
from kto_ray.generate.cards import take_card
from kto_ray.generate.drawn import Drawn
from kto_ray.generate.fitting import emptied, largest_batch, share_reserved
from kto_ray.generate.pulling import pulled
from kto_ray.generate.storing import Storing
from kto_ray.naming import unique_name
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.records import PolicyRef, Sample, SampleRequest
from kto_ray.sleeping import Sleeper
from kto_ray.stopwatch import Spent
from kto_ray.storage import Storage

FEW_STEPS = 4
REHEARSED = "a photograph of a red fox in the snow, with a river and mountains behind it"
"""What a replica draws before it is asked for anything."""


class Generator:
    """One diffusion pipeline and the policy that it holds.

    Args:
        config: the run's configuration.
        run: the run's folder, where the policies lie.
        coordinator: of the train workers with which it shares its card by turns; None: the card is its own.
    """

    def __init__(self, config: RunConfig, run: Storage, coordinator: Any = None) -> None:
        self._name, self._spent = uuid.uuid4().hex, Spent()
        resources = config.generate.resources
        if resources.threads or not resources.num_gpus:
            torch.set_num_threads(resources.threads or torch.multiprocessing.cpu_count())
        run.require_seen()
        telemetry.of_run(unique_name(run))
        self._coordinator = coordinator
        if coordinator is not None:
            ray.get(coordinator.wait_others.remote())
            if not config.generate.on_cpu:
                take_card(unique_name(run), resources.num_gpus)
        self.config = config
        self.store = PolicyStore(run)
        folder = source.resolve(config.model)
        self.reference_digest = source.reference_digest(folder, config.model)
        self.components = source.component_digests(folder, config.model)
        self.drawing = drawing_digest(config, self.components)
        self.device = pick_device(config.generate.device, resources.num_gpus)
        settings = config.generate
        at_first = self.device if settings.offload == "none" else torch.device("cpu")
        self.family = load_family(folder, config.model, at_first, DTYPES[settings.dtype], settings.guidance_scale)
        self.texts = texts_of(config, run, self.components, lambda: self.family)
        self.policy = make_policy(self.family, config.train.adapter)
        self.policy.module.requires_grad_(False).eval()
        offload(self.family.pipeline, settings.offload, self.device)
        self.holds: PolicyRef | None = None
        # One thread: a call that is cancelled in the middle ends there before the next one begins, and the replica's
        # event loop is free for Serve's health checks.
        self._pipeline_thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")
        self._store = Storing(run)
        self._sleeper = Sleeper(self.device, lambda: [self.family.pipeline.components, self.policy.on_device()])
        self.batch_size = self._find_batch_size() if settings.find_batch_size else settings.batch_size
        if settings.compile:
            compile_denoiser(self.policy.module)
            self._warm_up()
        self._spent.turn_to("wait")

    async def found_batch_size(self) -> int:
        """How many images a request should be of."""
        return self.batch_size

    async def sleep(self) -> None:
        """Leave the card until the next request; see `Sleeper`."""
        await asyncio.get_running_loop().run_in_executor(self._pipeline_thread, self._sleep)

    def _sleep(self) -> None:
        with self._spent.on("load"):
            self._sleeper.sleep()
        self._spent.turn_to("sleep")

    async def check_health(self) -> None:
        """Asked by Serve every few seconds. Who was not there to be told that others have their turn finds out here."""
        if self._coordinator is not None and not self._sleeper.asleep:
            with contextlib.suppress(RayError):  # it is being started anew
                if await self._coordinator.is_training.remote():
                    # Not waited for: it may be drawing for somebody who has given up, and is in good health.
                    self._falling_asleep = self._pipeline_thread.submit(self._sleep)

    async def draw(
        self, requests: Sequence[SampleRequest], policy: PolicyRef, folder: str, offered: Sequence[Any] = ()
    ) -> Drawn:
        """Draw one image a request from exactly this policy, and store those that are images.

        Args:
            folder: of the round that they belong to, in the run's.
            offered: where the policy's file is besides in storage, see `pulling.py`.

        Raises:
            DigestError: the policy's weights, or the base model, are not what the digest says.
            UserError: they cannot be stored.
        """
        loop = asyncio.get_running_loop()
        samples, seconds = await loop.run_in_executor(self._pipeline_thread, self._draw, requests, policy, offered)
        images = [sample for sample in samples if sample.error is None]
        failed = [sample for sample in samples if sample.error is not None]
        records, pixels = await self._store(folder, images)
        return Drawn(records, pixels, failed, seconds, self.drawing, self._name, self._spent.so_far())

    def _draw(
        self, requests: Sequence[SampleRequest], policy: PolicyRef, offered: Sequence[Any]
    ) -> tuple[list[Sample], float]:
        began = time.monotonic()
        self._spent.turn_to("wait")  # if it slept
        with self._spent.on("load"):
            self._sleeper.wake()
            if self.holds != policy:
                self._load(policy, offered)
        with self._spent.on("work"):
            latents_BCHW, pixels_BHWC, finite_B = draw(
                self.family,
                self.texts,
                as_asked(self.config, [request.prompt.text for request in requests], policy.version),
                [request.seed for request in requests],
                self.config.drawn(requests[0].stage),  # all of one
            )
        samples = [
            Sample(
                *(r.id, r.stage, r.prompt, r.index, r.seed, policy, latents_CHW, pixels_HWC),
                error=None if finite else f"its latents or pixels, in {self.config.generate.dtype}, are not finite",
            )
            for r, latents_CHW, pixels_HWC, finite in zip(requests, latents_BCHW, pixels_BHWC, finite_B, strict=True)
        ]
        seconds, stage = time.monotonic() - began, requests[0].stage
        telemetry.DRAW_SECONDS.observe(seconds)
        for outcome, count in (("drawn", int(finite_B.sum())), ("failed", int((~finite_B).sum()))):
            telemetry.IMAGES.add(count, stage=stage if stage in HELD_OUT_STAGES else "round", outcome=outcome)
        return samples, seconds

    def _find_batch_size(self) -> int:
        """By drawing more and more images for nobody."""
        settings = self.config.generate

        def drawn(count: int) -> float:
            with emptied(self.device):
                self._rehearse(count, max(settings.guidance_scale, self.config.held_out.guidance_scale))
                return share_reserved(self.device, settings.resources.num_gpus)

        return largest_batch(drawn, min(settings.batch_size, settings.images_per_round))

    def _warm_up(self) -> None:
        """Have everything compiled that rounds draw with: the base, too, if it is the denoiser without its adapter."""
        adapted = self.config.train.adapter.kind == "lora"
        for weights in (self.policy.tensors(), None) if adapted else (None,):
            self._fill(weights)
            self._rehearse(min(self.batch_size, self.config.generate.images_per_round))

    def _rehearse(self, count: int, guidance_scale: float | None = None) -> None:
        """Draw so many images for nobody, from whatever the model holds, in a few steps: all steps are alike.

        Args:
            guidance_scale: None: that of rounds.
        """
        settings = self.config.generate
        few: dict[str, Any] = {"steps": min(settings.steps, FEW_STEPS), "timesteps": None}
        few["guidance_scale"] = guidance_scale or settings.guidance_scale
        texts = Texts(lambda: self.family)  # kept nowhere, unlike those of the run's prompts
        draw(self.family, texts, [REHEARSED] * count, range(count), settings.model_copy(update=few))

    def _load(self, policy: PolicyRef, offered: Sequence[Any]) -> None:
        self.holds = None
        base = self.store.resolve(0)
        try:
            self.store.require_base(self.reference_digest, self.components)
        except DigestError as error:
            raise DigestError(
                f"this replica holds another model: {error}; every node must load the same weights"
            ) from error
        if policy.version == 0 and policy != base:
            raise DigestError(f"asked for policy 0 of digest {policy.digest}, the run's has {base.digest}")
        tensors = pulled(self.store, policy, offered)
        self._fill(tensors)
        if not self.policy.proves(tensors):
            raise DigestError(f"policy {policy.version} was loaded, but the model does not hold its weights")
        self.holds = policy

    def _fill(self, tensors: Mapping[str, Tensor] | None) -> None:
        """See `Policy.load`."""
        self.policy.load(tensors)
        renew_offloaded(self.policy.module)
