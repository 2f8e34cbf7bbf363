"""Diffusion-KTO on labelled images that are there already: in folders, tables, logs, or runs.

    python jobs/offline_kto.py --recipe paper data=pick_a_pic/*.parquet
    python jobs/offline_kto.py --recipe sd15_lora data.sources=thumbs data.held_out_share=0.02 rounds=50 --dry-run

The same command with the same run name continues the run, whatever ended it. `kto-ray dataset show` looks at the data
first; docs/offline.md says what they may be.
"""

import argparse
import logging
import sys

from rich.console import Console

from kto_ray import config
from kto_ray.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default="shapes_offline", help=f"a YAML file, or one of: {', '.join(config.recipe_names())}"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what it implies, and end"
    )
    parser.add_argument("--gpu", type=float, metavar="GB", help="memory of each GPU: short for cluster.gpu_gb=GB")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="dotted overrides, for instance data.stream.steps=500"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(soft_wrap=True)
    try:
        card = [f"cluster.gpu_gb={args.gpu}"] if args.gpu is not None else []
        settings = config.load(args.recipe, [*args.overrides, *card])
        if args.dry_run:
            from kto_ray.preflight import describe

            console.print(describe(settings), markup=False, highlight=False)
            return 0
        for name, value in config.implied(settings).items():
            console.print(f"{name}: {value}", highlight=False)

        from kto_ray.offline.loop import run_offline_kto

        summary = run_offline_kto(settings, console)
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        return 2
    final, base = summary["final"], summary["base"]
    found = []
    if "pass_rate" in base and "pass_rate" in final:  # a degenerate bar, or no scorer that votes, judges none
        found.append(f"held-out images that pass: {base['pass_rate']:.1%} -> {final['pass_rate']:.1%}")
    if "win_rate" in final:
        found.append(f"win rate vs base {final['win_rate']:.1%}")
    ledger = summary["ledger"]
    seconds = summary["seconds"]["total"]
    found.append(f"trained on {ledger['trained']} of {ledger['generated']} labelled images in {seconds:.0f} s")
    console.print("; ".join(found), highlight=False)
    console.print(f"{settings.runs_folder}/{settings.run}/report.html", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
