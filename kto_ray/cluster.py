"""The Ray cluster: how a job joins or starts one, and how waiting for it is made audible.

`loop.py` enters `connected`; everything that waits for actors does so within `noisily`, which says after a while what
was asked for, what the cluster has, and what is missing; the wait goes on and ends when resources come.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import ray

from kto_ray.concurrency import cancelled
from kto_ray.config import Cluster, Resources
from kto_ray.sharing import require_seen_everywhere
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

NOTICE_EVERY_S = 60.0

WORKER_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",  # it warns that torchvision, which nothing here needs, is missing
    # glibc gives large blocks back to the kernel and asks for them again, step after step; keeping them took a quarter
    # off a convolutional training step on a CPU.
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    # Serve's controller ends a proxy that is not ready in three times 5 s; on a busy machine its imports take longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "STORAGE_EMULATOR_HOST")
"""Where the storage is, as the driver's environment says; workers elsewhere are told. Who may use it is no part of
that: a runtime environment can be read by whoever sees the cluster's dashboard."""


def joins(config: Cluster) -> bool:
    """Whether a job joins a cluster that is there, and does not start one of its own."""
    return "RAY_ADDRESS" in os.environ if config.address == "auto" else config.address != "local"


@contextlib.contextmanager
def connected(config: Cluster, run: Storage | None = None) -> Iterator[None]:
    """Join the cluster that this job was submitted to, or start one on this machine and end it afterwards.

    "auto" joins when RAY_ADDRESS is set (a submitted job has it), and starts a local one otherwise; it does not look
    for other people's clusters on the machine.

    Args:
        run: a folder, whose lease is held, that all kinds of nodes must see.

    Raises:
        UserError: one does not.
    """
    # Workers of Ray Train poll at this pace; its controller reads it from the driver's environment.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(config.health_check_s))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # see train/moving.py
    join = joins(config)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ray.init(
        address=None if join and config.address == "auto" else config.address if join else "local",
        runtime_env={
            "env_vars": WORKER_ENVIRONMENT | {name: os.environ[name] for name in PLACES if name in os.environ}
        },
        logging_level=logging.WARNING,
    )
    try:
        if run is not None:
            require_seen_everywhere(run)
        yield
    finally:
        ray.shutdown()


def missing_resources(resources: Resources, count: int = 1) -> str:
    """What `count` actors with these resources lack in the cluster as it is now: "" when nothing, else words."""
    cluster: Any = ray
    total, free = cluster.cluster_resources(), cluster.available_resources()
    parts = []
    for name, need in (("CPU", resources.num_cpus * count), ("GPU", resources.num_gpus * count)):
        if need > free.get(name, 0):
            parts.append(f"{need:g} {name} asked for, {free.get(name, 0):g} free of {total.get(name, 0):g}")
    return "; ".join(parts)


@contextlib.asynccontextmanager
async def noisily(
    what: str | Callable[[], str], config: Cluster, resources: Resources | None = None, count: int = 1
) -> AsyncIterator[None]:
    """While the body waits, say for what: after `cluster.wait_s`, then every minute. Never ends the wait.

    Args:
        what: is waited for; or says so, as it changes.
        resources, count: what is waited for needs so much of the cluster; the notice says what of it is missing.
    """

    async def notices() -> None:
        began = time.monotonic()
        await asyncio.sleep(config.wait_s)
        while True:
            lack = missing_resources(resources, count) if resources else ""
            reason = f": {lack}" if lack else ""
            named = what if isinstance(what, str) else what()
            logger.warning("still waiting for %s after %.0f s%s", named, time.monotonic() - began, reason)
            await asyncio.sleep(NOTICE_EVERY_S)

    task = asyncio.create_task(notices())
    try:
        yield
    finally:
        await cancelled([task])
