"""`kto-ray dataset`: labelled images from anywhere. `cli.py` puts it in its place."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_ray.errors import UserError

if TYPE_CHECKING:
    from kto_ray.config import Data
    from kto_ray.data.protocol import Preview
    from kto_ray.data.showing import Look
    from kto_ray.data.writing import Layout


@click.group("dataset")
def dataset() -> None:
    """Labelled images: what is there already to train on, and what a run has drawn."""


@dataset.command("show")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--sheet", default="contact_sheet.png", show_default=True, help="Where the contact sheet is written.")
@click.option("--each", type=click.IntRange(1, 200), default=32, show_default=True, help="Images of a class on it.")
def dataset_show(sources: tuple[str, ...], sheet: str, each: int) -> None:
    """Show what is in SOURCE: counts, balance, prompts, sizes, and a contact sheet of both classes.

    SOURCE is a file, folder or pattern, or what data.sources takes: "{kind: pairs, path: pairs/*.parquet}". Nothing is
    trained or prepared.
    """
    from kto_ray.data.showing import contact_sheet, look_at
    from kto_ray.data.sources import Several, source_of

    console = Console(soft_wrap=True)
    source = source_of(_as_data(sources))
    with console.status("counting"):
        previews = source.previews() if isinstance(source, Several) else [source.preview()]
    for preview in previews:
        _show_preview(preview, console)
    with console.status("looking at images"):
        found = look_at(source, each)
    _show_look(found, console)
    if found.thumbnails:
        contact_sheet(found, each).save(Path(sheet), "png")
        console.print(f"contact sheet: {sheet}", markup=False, highlight=False)


@dataset.command("export")
@click.argument("run")
@click.option("--to", required=True, type=click.Choice(["parquet", "imagefolder", "hf"]), help="The layout.")
@click.option("--out", help="A folder, new or empty; by default ./RUN-dataset.")
@click.option(
    "--labels", metavar="NAME", help="A label set of `kto-ray relabel`, in the place of the run's own verdicts."
)
def dataset_export(run: str, to: "Layout", out: str | None, labels: str | None) -> None:
    """Write the images that RUN (its folder or URI) has drawn in sealed rounds, and its verdicts, as a data set with a
    card.

    parquet: images in the rows, as hubs of data sets show them; imagefolder: images as files, with metadata.jsonl; hf:
    what load_from_disk of `datasets` opens.
    """
    from kto_ray.data.writing import export_dataset
    from kto_ray.storage import Storage

    console, opened = Console(soft_wrap=True), Storage(run)
    folder = Path(out or f"{opened.uri.rstrip('/').rpartition('/')[2]}-dataset")
    with console.status(f"writing {folder}"):
        written = export_dataset(opened, to, folder, labels)
    size = sum(file.stat().st_size for file in written.files)
    console.print(
        f"{written.images:,} images, {written.desirable:,} desirable, {written.undesirable:,} undesirable: {folder} "
        f"({len(written.files):,} files, {size / 1e6:,.2f} MB)",
        markup=False,
        highlight=False,
    )


def _as_data(sources: Sequence[str]) -> "Data":
    from kto_ray.config import load, yaml12

    listed: list[Any] = []
    for text in sources:
        try:
            listed.append(yaml12.load(text) if text.startswith("{") else text)
        except yaml12.YAMLError as error:
            raise UserError(f"SOURCE: {text!r} is not YAML: {error}") from error
    data = load(None, [f"data={yaml12.dump(listed)}"]).data
    assert data
    return data


def _show_preview(preview: "Preview", console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{preview.where} ({preview.kind})")
    say("  columns: " + ", ".join(f"{what}: {name}" for what, name in preview.columns.items()))
    rows = "unknown" if preview.rows is None else f"{preview.rows:,}"
    say(f"  images: {rows}")
    if preview.verdicts is not None:
        yes, no, none = (preview.verdicts[name] for name in ("desirable", "undesirable", "none"))
        share = f" ({yes / (yes + no):.1%} of those with a verdict)" if yes + no else ""
        say(f"  desirable: {yes:,}{share}, undesirable: {no:,}, no verdict: {none:,}")
    for what, value in preview.facts.items():
        say(f"  {what}: {value}")
    for what, number in preview.wrong.items():
        examples = preview.examples.get(what, [])
        say(f"  ! {number:,} {what}" + (f", for instance {', '.join(examples)}" if examples else ""))
    table = Table("id", "image", "prompt", "verdict", "who")
    for row in preview.first.to_pylist():
        image = "/".join(row["uri"].rsplit("/", 2)[-2:]) if row["uri"] else f"{len(row['image']):,} bytes"
        verdict = {True: "desirable", False: "undesirable", None: "none"}[row["desirable"]]
        table.add_row(*map(Text, (row["id"], image, row["prompt"][:80], verdict, row["who"] or "")))
    console.print(table)


def _show_look(found: "Look", console: Console) -> None:
    from kto_ray.data.showing import quantiles

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    if found.prompt_words:
        low, middle, high, top = quantiles(found.prompt_words)
        rows = f"{len(found.prompt_words):,} rows"
        say(f"words in a prompt ({rows}): {low} to {top}, median {middle}, 95 % have up to {high}")
    sizes = ", ".join(f"{width}x{height}: {number}" for (width, height), number in found.sizes.most_common(8))
    say(f"sizes (of a sample of {found.sizes.total()} images): {sizes or 'none could be read'}")
    say(f"formats: {', '.join(f'{name}: {number}' for name, number in sorted(found.formats.items())) or 'none'}")
    for name, why in list(found.unreadable.items())[:5]:
        say(f"  ! cannot be read: {name}: {why}")
    if len(found.unreadable) > 5:
        say(f"  ! and {len(found.unreadable) - 5} more of the sample")
    if found.pictures:
        table = Table("pictures of the sample", *found.pictures)
        names = sorted({name for figures in found.pictures.values() for name in figures})
        for name in names:
            figures = (figures.get(name) for figures in found.pictures.values())
            table.add_row(name.removeprefix("pictures/"), *("" if f is None else f"{f:.3f}" for f in figures))
        console.print(table)
