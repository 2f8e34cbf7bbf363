"""An export from beginning to end: find, prove, write, describe. `cli_export.py` calls it.

The folder is written aside and moved when it is whole.
"""

import tempfile
from pathlib import Path

from kto_ray.config import Dtype
from kto_ray.errors import UserError
from kto_ray.evaluate.report import save_png_grid
from kto_ray.export.card import PICTURE, Card
from kto_ray.export.evaluated import evaluated, held_out_prompts
from kto_ray.export.formats import FORMATS, Export
from kto_ray.export.published import find
from kto_ray.storage import Storage


def prepare(
    run: Storage,
    to: str,
    version: int | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
) -> Export:
    """Find out that an export is possible; nothing is written.

    Args:
        to: one of `FORMATS`.
        version: of the policy; None is the newest.
        model: where the base model lies, if it has moved.
        dtype: of the denoiser of a merged pipeline; None is that of the base model's files.

    Raises:
        UserError: see `find`; or a format that does not take this policy.
    """
    if dtype is not None and to != "merged":
        raise UserError(f"--dtype: {dtype} is for --to merged; --to {to} gives the weights as they were published")
    published = find(run, version, model)
    if why_not := FORMATS[to].refuses(published):
        raise UserError(f"--to: {to} {why_not}")
    return Export(published, to, dtype)


def folder_for(export: Export, out: str | None) -> Path:
    """Where it goes: a folder that is given, or one in the working directory, named after run, policy and format.

    Raises:
        UserError: there is something already.
    """
    folder = Path(out or f"{export.name}-{export.to}")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--out: {folder} is there already and not empty; give another folder")
    return folder


def write(export: Export, folder: Path, repository: str | None = None) -> list[Path]:
    """Write an export into a folder that is empty or not there; gives its files.

    Args:
        repository: where others will find it; it stands in the model card.

    Raises:
        UserError: it cannot be written, or see `Format.write`.
    """
    out = folder.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
            whole = Path(aside) / "whole"
            whole.mkdir()
            _fill(export, whole, repository or folder.name)
            whole.rename(out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror or error}") from error
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fill(export: Export, folder: Path, place: str) -> None:
    published, how = export.published, FORMATS[export.to]
    how.write(export, folder)
    prompts = held_out_prompts(published.run, published.config)
    found = evaluated(published.run, published.config, prompts, published.policy.version)
    if found and found.pairs:
        save_png_grid(found.pairs, folder / PICTURE, ("base", f"policy {published.policy.version}"))
    card = Card(export.name, published, how.is_whole, how.loading(export, place), found, prompts)
    (folder / "README.md").write_text(card.text(), encoding="utf-8")
