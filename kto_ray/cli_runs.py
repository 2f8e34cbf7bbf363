"""`kto-ray runs`: what runs have on a cluster. `cli.py` puts it in its place."""

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kto_ray.holdings import Holding

ADDRESS = click.option(
    "--address", default=None, help="Of the cluster's head; by default RAY_ADDRESS, or the one on this machine."
)


@click.group("runs")
def runs() -> None:
    """What runs have on a cluster, and what they left there. To be called on one of its machines."""


@runs.command("list")
@ADDRESS
def runs_list(address: str | None) -> None:
    """Show all runs that have something on the cluster: applications, driver, and what replicas hold."""
    from kto_ray.holdings import holdings, joined

    with joined(address):
        _show(holdings())


@runs.command("clean")
@click.argument("names", nargs=-1)
@ADDRESS
@click.option("--living", is_flag=True, help="Also of runs that have a driver; it fails then.")
def runs_clean(names: tuple[str, ...], address: str | None, living: bool) -> None:
    """End what runs NAMES, by default all that have no driver any more, have on the cluster."""
    from kto_ray.holdings import clean, joined

    if living and not names:
        raise click.UsageError("--living is for runs that are named")
    with joined(address):
        ended = clean(names, living)
    _show(ended)
    Console(soft_wrap=True).print(f"ended: {len(ended)}", highlight=False)


def _show(holdings: Sequence["Holding"]) -> None:
    table = Table("run", "driver", "since", "applications", "replicas hold", "folder")
    for holding in holdings:
        since = datetime.datetime.fromtimestamp(holding.since or 0).isoformat(" ", "seconds") if holding.since else ""
        applications = "\n".join(f"{name}: {state.lower()}" for name, state in holding.applications.items())
        held = ", ".join(f"{amount:g} {kind}" for kind, amount in holding.resources.items() if amount)
        job = f", job {holding.job}" if holding.job else ""
        cells = (holding.run, f"{holding.driver}{job}", since, applications, held, holding.uri or "")
        table.add_row(*map(Text, cells))
    Console().print(table)
