"""`kto-ray compare`: held-out figures of several runs, side by side. `cli.py` puts it in its place."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_ray.errors import UserError

ENDINGS = (".png", ".svg", ".html")


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...")
@click.option("--out", type=click.Path(dir_okay=False), help="Also write a chart (.png, .svg) or a page (.html).")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list with a row for each evaluation.")
def compare(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Show what held-out prompts say of the policies of each RUN (its folder or URI), over images drawn.

    \b
    kto-ray compare runs/demo runs/mine
    kto-ray compare runs/* --out comparison.html
    kto-ray compare runs/demo s3://bucket/runs/other --json

    Runs may still be going on. Intervals are of 95 %.
    """
    from kto_ray.evaluate import comparison
    from kto_ray.run_folder import RunFolder

    if out is not None and Path(out).suffix not in ENDINGS:
        raise UserError(f"--out: {out} ends in none of {', '.join(ENDINGS)}")
    if len({run.rstrip("/") for run in runs}) < len(runs):
        raise UserError("RUN: one of them is named twice")
    opened = [RunFolder(run) for run in runs]
    names = [run.name for run in opened]
    points = []
    for given, run in zip(runs, opened, strict=True):
        name = run.name if names.count(run.name) == 1 else given  # two folders may have a run of the same name each
        points += comparison.points_of(name, run.figures("round"), run.figures("evaluation"))
    if not points:
        raise UserError("RUN: none of them has evaluated a policy yet")
    if out is not None:
        kind = Path(out).suffix
        content = comparison.page(points).encode() if kind == ".html" else comparison.chart(points, kind[1:])  # type: ignore[arg-type]
        Path(out).write_bytes(content)
    if as_json:
        click.echo(json.dumps([point.as_row() for point in points], indent=1))
        return
    columns = comparison.figure_names(points)
    table = Table("run", "policy", "images", *(comparison.FIGURES.get(name, (name, 0))[0] for name in columns))
    for point in points:
        cells = (point.run, str(point.policy), f"{point.images:,}", *(comparison.shown(point, n) for n in columns))
        table.add_row(*map(Text, cells))
    console = Console(soft_wrap=True)
    console.print(table)
    if out is not None:
        console.print(f"written: {out}", markup=False, highlight=False)
