"""A warm round of the demo on Ray, against the bare work in it, and what the control plane costs.

    python benchmarks/rounds.py [--quick]

A repeat is one job of a few of the demo's rounds, in a process and on a Ray of its own, and the same rounds without Ray
(`plain_loop.py`): the same images, batches and numbers of threads. Bare generation is as many processes as the demo has
replicas, which draw a share of the round each, at the same time: what is never waited for, sent or stored. Figures are
means over the warm rounds, all but the first. The control plane's share is what is left of a round after drawing,
training, and the scorers' catching up with the last images: Parquet, reading and sealing the round, checkpoint, policy,
digests, polling.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import Table, median_and_range, ratios, run_alone, threads

from kto_ray.bake_off.plain_loop import PlainLoop, PlainRound
from kto_ray.config import RunConfig, load, to_yaml
from kto_ray.prompts import round_requests

RAY_NICENESS = 15
"""Of its workers (RAY_worker_niceness): beside anything else on the machine, bare work would come first without it."""
OVERRIDES = (
    "evaluate.max_prompts=8",  # before the first and after the last round; not part of any figure
    "evaluate.images_per_prompt=1",
    "cluster.address=local",
)
SMALL = ("generate.images_per_round=72", "train.epochs=1")


def measure(quick: bool) -> Table:
    """Run loop and bare work in turn."""
    repeats, rounds, small = (1, 2, SMALL) if quick else (3, 4, ())
    looped: list[Sequence[dict[str, Any]]] = []
    bare: list[Sequence[PlainRound]] = []
    drawn: list[Sequence[float]] = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            each = f"rounds={rounds}", f"train.resources.threads={threads()}", "run=bench", f"runs_folder={folder}"
            config = load("shapes_demo", [*OVERRIDES, *small, *each])
            if repeat % 2:
                bare.append(run_bare(config))
                drawn.append(draw_bare(config))
            looped.append(run_loop(config))
            if not repeat % 2:
                bare.append(run_bare(config))
                drawn.append(draw_bare(config))

    def stage(name: str) -> list[float]:
        return [mean(row[name] for row in rows[1:]) for rows in looped]

    generate = [mean(seconds[1:]) for seconds in drawn]
    train = [mean(round_.train_s for round_ in rounds[1:]) for rounds in bare]
    work = [sum(parts) for parts in zip(generate, train, strict=True)]
    wall, label_tail = stage("seconds/round"), stage("seconds/label")
    drawing, training = stage("seconds/generate"), stage("seconds/train")
    hidden = [1 - tail / busy for tail, busy in zip(label_tail, stage("busy/label"), strict=True)]
    control = [whole - sum(parts) for whole, *parts in zip(wall, drawing, training, label_tail, strict=True)]
    same = [[row["desirable"] for row in rows] for rows in looped] == [
        [round_.desirable for round_ in rounds] for rounds in bare
    ]
    return Table(
        title=f"Warm round of the demo, {config.generate.images_per_round} images",
        columns=("figure", "median", "lowest - highest"),
        rows=(
            ("round in the loop", *median_and_range(wall, "{:.2f} s")),
            ("bare generation + bare training", *median_and_range(work, "{:.2f} s")),
            ("round / bare", *median_and_range(ratios(wall, work))),
            ("generation in the loop / bare", *median_and_range(ratios(drawing, generate))),
            ("training in the loop / bare", *median_and_range(ratios(training, train))),
            ("scoring", *median_and_range(stage("busy/label"), "{:.2f} s")),
            ("labeling after the last image", *median_and_range(label_tail, "{:.2f} s")),
            ("labeling hidden behind generation", *median_and_range(hidden, "{:.0%}")),
            ("control plane", *median_and_range(control, "{:.2f} s")),
            ("control plane, share of the round", *median_and_range(ratios(control, wall), "{:.1%}")),
        ),
        note=f"Median of {repeats} repeats of {rounds} rounds, the first of which is not counted. Bare generation: "
        f"{config.generate.min_replicas} processes that only draw. Loop and bare work came to "
        f"{'the same' if same else 'DIFFERENT'} numbers of desirable images.",
    )


def run_loop(config: RunConfig) -> list[dict[str, Any]]:
    """Run the loop; returns its metrics rows, one a round.

    In a process of its own: Ray Serve leaves threads behind that trouble a second Ray in the same process.
    """
    recipe = Path(config.runs_folder) / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    job = Path(__file__).parent.parent / "jobs" / "online_kto.py"
    done = subprocess.run([sys.executable, job, "--recipe", recipe], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the job ended with {done.returncode}: {done.stdout}{done.stderr}")
    lines = (Path(config.runs_folder) / config.run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "round"]
    return sorted(rows, key=lambda row: int(row["step"]))


def run_bare(config: RunConfig) -> list[PlainRound]:
    """Do the same work without the loop, in a process that yields to others as Ray's workers do."""
    with ProcessPoolExecutor(1, get_context("spawn"), os.nice, (RAY_NICENESS,)) as alone:
        return alone.submit(_run_bare, config).result()


def _run_bare(config: RunConfig) -> list[PlainRound]:
    loop = PlainLoop(config, threads())
    return [loop.run_round(index) for index in range(config.rounds)]


def draw_bare(config: RunConfig) -> list[float]:
    """Seconds that each round takes the slowest of processes that only draw, each its share, at the same time.

    The base draws all of them: the seconds are those of any policy.
    """
    context, replicas = get_context("spawn"), config.generate.min_replicas
    together = context.Barrier(replicas)
    with ProcessPoolExecutor(replicas, context, _begin, (together,)) as pool:
        shares = [pool.submit(_draw_share, config, rank, replicas) for rank in range(replicas)]
        return [max(seconds) for seconds in zip(*(share.result() for share in shares), strict=True)]


_together: Any = None
"""The barrier of the processes that draw at the same time, in each of them."""


def _begin(together: Any) -> None:
    global _together
    _together = together
    os.nice(RAY_NICENESS)


def _draw_share(config: RunConfig, rank: int, replicas: int) -> list[float]:
    loop, generate, seconds = PlainLoop(config, config.generate.resources.threads or threads()), config.generate, []
    for index in range(config.rounds):
        requests = round_requests(
            *(loop.train_prompts, config.seed, f"round-{index:05}", index),
            *(generate.images_per_round, generate.images_per_prompt),
        )
        starts = range(rank * generate.batch_size, len(requests), replicas * generate.batch_size)
        share = [request for start in starts for request in requests[start : start + generate.batch_size]]
        _together.wait()
        began = time.perf_counter()
        loop.draw(share)
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    run_alone(measure, __doc__)
