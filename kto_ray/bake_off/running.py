"""Cells as Ray tasks: each is one process with one thread, and says what came of every round as it goes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray

from kto_ray.bake_off.planning import Cell, Results
from kto_ray.bake_off.tasks import TASKS

Row = dict[str, Any]

HEALTH = ("accuracy", "margin", "saturated", "g_desirable", "g_undesirable", "gradient_norm")
"""Figures of the learner that are kept of every round, where the objective has them."""


def rows_of(cell: Cell, every: int) -> Iterator[Row]:
    """What came of the base and of every round, evaluated after each `every` rounds and after the last.

    The first row is the base's; "images" is how many were drawn for training up to there.
    """
    from kto_ray.bake_off.plain_loop import PlainLoop

    config, began = cell.config(), time.monotonic()
    loop = PlainLoop(config, threads=1, flipped=TASKS[cell.task].flipped)
    yield {"round": 0, "images": 0, "evaluation": asdict(loop.evaluate(0)), "seconds": time.monotonic() - began}
    for index in range(config.rounds):
        trained = loop.run_round(index)
        last = index + 1 == config.rounds
        yield {
            "round": index + 1,
            "images": (index + 1) * config.generate.images_per_round,
            "desirable": trained.pass_rate,
            "figures": {name: trained.figures[name] for name in HEALTH if name in trained.figures},
            "evaluation": asdict(loop.evaluate(index + 1)) if last or (index + 1) % every == 0 else None,
            "seconds": time.monotonic() - began,
        }


def run_cells(
    cells: Sequence[Cell], every: int, results: Results, on_row: Callable[[Cell, Row], None], at_once: int
) -> None:
    """Run cells on the cluster, so many at a time, and keep each result once it is whole.

    Args:
        on_row: called with each row as it comes.

    Raises:
        RayTaskError: a cell failed; what is done is kept.
    """
    task: Any = ray.remote(rows_of).options(num_cpus=1, num_returns="streaming", max_retries=0)
    waiting, running = list(reversed(cells)), dict[Any, tuple[Cell, list[Row]]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            cell = waiting.pop()
            running[task.remote(cell, every)] = (cell, [])
        ready: list[Any] = ray.wait(list(running), num_returns=1)[0]
        stream = ready[0]
        cell, rows = running[stream]
        try:
            row: Row = ray.get(next(stream))
        except StopIteration:
            results.write(cell, rows)
            del running[stream]
            continue
        rows.append(row)
        on_row(cell, row)
