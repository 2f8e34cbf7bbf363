"""How many images pass through one driver, from replicas that need no time to draw, and what that costs the driver.

    python benchmarks/scale.py [--quick]

Real parts all along, on a Ray of this machine: Serve, replicas that store their samples and put pixels into the object
store, two scorers that read these pixels, the thresholds, and the making and sealing of rounds. Only the drawing is
left out: a replica answers with the same few pictures again and again. Everybody shares the cores of this machine, so
that images a second are those of all of them together; what a driver on a core of its own could carry follows from its
CPU seconds an image.
"""

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import psutil
from measuring import Table, in_a_process, median_and_range, ratios, run_alone
from rich.progress import Progress

from kto_ray.cluster import connected
from kto_ray.concurrency import all_closed
from kto_ray.config import RunConfig
from kto_ray.generate import client
from kto_ray.generate.drawn import Drawn
from kto_ray.generate.storing import Storing
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.lease import held
from kto_ray.making import Making
from kto_ray.pictures import look
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest
from kto_ray.rounds import RoundStore
from kto_ray.score.pool import Scorers
from kto_ray.serving import start_serve
from kto_ray.stalls import StallMeter
from kto_ray.storage import Storage

BASE = PolicyRef(0, "0" * 64)
BATCHES = {64: 32, 512: 16}
"""Images drawn at a time, by their edge."""
SLOW_S = 0.03
DRAW_S, LATENCY_S = "BENCH_DRAW_S", "BENCH_LATENCY_S"


