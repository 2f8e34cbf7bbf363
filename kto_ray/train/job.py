"""The driver's side of training: one Ray Train job for the whole run, fed by rounds through the coordinator."""

import asyncio
import contextlib
import logging
import threading
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, Result, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from kto_ray.cluster import noisily
from kto_ray.concurrency import cancelled, together
from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.placement import Placement, as_configured
from kto_ray.storage import Storage
from kto_ray.train.checkpoints import use_good_ones
from kto_ray.train.coordinator import Failure, GaveUp, RoundTask, TrainingReport, start_coordinator
from kto_ray.train.watching import Watching
from kto_ray.train.worker import train_worker

logger = logging.getLogger(__name__)

ENDS_S = 60
"""How long workers have to end that have given up."""


class Training:
    """Starts the train workers, hands them rounds, and gives back their reports.

    Raises:
        UserError: the run has trained, and no checkpoint of it can be used.
    """

    def __init__(self, config: RunConfig, run: Storage, placement: Placement | None = None) -> None:
        use_good_ones(run)
        self.config, self.run, self.placement = config, run, placement or as_configured(config)
        booked = self.placement.train_worker
        self.coordinator = start_coordinator()
        train = config.train
        storage_path, storage_filesystem = run.shared
        self._trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                **{"config": config, "run": run, "coordinator": self.coordinator},
                "by_turns": self.placement.by_turns,
            },
            # Ray Train itself goes by the resources: with a GPU among them it takes NCCL.
            torch_config=TorchConfig(backend="gloo" if train.on_cpu else None),
            scaling_config=ScalingConfig(
                num_workers=train.workers,
                use_gpu=booked.num_gpus > 0,
                resources_per_worker={"CPU": booked.num_cpus} | ({"GPU": booked.num_gpus} if booked.num_gpus else {}),
            ),
            run_config=TrainRunConfig(
                name="checkpoints",
                storage_path=storage_path,
                storage_filesystem=storage_filesystem,
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
                callbacks=[Watching(self.coordinator)],  # type: ignore[list-item]  # named for an older Ray Train
            ),
        )
        self._told_of: str | None = None  # the last failure that was said
        self._ended: asyncio.Future[Result]  # what `fit()` came to; one for all who wait

    def start(self) -> None:
        """Begin `fit()`, which lasts as long as the run, in a daemon thread: a failing driver does not wait for it."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._ended.add_done_callback(lambda ended: ended.exception())  # nobody may be waiting at that moment
        threading.Thread(target=self._run_fit, args=[loop], name="ray-train", daemon=True).start()

    def _run_fit(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            tell = partial(self._ended.set_result, self._trainer.fit())
        except BaseException as error:  # noqa: BLE001  handed to whoever waits for a round
            tell = partial(self._ended.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the run has ended before, and its event loop with it
            loop.call_soon_threadsafe(tell)

    async def train(self, task: RoundTask) -> TrainingReport:
        """Hand the workers a sealed round and wait for its report.

        Raises:
            UserError: what is wrong would be wrong again after a restart.
            TrainingFailedError: the workers failed more often than `train.max_failures` allows.
        """
        async with together() as group:
            telling = group.create_task(self._tell_of_workers())
            report: TrainingReport | GaveUp = await self._unless_ended(self.coordinator.train.remote(task))
            telling.cancel()
        if isinstance(report, GaveUp):
            # The workers end now, and `fit()` with them. A thread that comes out of Ray in the moment in which Ray is
            # shut down takes the process along, before it has said why.
            async with noisily("the train workers to end", self.config.cluster):
                await asyncio.wait({self._ended}, timeout=ENDS_S)
            raise UserError(report.why)
        return report

    async def _tell_of_workers(self) -> None:
        """While a round waits for workers, say so; and when they fail, why."""
        train = self.config.train
        while True:
            # Asked all the time: a coordinator that has to be started again knows of a failure only who asks for it.
            failing = asyncio.create_task(_answer(self.coordinator.wait_failure.remote(self._told_of)))
            working = asyncio.create_task(_answer(self.coordinator.wait_workers.remote()))
            try:
                async with noisily("train workers", self.config.cluster, self.placement.train_worker, train.workers):
                    await asyncio.wait({failing, working}, return_when=asyncio.FIRST_COMPLETED)
                failure: Failure = await failing
            finally:
                await cancelled([failing, working])
            self._told_of = failure.id
            if failure.moved:
                logger.warning("the train workers move, from the last checkpoint: %s", failure.why)
                continue
            logger.warning(
                "the train workers failed (%s); they start again from the last checkpoint, up to train.max_failures "
                "(%d) times in all",
                *(failure.why, train.max_failures),
            )

    async def _unless_ended(self, reference: "ray.ObjectRef[Any]") -> Any:
        """What a call to the coordinator gives, or the error of the Ray Train job that was to bring it about."""
        answer = asyncio.create_task(_answer(reference))
        try:
            await asyncio.wait({answer, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            self._ended.result()
            raise RuntimeError("the train workers ended although the run goes on")
        except TrainingFailedError as error:
            if "No space left on device" in str(error):  # of Ray Train's controller, which keeps a list of checkpoints
                raise UserError(
                    f"runs_folder: no room in {self.run}/checkpoints; make room, and the same command goes on"
                ) from error
            raise
        finally:
            await cancelled([answer])

    async def close(self) -> None:
        """Let the workers end, once all rounds are trained."""
        closing = asyncio.create_task(_answer(self.coordinator.close.remote()))
        try:
            await asyncio.wait({self._ended})
        finally:
            await cancelled([closing])
        self._ended.result()


async def _answer(reference: "ray.ObjectRef[Any]") -> Any:
    """What a call to the coordinator gives; when nobody wants to know any more, the coordinator stops waiting, too."""
    try:
        return await reference
    except asyncio.CancelledError:
        ray.cancel(reference)
        raise
