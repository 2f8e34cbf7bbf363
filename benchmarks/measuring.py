"""Side-by-side timing, and the tables that it is told in.

What is compared runs in turn, repeat by repeat, so that a slow minute of the machine falls on both sides of a ratio. A
ratio is taken within its repeat; what is reported is the median over the repeats, with the lowest and the highest.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
import torch
from rich.console import Console

from kto_ray.cluster import WORKER_ENVIRONMENT


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, for people; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *lines, "", self.note, ""])


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each contender takes, one figure a repeat, after one untimed run of each.

    Every repeat runs all of them, beginning with another one each time: none always profits from its place.
    """
    for run in contenders.values():
        run()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio of each repeat."""
    return [a / b for a, b in zip(above, below, strict=True)]


def median_and_range(values: Sequence[float], form: str = "{:.2f}") -> tuple[str, str]:
    """The median and "lowest - highest", as text; `form` formats one value."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.median(values)), f"{low} - {high}"


def threads() -> int:
    """Torch threads of everything that is measured: all cores, or OMP_NUM_THREADS."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def become_like_a_worker() -> None:
    """Give this process the environment and the threads of the loop's Ray workers.

    Restarts the process once if need be: malloc reads its settings only when a process starts.
    """
    if any(os.environ.get(name) != value for name, value in WORKER_ENVIRONMENT.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | WORKER_ENVIRONMENT)
    torch.set_num_threads(threads())


def machine() -> str:
    """What the figures were measured on."""
    return (
        f"{os.cpu_count()} {platform.machine()} cores, {threads()} torch threads, no GPU used; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with `--quick`."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small repeats: does it run, not how fast")
    return parser


def in_a_process(benchmark: str, **arguments: object) -> dict[str, Any]:
    """What `<benchmark> --one '<arguments as JSON>'` prints last, as JSON, in a process that finds the tests' helpers.

    Ray Serve, for one, leaves threads behind that trouble a second Ray in the same process.
    """
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, benchmark, "--one", json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_alone(benchmark: Callable[[bool], Table | list[Table]], description: str | None) -> None:
    """The main function of a single benchmark: measure and print."""
    quick: bool = arguments(description).parse_args().quick
    become_like_a_worker()
    console = Console()
    console.print(machine(), highlight=False)
    tables = benchmark(quick)
    for table in [tables] if isinstance(tables, Table) else tables:
        console.print(table.rich())
