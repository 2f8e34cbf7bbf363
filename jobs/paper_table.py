"""The paper's Table 1 in shape: Diffusion-KTO against the base model, SFT and CSFT, all of the same labelled images.

    python jobs/paper_table.py data=pick_a_pic/*.parquet prompts.held_out=prompts.txt
    python jobs/paper_table.py --recipe mine.yaml data=thumbs/ data.held_out_share=0.02 rounds=4

Three runs on labelled images (`jobs/offline_kto.py`), one after the other, that differ in `train.objective` alone:
NAME-kto is that of the recipe, NAME-sft fine-tunes on the desirable, NAME-csft with the verdict in the prompt. Images
are encoded once. Then how often Diffusion-KTO's median image of each held-out prompt scores higher, by every scorer: as
a table, and as NAME-table.md and NAME-table.json beside the runs. With `--recipe paper`, the default, its 20 intervals
are of 500 steps unless `data.stream.steps` says otherwise: the paper's 10,000. The same command goes on where it was
ended.
"""

import argparse
import sys
from dataclasses import asdict

from rich.console import Console

from kto_ray.config import RunConfig, load
from kto_ray.errors import UserError
from kto_ray.evaluate.duels import BASE, Contestant, duels, markdown
from kto_ray.evaluate.evaluation import STAGE
from kto_ray.offline.loop import run_offline_kto
from kto_ray.rounds import Round
from kto_ray.storage import Storage

METHODS = {
    "kto": ("Diffusion-KTO", []),
    "sft": ("SFT", ["train.objective=sft"]),
    "csft": ("CSFT", ["train.objective=csft"]),
}
PAPER_STEPS = "data.stream.steps=500"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    args = parser.parse_args()
    console = Console(soft_wrap=True)
    try:
        configs = configs_of(args.recipe, args.overrides)
        versions = {name: int(run_offline_kto(config, console)["policy_version"]) for name, config in configs.items()}
        write(configs, versions, console)
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        return 2
    return 0


def configs_of(recipe: str, overrides: list[str]) -> dict[str, RunConfig]:
    """All checked before any of them runs."""
    if recipe == "paper" and not any(text.startswith("data.stream") for text in overrides):
        overrides = [*overrides, PAPER_STEPS]
    name = load(recipe, overrides).run
    return {method: load(recipe, [*overrides, f"run={name}-{method}", *more]) for method, (_, more) in METHODS.items()}


def write(configs: dict[str, RunConfig], versions: dict[str, int], console: Console) -> None:
    """The table, of what the runs have kept."""

    def evaluated(method: str, version: int, title: str) -> Contestant:
        run = Storage(configs[method].runs_folder) / configs[method].run
        return Contestant(title, Round(run / f"{STAGE}s" / f"{version:05}", STAGE))

    policies = {name: evaluated(name, versions[name], title) for name, (title, _) in METHODS.items()}
    kto, others = policies["kto"], [evaluated("kto", 0, BASE), policies["sft"], policies["csft"]]
    found = duels(kto, others, list(configs["kto"].label.scorers))
    table, folder = markdown(kto, found), Storage(configs["kto"].runs_folder)
    name = configs["kto"].run.removesuffix("-kto")
    folder.write(f"{name}-table.md", f"{table}\n".encode())
    figures = {title: {scorer: asdict(one) for scorer, one in by.items()} for title, by in found.items()}
    folder.write_json(f"{name}-table.json", figures)
    console.print(table, markup=False, highlight=False)
    console.print(f"wrote {folder}/{name}-table.md", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
