"""`kto-ray watch`: pages on which runs can be watched. `cli.py` puts it in its place."""

import click
from rich.console import Console

from kto_ray.errors import UserError


@click.command("watch")
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN...]")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8100, show_default=True, help="To listen on; 0: any that is free."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--public-url", help="What the link begins with, where a proxy stands in front; by default http://HOST:PORT."
)
def watch(runs: tuple[str, ...], port: int, host: str, public_url: str | None) -> None:
    """Show each RUN (its folder or URI) on a page: images as they are made, curves, health, who waits for whom.

    \b
    kto-ray watch runs/demo
    kto-ray watch runs/demo runs/mine --port 8200            # side by side
    kto-ray watch s3://bucket/runs/sd15
    ssh -L 8100:127.0.0.1:8100 machine                       # from elsewhere; then open the link as it was printed

    Runs may go on or have ended; nothing is written, and neither Ray nor a GPU is needed. Only the link that is printed
    opens the page.
    """
    from kto_ray.config import WatchPage
    from kto_ray.watch.reading import WatchedRun
    from kto_ray.watch.serving import watch

    if len({run.rstrip("/") for run in runs}) < len(runs):
        raise UserError("RUN: one of them is named twice")
    opened = [WatchedRun(run) for run in runs]
    names = [run.name for run in opened]
    for given, run in zip(runs, opened, strict=True):
        if names.count(run.name) > 1:  # two folders may have a run of the same name each
            run.name = given
    settings = WatchPage(port=port or None, host=host, public_url=public_url)
    console = Console(soft_wrap=True)
    watch(opened, settings, lambda text: console.print(text, markup=False, highlight=False))
