"""`kto-ray init`: a recipe of one's own. `cli.py` puts it in its place; `beginning.py` writes the text."""

from pathlib import Path

import click
from rich.console import Console

from kto_ray.errors import UserError


@click.command("init")
@click.option("--model", help="shapes (the embedded world), a folder, a .safetensors file, or a name on the model hub.")
@click.option("--judge", help="A scorer, people, or my_module:MyScorer.")
@click.option("--gpus", type=click.IntRange(min=0), help="How many there are, in the whole cluster.")
@click.option("--gpu-gb", type=float, help="Memory of each.")
@click.option("--prompts", help="A file of prompts to train on; not needed for shapes.")
@click.option("--held-out", help="A file of prompts that are never trained on.")
@click.option("--name", default="mine", show_default=True, help="Of the run.")
@click.option("--out", default="mine.yaml", show_default=True, help="The recipe's file, which must not be there yet.")
def init(
    model: str | None,
    judge: str | None,
    gpus: int | None,
    gpu_gb: float | None,
    prompts: str | None,
    held_out: str | None,
    name: str,
    out: str,
) -> None:
    """Write a recipe, with comments, for a model, a judge and the hardware that is there. What is not given is asked.

    \b
    kto-ray init
    kto-ray init --model shapes --judge people --gpus 0
    kto-ray init --model stabilityai/stable-diffusion-xl-base-1.0 --judge pickscore --gpus 2 --gpu-gb 24 \\
        --prompts prompts.txt --held-out held_out.txt --out sdxl.yaml
    """
    from kto_ray.beginning import JUDGES, Answers, write_recipe

    file = Path(out)
    if file.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--out: {out} does not end in .yaml")
    if file.exists():
        raise UserError(f"--out: {out} is there already; give another name")
    if model is None:
        model = str(click.prompt("Which model (a folder, a file, a hub name)", default="shapes"))
    if judge is None:
        known = {key: text for key, text in JUDGES.items() if key != "shapes" or model == "shapes"}
        for key, text in known.items():
            click.echo(f"  {key:13} {text}")
        judge = str(click.prompt("Who judges", default=next(iter(known)) if model == "shapes" else "pickscore"))
    if gpus is None:
        gpus = int(click.prompt("How many GPUs", default=0 if model == "shapes" else 2, type=click.IntRange(min=0)))
    if gpus and gpu_gb is None:
        gpu_gb = float(click.prompt("GB of memory of each", default=24.0, type=float))
    if model != "shapes":
        prompts = prompts or str(click.prompt("File of prompts to train on", default="prompts.txt"))
        held_out = held_out or str(click.prompt("File of held-out prompts", default="held_out.txt"))
    files = (prompts, held_out) if prompts and held_out else None
    file.write_text(write_recipe(Answers(model, judge, gpus, gpu_gb, name, files)), encoding="utf-8")
    console = Console(soft_wrap=True)
    for line in (f"written: {out}", f"check it with: kto-ray run --recipe {out} --dry-run"):
        console.print(line, markup=False, highlight=False)
    if judge in ("image_reward", "hpsv2"):
        console.print(f"its scorer needs: kto-ray env build {judge}", markup=False, highlight=False)
