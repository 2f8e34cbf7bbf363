"""Online Diffusion-KTO: `python jobs/online_kto.py --recipe shapes_demo`, or the same behind `ray job submit`.

    python jobs/online_kto.py --recipe shapes_demo run=mine rounds=4 train.learning_rate=1e-4
    python jobs/online_kto.py --recipe sd15_lora --dry-run

The same command with the same run name continues the run, whatever ended it.
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
        "--recipe", default="shapes_demo", help=f"a YAML file, or one of: {', '.join(config.recipe_names())}"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and what it implies, and end"
    )
    parser.add_argument("--gpu", type=float, metavar="GB", help="memory of each GPU: short for cluster.gpu_gb=GB")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="dotted overrides, for instance train.objective.beta=2000"
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

        from kto_ray.loop import run_online_kto

        summary = run_online_kto(settings, console)
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        return 2
    final, base = summary["final"], summary["base"]
    found = []
    if "pass_rate" in base and "pass_rate" in final:  # a degenerate bar, or no scorer that votes, judges none
        found.append(f"held-out images that pass: {base['pass_rate']:.1%} -> {final['pass_rate']:.1%}")
    if "win_rate" in final:
        found.append(f"win rate vs base {final['win_rate']:.1%}")
    if summary["people"]:
        found.append(f"{summary['people']['answers']} answers of people")
    found.append(f"{summary['images']} images drawn in {summary['seconds']['total']:.0f} s")
    console.print("; ".join(found), highlight=False)
    console.print(f"{settings.runs_folder}/{settings.run}/report.html", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
