"""The driver's side of training: one Ray Train job for the whole run, fed by rounds through the coordinator."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, Result, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer

from kto_ray.cluster import noisily
from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.storage import Storage
from kto_ray.train.coordinator import GaveUp, RoundTask, TrainingReport, start_coordinator
from kto_ray.train.worker import train_worker


class Training:
    """Starts the train workers, hands them rounds, and gives back their reports."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        self.config = config
        self.coordinator = start_coordinator()
        train = config.train
        self._trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": config, "run": run, "coordinator": self.coordinator},
            scaling_config=ScalingConfig(
                num_workers=train.workers,
                use_gpu=train.resources.num_gpus > 0,
                resources_per_worker={"CPU": train.resources.num_cpus}
                | ({"GPU": train.resources.num_gpus} if train.resources.num_gpus else {}),
            ),
            run_config=TrainRunConfig(
                name="checkpoints",
                storage_path=run.uri,
                failure_config=FailureConfig(max_failures=train.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            ),
        )
        self._fit: Future[Result] = Future()

    def start(self) -> None:
        """Begin `fit()`, which lasts as long as the run, in a daemon thread: a failing driver does not wait for it."""
        threading.Thread(target=self._run_fit, name="ray-train", daemon=True).start()

    def _run_fit(self) -> None:
        try:
            self._fit.set_result(self._trainer.fit())
        except BaseException as error:  # noqa: BLE001  handed to whoever waits for a round
            self._fit.set_exception(error)

    async def train(self, task: RoundTask) -> TrainingReport:
        """Hand the workers a sealed round and wait for its report.

        Raises:
            UserError: what is wrong would be wrong again after a restart.
            TrainingFailedError: the workers failed more often than `train.max_failures` allows.
        """
        await self.coordinator.offer.remote(task)
        async with noisily(
            "train workers", self.config.cluster, self.config.train.resources, self.config.train.workers
        ):
            await self._unless_failed(self.coordinator.wait_workers.remote())
        version = task.round_index + 1
        report: TrainingReport | GaveUp = await self._unless_failed(self.coordinator.wait_trained.remote(version))
        if isinstance(report, GaveUp):
            raise UserError(report.why)
        return report

    async def _unless_failed(self, reference: "ray.ObjectRef[Any]") -> Any:
        """What a call to the coordinator gives, or the error of the Ray Train job that was to bring it about."""
        answer, fit = asyncio.wrap_future(reference.future()), asyncio.wrap_future(self._fit)
        await asyncio.wait({answer, fit}, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        answer.cancel()
        fit.result()
        raise RuntimeError("the train workers ended although the run goes on")

    async def close(self) -> None:
        """Let the workers end, once all rounds are trained."""
        await self.coordinator.close.remote()
        await asyncio.wrap_future(self._fit)
