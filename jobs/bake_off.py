"""Which objective gets the most out of a verdict: `python jobs/bake_off.py`, or the same behind `ray job submit`.

    python jobs/bake_off.py --seeds 0 1 2 3 4                 # everything: many hours on two cores
    python jobs/bake_off.py --tasks follow --seeds 0 1        # a part of it
    python jobs/bake_off.py --tune --methods nft              # the tuning runs of a method

Runs methods x tasks x seeds at an equal budget, each on one CPU of whatever cluster there is, and writes
`bake_off.html`, `bake_off.json` and `bake_off.md`. The same command goes on where it was ended.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kto_ray.bake_off import page
from kto_ray.bake_off.methods import METHODS
from kto_ray.bake_off.planning import Cell, Results, best_setting, cells, require_known, tuning_cells, tuning_rates
from kto_ray.bake_off.running import Row, run_cells
from kto_ray.bake_off.summary import Curve, curve_of, to_json
from kto_ray.bake_off.tasks import TASKS
from kto_ray.cluster import connected
from kto_ray.config import Cluster
from kto_ray.errors import UserError
from kto_ray.storage import to_json as as_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), metavar="SEED")
    parser.add_argument("--rounds", type=int, help="cut to so many rounds; default: the task's")
    parser.add_argument("--every", type=int, default=2, help="rounds between evaluations")
    parser.add_argument("--tune", action="store_true", help="every setting of the methods' grids, on the first task")
    parser.add_argument("--at-once", type=int, help="runs at a time; default: the CPUs of the cluster")
    parser.add_argument("--out", type=Path, default=Path("runs/bake_off"))
    args = parser.parse_args()
    console, results = Console(soft_wrap=True), Results(args.out)
    try:
        require_known("--tasks", args.tasks, TASKS)
        require_known("--methods", args.methods, METHODS)
        wanted = cells(args.tasks, args.methods, args.seeds, args.rounds)
        if args.tune:
            wanted = tuning_cells(args.methods)
        for cell in wanted:  # all checked before any of them runs
            cell.config()
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        return 2
    run(wanted, args.every, results, args.at_once, console)
    write(results, args.out, args.rounds, console)
    return 0


def run(wanted: list[Cell], every: int, results: Results, at_once: int | None, console: Console) -> None:
    """Run what is missing, with a bar over the rounds of all of it."""
    missing = [cell for cell in wanted if results.read(cell) is None]
    console.print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done", highlight=False)
    if not missing:
        return
    began, rounds = time.monotonic(), sum(cell.config().rounds for cell in missing)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with connected(Cluster()), Progress(*columns, console=console) as progress:
        bar = progress.add_task("rounds", total=rounds)

        def on_row(cell: Cell, row: Row) -> None:
            progress.update(bar, advance=1 if row["round"] else 0)
            if (evaluation := row["evaluation"]) is not None:
                rate = evaluation["pass_rate"]["value"]
                progress.console.print(f"{cell.name}, round {row['round']}: {rate:.1%} pass", highlight=False)

        run_cells(missing, every, results, on_row, at_once or math.floor(ray.cluster_resources()["CPU"]))
    console.print(f"{len(missing)} runs in {time.monotonic() - began:.0f} s", highlight=False)


def write(results: Results, out: Path, rounds: int | None, console: Console) -> None:
    """Page, table and figures of everything that is known."""
    seeds = {int(path.stem.rpartition("-")[2]) for path in results.folder.glob("*.json")}
    curves: list[Curve] = []
    for task in TASKS:
        for method in METHODS:
            found = {seed: results.read(Cell(task, method, seed, "", rounds)) for seed in sorted(seeds)}
            runs: dict[int, Any] = {seed: result["rows"] for seed, result in found.items() if result}
            if runs:
                curves.append(curve_of(task, method, runs))
    tuning = tuning_rates(results)
    (out / "bake_off.json").write_text(as_json(to_json(curves, tuning)) + "\n")
    if curves:
        (out / "bake_off.html").write_text(page.render(curves, tuning))
        (out / "bake_off.md").write_text(page.markdown(curves))
        (out / "bake_off.png").write_bytes(page.draw_curves(curves, "png"))
    for method, rates in tuning.items():
        best = best_setting(rates)
        shown = ", ".join(f"{rate:.1%}" for rate in rates[best])
        console.print(f"{method}: best of {len(rates)} settings is {best} ({shown})", highlight=False)
    console.print(f"wrote {out}/bake_off.*", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
