"""A warm round of the whole loop on Ray, against the bare work in it, and what the control plane costs.

    python benchmarks/rounds.py [--quick]

A repeat is one job of a few small rounds, in a process and on a Ray of its own, and the same rounds in this process,
without Ray (`plain_loop.py`): the same images, batches and number of threads. Figures are means over the warm rounds,
all but the first. The control plane's share is what is left of a round after the seconds in which a replica draws, the
learner trains, and the scorers catch up with the last images: requests and samples on their way, Parquet, reading and
sealing the round, checkpoint, policy, digests, polling.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import Table, median_and_range, ratios, run_alone, threads

from kto_ray.bake_off.plain_loop import PlainLoop, PlainRound
from kto_ray.config import RunConfig, load, to_yaml

ROUNDS = 4
IMAGES = 144
RAY_NICENESS = 15
"""Of its workers (RAY_worker_niceness): beside anything else on the machine, bare work would come first without it."""
OVERRIDES = (
    f"rounds={ROUNDS}",
    f"generate.images_per_round={IMAGES}",
    "generate.min_replicas=1",  # busy seconds of several replicas overlap
    "generate.max_replicas=1",
    "evaluate.max_prompts=8",  # before the first and after the last round; not part of any figure
    "evaluate.images_per_prompt=1",
    "cluster.address=local",
)


def measure(quick: bool) -> Table:
    """Run loop and bare work in turn."""
    repeats = 1 if quick else 3
    looped: list[Sequence[dict[str, Any]]] = []
    bare: list[Sequence[PlainRound]] = []
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            each = (f"train.resources.threads={threads()}", f"generate.resources.threads={threads()}")
            config = load("shapes_demo", [*OVERRIDES, *each, "run=bench", f"runs_folder={folder}"])
            if repeat % 2:
                bare.append(run_bare(config))
            looped.append(run_loop(config))
            if not repeat % 2:
                bare.append(run_bare(config))

    def stage(name: str) -> list[float]:
        return [mean(row[name] for row in rows[1:]) for rows in looped]

    generate = [mean(round_.generate_s for round_ in rounds[1:]) for rounds in bare]
    train = [mean(round_.train_s for round_ in rounds[1:]) for rounds in bare]
    work = [sum(parts) for parts in zip(generate, train, strict=True)]
    wall, label_tail = stage("seconds/round"), stage("seconds/label")
    drawing, training = stage("busy/generate"), stage("seconds/train")
    hidden = [1 - tail / busy for tail, busy in zip(label_tail, stage("busy/label"), strict=True)]
    control = [whole - sum(parts) for whole, *parts in zip(wall, drawing, training, label_tail, strict=True)]
    same = [[row["desirable"] for row in rows] for rows in looped] == [
        [round_.desirable for round_ in rounds] for rounds in bare
    ]
    return Table(
        title=f"Warm round of {IMAGES} images",
        columns=("figure", "median", "lowest - highest"),
        rows=(
            ("round in the loop", *median_and_range(wall, "{:.2f} s")),
            ("bare generation + bare training", *median_and_range(work, "{:.2f} s")),
            ("round / bare", *median_and_range(ratios(wall, work))),
            ("generation in the loop / bare", *median_and_range(ratios(drawing, generate))),
            ("training in the loop / bare", *median_and_range(ratios(training, train))),
            ("labeling after the last image", *median_and_range(label_tail, "{:.2f} s")),
            ("labeling hidden behind generation", *median_and_range(hidden, "{:.0%}")),
            ("control plane", *median_and_range(control, "{:.2f} s")),
            ("control plane, share of the round", *median_and_range(ratios(control, wall), "{:.1%}")),
        ),
        note=f"Median of {repeats} repeats of {ROUNDS} rounds, the first of which is not counted. "
        f"Loop and bare work came to {'the same' if same else 'DIFFERENT'} numbers of desirable images.",
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


if __name__ == "__main__":
    run_alone(measure, __doc__)
