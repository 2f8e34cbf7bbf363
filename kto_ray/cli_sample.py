"""`kto-ray sample`: a picture of a policy, beside the base model's. `cli.py` puts it in its place."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from kto_ray.errors import UserError

if TYPE_CHECKING:
    from kto_ray.config import Device


@click.command("sample")
@click.argument("run")
@click.option("--prompt", required=True, help="What is to be drawn.")
@click.option("--policy", type=click.IntRange(min=0), help="Its version; by default the newest.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first picture.")
@click.option("--count", type=click.IntRange(1, 64), default=1, show_default=True, help="How many seeds, a row each.")
@click.option("--out", type=click.Path(dir_okay=False), help="A PNG, JPEG or WebP; by default ./RUN-policy-N-SEED.png.")
@click.option("--model", help="Folder or hub name of the base model, if it has moved.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def sample(
    run: str,
    prompt: str,
    policy: int | None,
    seed: int,
    count: int,
    out: str | None,
    model: str | None,
    device: "Device",
) -> None:
    """Draw a picture from a policy of RUN (its folder or URI), to the right of the base model's from the same seed.

    \b
    kto-ray sample runs/demo --prompt "a red circle on black"
    kto-ray sample s3://bucket/runs/sd15 --prompt "a fox in the snow" --policy 40 --seed 7 --count 4 --out fox.png

    It is drawn in this process, with the settings of the run's held-out images; no cluster is needed.
    """
    if out is not None and Path(out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out: {out} is none of .png, .jpg, .jpeg and .webp")
    from kto_ray.console import hush
    from kto_ray.storage import Storage

    hush()
    from kto_ray.export import picturing, published

    console = Console(soft_wrap=True)
    with console.status("proving policy and base model"):
        found = published.find(Storage(run), policy, model)
    version = found.policy.version
    file = Path(out or f"{found.config.run}-policy-{version}-{seed}.png")
    with console.status(f"drawing {2 * count} images"):
        pictures = picturing.drawn(found, prompt, range(seed, seed + count), device)
    try:
        picturing.side_by_side(*pictures).save(file)
    except OSError as error:
        raise UserError(f"--out: cannot write {file}: {error.strerror or error}") from error
    seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
    console.print(
        f"{file}: the base on the left, policy {version} ({found.policy.digest[:12]}) on the right, {seeds}",
        markup=False,
        highlight=False,
    )
