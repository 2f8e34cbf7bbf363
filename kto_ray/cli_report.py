"""`kto-ray report`: the report of a run, also of one that goes on. `cli.py` puts it in its place."""

import io
from pathlib import Path

import click
from rich.console import Console

from kto_ray.errors import UserError


@click.command("report")
@click.argument("run")
@click.option("--out", type=click.Path(dir_okay=False), help="An HTML file; by default ./RUN-report.html.")
@click.option("--picture", type=click.Path(dir_okay=False), help="Also write the before/after picture, a PNG.")
def report(run: str, out: str | None, picture: str | None) -> None:
    """Write the report of RUN (its folder or URI) as it is now; a run writes its own, report.html, at its end.

    \b
    kto-ray report runs/demo
    kto-ray report s3://bucket/runs/sd15 --out sd15.html --picture sd15.png
    """
    from kto_ray.evaluate.evaluation import FRESH_STAGE, Evaluation
    from kto_ray.evaluate.report import save_png_grid
    from kto_ray.evaluate.summary import results_of
    from kto_ray.export.evaluated import held_out_prompts
    from kto_ray.rounds import RoundStore
    from kto_ray.run_folder import RunFolder

    opened = RunFolder(run)
    config, folder, ended = opened.config, opened.storage, opened.summary
    if not opened.figures("evaluation"):
        raise UserError(f"RUN: {folder} has evaluated no policy yet, not even the base: there is nothing to report")
    prompts = held_out_prompts(folder, config)
    fresh = Evaluation(config, folder, prompts, True) if len(opened.figures(FRESH_STAGE)) > 1 else None
    results = results_of(
        *(config, folder, opened.figures, RoundStore(folder), Evaluation(config, folder, prompts), fresh),
        seconds=ended["seconds"] if ended else {},
        finished=ended is not None,
    )
    file = Path(out or f"{config.run}-report.html")
    file.write_text(results.report, encoding="utf-8")
    written = [file]
    if picture is not None:
        if not results.pairs:
            raise UserError(f"--picture: {folder} has no images any more to show (keep_pixels)")
        drawn = io.BytesIO()
        save_png_grid(results.pairs, drawn)
        Path(picture).write_bytes(drawn.getvalue())
        written.append(Path(picture))
    Console(soft_wrap=True).print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False)
