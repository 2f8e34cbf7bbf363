"""`kto-ray export`: a published policy as files that other programs load. `cli.py` puts it in its place."""

from typing import TYPE_CHECKING

import click
from rich.console import Console

if TYPE_CHECKING:
    from kto_ray.config import Dtype


@click.command("export")
@click.argument("run")
@click.option("--policy", type=click.IntRange(min=0), help="Its version; by default the newest.")
@click.option(
    "--to", required=True, type=click.Choice(["diffusers", "kohya", "merged", "comfyui"]), help="See docs/export.md."
)
@click.option("--out", help="A folder, new or empty; by default ./RUN-policy-N-FORMAT.")
@click.option("--push", metavar="REPO", help="Also upload it to this repository of a model hub, OWNER/NAME.")
@click.option("--model", help="Folder or hub name of the base model, if it has moved.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the denoiser of --to merged; by default that of the base model's files.",
)
def export(
    run: str,
    policy: int | None,
    to: str,
    out: str | None,
    push: str | None,
    model: str | None,
    dtype: "Dtype | None",
) -> None:
    """Write a published policy of RUN (its folder or URI) for other programs, with a model card."""
    from kto_ray.export import exporting
    from kto_ray.storage import Storage

    console = Console(soft_wrap=True)
    with console.status("proving policy and base model"):
        asked = exporting.prepare(Storage(run), to, policy, model, dtype)
    folder = exporting.folder_for(asked, out)
    if push:
        from kto_ray.export import pushing

        pushing.open_repository(push)
    with console.status(f"writing {folder}"):
        files = exporting.write(asked, folder, push)
    ref = asked.published.policy
    console.print(f"policy {ref.version} ({ref.digest[:12]}) as {to}:", markup=False, highlight=False)
    for file in files:
        console.print(f"  {file} ({file.stat().st_size / 1e6:,.2f} MB)", markup=False, highlight=False)
    if push:
        with console.status(f"pushing to {push}"):
            address = pushing.push(folder, push, f"Policy {ref.version} of {asked.published.config.run}")
        console.print(f"pushed: {address}", markup=False, highlight=False)