class ReadyGenerator:
    """Stores and answers as a replica does, with pictures that it has made beforehand."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        rng = np.random.default_rng(os.getpid())
        side = config.generate.height
        assert side
        batch = config.generate.batch_size
        ramp_HWC = np.linspace(0, 200, side * side * 3).reshape(side, side, 3)
        noisy_BHWC = ramp_HWC + rng.normal(0, 6, (batch, side, side, 3))
        self.pixels_BHWC = np.clip(noisy_BHWC, 0, 255).astype(np.uint8)
        self.latents_BCHW = rng.normal(size=(batch, 4, side // 8, side // 8)).astype(np.float32)
        self.looks = [look(pixels_HWC) for pixels_HWC in self.pixels_BHWC]
        self.store = Storing(run)
        self.draw_s = float(os.environ[DRAW_S])
        slow_down()

    async def draw(self, requests: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> Drawn:
        samples = [
            Sample(*(r.id, r.stage, r.prompt, r.index, r.seed, policy), latents_CHW, pixels_HWC, look=one)
            for r, latents_CHW, pixels_HWC, one in zip(
                requests, self.latents_BCHW, self.pixels_BHWC, self.looks, strict=False
            )
        ]
        await asyncio.sleep(self.draw_s)
        records, pixels = await self.store(folder, samples)
        return Drawn(records, pixels, [], 0.0, "ready-made")


def first_pixel(images_BHWC: npt.NDArray[np.uint8], _: Sequence[Prompt]) -> list[float]:
    """A scorer that costs nothing."""
    return [float(image_HWC[0, 0, 0]) for image_HWC in images_BHWC]


def measure(quick: bool) -> list[Table]:
    rounds = 2 if quick else 4
    through = [
        in_a_process(__file__, replicas=replicas, pixels=pixels, images=images, rounds=rounds)
        for pixels, images in ((64, 2048), (512, 512))
        for replicas in ((1, 8) if quick else (1, 8, 32, 64))
    ]
    slow = []
    for _ in range(1 if quick else 3):
        work = {"replicas": 8, "pixels": 64, "images": 2048, "rounds": 3, "draw_s": 0.5}
        slow.append([in_a_process(__file__, **work, latency_s=latency_s) for latency_s in (0, SLOW_S)])
    slower = ratios([far["seconds"] for _, far in slow], [near["seconds"] for near, _ in slow])
    many = in_a_process(__file__, replicas=2, pixels=64, images=64, rounds=20 if quick else 200)
    return [
        Table(
            "Through one driver",
            ("replicas x pixels", "images/s", "driver CPU, ms an image", "longest stall, ms", "driver, MB at the peak"),
            [
                (
                    f"{row['replicas']} x {row['pixels']}",
                    f"{row['images_per_s']:.0f}",
                    f"{row['cpu_ms']:.2f}",
                    f"{row['stall_ms']:.0f}",
                    f"{row['peak_mb']:.0f}",
                )
                for row in through
            ],
            "Rounds of 2,048 images of 64 x 64 in batches of 32, or 512 of 512 x 512 in batches of 16, with two "
            "scorers; the first round is not counted. Replicas and scorers share the cores with the driver. A stall is "
            "a time in which the driver's event loop was at work without a break.",
        ),
        Table(
            "Storage that takes 30 ms longer for every call",
            ("8 x 64, drawing 0.5 s a batch", "a round with it / without", "range"),
            [("2,048 images a round", *median_and_range(slower))],
            "Added to every call of the driver and of the replicas; files that are open are read as fast as ever.",
        ),
        Table(
            "The driver's memory",
            ("rounds", "MB after a tenth of them", "MB after all"),
            [(str(many["rounds"]), f"{many['early_mb']:.0f}", f"{many['late_mb']:.0f}")],
            "Rounds of 64 images, through 2 replicas.",
        ),
    ]


def one(
    *, replicas: int, pixels: int, images: int, rounds: int, draw_s: float = 0, latency_s: float = 0
) -> dict[str, Any]:
    """Rounds in this process; the first one warms up."""
    config = RunConfig.model_validate(
        {
            "generate": {
                "images_per_round": images,
                "batch_size": BATCHES[pixels],
                "min_replicas": replicas,
                "max_replicas": replicas,
                "height": pixels,
                "width": pixels,
                "resources": {"num_cpus": 0.01},
            },
            "label": {
                "scorers": {
                    name: {"scorer": "benchmarks.scale:first_pixel", "resources": {"num_cpus": 0.01}}
                    for name in ("one", "other")
                },
                "threshold": "round_quantile",
            },
            "cluster": {"address": "local"},
        }
    )
    os.environ |= {DRAW_S: str(draw_s), LATENCY_S: str(latency_s)}  # replicas inherit it
    slow_down()
    with (
        tempfile.TemporaryDirectory() as folder,
        held(Storage(folder), config.cluster.lease_renew_s, config.cluster.lease_stale_s) as (_, run),
        connected(config.cluster),
    ):
        figures = asyncio.run(_one(config, run, rounds))
    return figures | {"replicas": replicas, "pixels": pixels, "rounds": rounds}


def slow_down() -> None:
    """Let every call of storage in this process take so much longer as the environment says."""
    latency_s, told, open_ = float(os.environ[LATENCY_S]), Storage._told, Storage.open
    if not latency_s:
        return

    def slow_told(self: Storage, action: str, name: str) -> Any:
        time.sleep(latency_s)
        return told(self, action, name)

    def slow_open(self: Storage, name: str) -> Any:
        time.sleep(latency_s)
        return open_(self, name)

    Storage._told, Storage.open = slow_told, slow_open  # type: ignore[method-assign]


async def _one(config: RunConfig, run: Storage, rounds: int) -> dict[str, Any]:
    await asyncio.to_thread(start_serve, None)
    with mock.patch.object(client, "Generator", ReadyGenerator):
        generators = client.Generators(config, run, "ready-made")
    scorers, labeler, store = Scorers(config.label, config.cluster), ThresholdLabeler(config.label), RoundStore(run)
    prompts = [Prompt(f"p{place}", f"prompt {place}") for place in range(64)]
    making = Making(config, prompts, store, generators, scorers, labeler, Progress(disable=True))
    process, seconds, cpu, resident = psutil.Process(), 0.0, 0.0, list[int]()
    async with all_closed(generators, scorers):
        await asyncio.gather(generators.start(), scorers.start())
        await making.make(0, store.round(0), BASE)
        async with StallMeter() as meter:
            for index in range(1, rounds):
                began, before = time.perf_counter(), time.process_time()
                await making.make(index, store.round(index), BASE)
                seconds, cpu = seconds + time.perf_counter() - began, cpu + time.process_time() - before
                resident.append(process.memory_info().rss)
    count = config.generate.images_per_round * (rounds - 1)
    return {
        "images_per_s": count / seconds,
        "cpu_ms": 1000 * cpu / count,
        "seconds": seconds,
        "stall_ms": 1000 * meter.longest_at_work.seconds,
        "stall": meter.longest_at_work.stack,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "early_mb": resident[len(resident) // 10] / 1e6,
        "late_mb": resident[-1] / 1e6,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(**json.loads(sys.argv[2]))))
    else:
        run_alone(measure, __doc__)
