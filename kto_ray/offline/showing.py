"""How the passes over a source say what they do: a bar with its pace and the time left, and nothing from Ray Data."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def quietly(dataset: Any, most_bytes: int | None = None) -> Any:
    """Ray Data says nothing itself, and hands on every row by itself: each is a lot of work.

    Args:
        most_bytes: about how much lies in Ray's object store between stages; None: whatever fits, which processes that
            read it all come to hold.
    """
    from ray.data import ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = dataset.context
    context.enable_progress_bars = False
    context.target_max_block_size = 1
    if most_bytes is not None:
        context.execution_options.resource_limits = ExecutionResources(object_store_memory=most_bytes)
    return dataset


@contextmanager
def counting(console: Console, what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar, as long as the context lasts; to be told of every few that are done."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task, began, done = progress.add_task(what, total=total, pace=""), time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            pace = f"{done / max(1e-9, time.monotonic() - began):.1f} {unit}/s"
            progress.update(task, advance=count, pace=pace)

        yield advance
