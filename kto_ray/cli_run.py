"""`kto-ray run`: a recipe, its overrides, and the loop. `cli.py` puts it in its place; `jobs/online_kto.py` is it, too.

The command's own lines go to standard output, an error among them, so that bars and sentences keep their order; what
the libraries below say goes where `console.py` puts it. The exit codes are documented in docs/cli.md.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from kto_ray.errors import UserError

if TYPE_CHECKING:
    from kto_ray.config import RunConfig

OFFLINE = "offline"
"""What a job says as `obj` that is for labelled images alone."""
USER_ERROR = 2
INTERRUPTED = 130
"""As a shell has it: 128 and the number of SIGINT."""

RECIPE = click.option(
    "--recipe", default="shapes_demo", show_default=True, help="A YAML file, or the name of a built-in recipe."
)
GPU = click.option("--gpu", type=float, metavar="GB", help="Memory of each GPU: short for cluster.gpu_gb=GB.")
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")


@click.command("run", context_settings={"help_option_names": ["-h", "--help"]})
@RECIPE
@click.option("--dry-run", is_flag=True, help="Check everything, print the resolved configuration and what it implies.")
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray, its actors and libraries print, too.")
@GPU
@OVERRIDES
@click.pass_context
def run(
    context: click.Context, recipe: str, dry_run: bool, verbose: bool, gpu: float | None, overrides: tuple[str, ...]
) -> None:
    """Run, or continue, Diffusion-KTO: online, or with `data` on labelled images that are there already. The same run
    name continues the run, whatever ended it.

    \b
    kto-ray run                                     the embedded world, on two CPU cores
    kto-ray run --recipe shapes_demo run=mine rounds=4 train.learning_rate=1e-4
    kto-ray run --recipe sd15_lora --dry-run --gpu 24
    kto-ray run --recipe mine.yaml runs_folder=s3://bucket/runs
    kto-ray run --recipe sd15_lora data=liked_and_disliked/ data.held_out_share=0.02

    It joins the Ray cluster that RAY_ADDRESS names, or starts one on this machine. What Ray, its actors and libraries
    print goes to logs/ in the run's folder. Exit codes: 0 done, 1 a failure that nobody foresaw (with its traceback),
    2 an error of the user's (a sentence), 130 interrupted.
    """
    from kto_ray import config

    here = str(Path.cwd())
    if here not in sys.path:  # unlike `python`, a command does not look for plug-ins where it is called
        sys.path.append(here)
    console = Console(soft_wrap=True)
    try:
        settings = config.load(recipe, [*overrides, *card(gpu)])
        if dry_run:
            from kto_ray.preflight import describe

            console.print(describe(settings), markup=False, highlight=False)
        else:
            _run(settings, verbose, offline=context.obj == OFFLINE)
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        context.exit(USER_ERROR)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here", highlight=False)
        context.exit(INTERRUPTED)


def card(gpu: float | None) -> list[str]:
    """The override that `--gpu` is short for."""
    return [f"cluster.gpu_gb={gpu}"] if gpu is not None else []


def _run(settings: "RunConfig", verbose: bool, offline: bool) -> None:
    from kto_ray import config
    from kto_ray.console import only_own_lines
    from kto_ray.storage import Storage

    offline = offline or settings.offline
    with only_own_lines(Storage(settings.runs_folder) / settings.run, verbose) as (console, elsewhere):
        for name, value in config.implied(settings).items():
            console.print(f"{name}: {value}", highlight=False)

        # Each brings in what only it needs.
        if offline:
            from kto_ray.offline.loop import run_offline_kto as learn
        else:
            from kto_ray.loop import run_online_kto as learn

        try:
            summary = learn(settings, console)
        except BaseException:
            if elsewhere.place:
                console.print(f"what others than the run printed: {elsewhere.place}", markup=False, highlight=False)
            raise
        console.print(in_a_sentence(summary, offline), highlight=False)
        console.print(f"{settings.runs_folder}/{settings.run}/report.html", highlight=False)


def in_a_sentence(summary: Mapping[str, Any], offline: bool = False) -> str:
    """What a run came to, of its `summary.json`."""
    final, base = summary["final"], summary["base"]
    found = []
    if "pass_rate" in base and "pass_rate" in final:  # a degenerate bar, or no scorer that votes, judges none
        found.append(f"held-out images that pass: {base['pass_rate']:.1%} -> {final['pass_rate']:.1%}")
    if "win_rate" in final:
        found.append(f"win rate vs base {final['win_rate']:.1%}")
    if summary["people"]:
        found.append(f"{summary['people']['answers']} answers of people")
    seconds = summary["seconds"]["total"]
    if not offline:
        found.append(f"{summary['images']} images drawn in {seconds:.0f} s")
    else:
        ledger = summary["ledger"]
        found.append(f"trained on {ledger['trained']} of {ledger['generated']} labelled images in {seconds:.0f} s")
    return "; ".join(found)
