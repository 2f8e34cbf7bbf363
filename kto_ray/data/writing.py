"""A run's images and verdicts as a data set that others read, with a card: `kto-ray dataset export`.

    parquet       data/train-00000-of-00012.parquet   images in the rows; what hubs of data sets show and load
    imagefolder   train/metadata.jsonl, train/*.png   images as files
    hf            data-00000-of-00012.arrow, ...      what `datasets.load_from_disk` opens

Rows are those that the source of runs gives (`runs.py`), a file a round, but for images of which nothing could be found
out. The project's own sources read all three again. `datasets` is not needed to write them.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

import kto_ray
from kto_ray.config import RunConfig, yaml12
from kto_ray.config.data import RunData
from kto_ray.data.runs import RunSource
from kto_ray.errors import UserError
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage

Layout = Literal["parquet", "imagefolder", "hf"]
SCORE = "score_"
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
COLUMNS = {
    "image": "the image, PNG",
    "prompt": "what it was drawn for",
    "label": "whether it is desirable; null: no verdict",
    "labeler": "who said so",
    "sample": "its id in the run",
    "prompt_id": "the prompt's id in the run",
    "seed": "of its noise",
    "policy": "version of the policy that drew it; 0 is the base model",
    "policy_digest": "SHA-256 of that policy's weights",
    f"{SCORE}NAME": "what scorer NAME says of it; null where it failed",
}
"""What stands in a row, in this order."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    images: int
    desirable: int
    undesirable: int
    files: Sequence[Path]


def export_dataset(run: Storage, to: Layout, out: Path, labels: str | None = None) -> Written:
    """Write the sealed rounds of a run into a folder that is empty or not there.

    Args:
        labels: a label set of the run, in the place of its own verdicts.

    Raises:
        UserError: there is no such run or label set, its pixels were not kept, it has drawn no images, or the folder
            cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is there already and not empty; give another folder")
    config = saved_config(run)
    rows = RunSource(RunData(run=run.uri, labels=labels))
    scorers = list(config.label.scorers)
    schema, folder = schema_of(scorers), out.absolute()
    parts = [part for part in rows.parts() if part.rows]
    if not parts:
        raise UserError(f"RUN: {run} has drawn no images to train on, so that there is no data set of them")
    counts = Counter[Any]()

    def tables(number: int) -> Iterator[pa.Table]:
        """Of a part."""
        for table in rows.read(parts[number]):
            counts.update(table["desirable"].to_pylist())
            yield pa.Table.from_pylist([_row(row, scorers) for row in table.to_pylist()], schema)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            whole = Path(aside) / "whole"
            whole.mkdir()
            LAYOUTS[to](whole, len(parts), tables, schema)
            (whole / "README.md").write_text(card(config, to, counts, scorers, labels), encoding="utf-8")
            whole.rename(folder)
    except OSError as error:
        raise UserError(f"--out: cannot write {folder}: {error.strerror or error}") from error
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return Written(counts.total(), counts[True], counts[False], files)


def schema_of(scorers: Sequence[str]) -> pa.Schema:
    """Of the rows, with what `datasets` keeps of them in its metadata: which column is an image."""
    types: dict[str, pa.DataType] = dict.fromkeys(COLUMNS, pa.string())
    del types[f"{SCORE}NAME"]
    types |= {"image": IMAGE, "label": pa.bool_(), "seed": pa.int64(), "policy": pa.int32()}
    types |= {f"{SCORE}{name}": pa.float64() for name in scorers}
    return pa.schema(list(types.items()), {"huggingface": json.dumps({"info": {"features": _features(types)}})})


def _features(types: dict[str, pa.DataType]) -> dict[str, Any]:
    """As `datasets` writes them down."""
    names = {pa.string(): "string", pa.bool_(): "bool", pa.float64(): "float64", pa.int32(): "int32"}
    names |= {pa.int64(): "int64"}
    return {
        name: {"_type": "Image"} if kind == IMAGE else {"dtype": names[kind], "_type": "Value"}
        for name, kind in types.items()
    }


def _row(labelled: dict[str, Any], scorers: Sequence[str]) -> dict[str, Any]:
    """Of a row of `LABELLED`."""
    known = json.loads(labelled["metadata"])
    row = {name: known[name] for name in ("sample", "prompt_id", "seed", "policy", "policy_digest")}
    row |= {"prompt": labelled["prompt"], "label": labelled["desirable"], "labeler": labelled["who"]}
    row["image"] = {"bytes": labelled["image"], "path": f"{known['sample']}.png"}
    return row | {f"{SCORE}{name}": known["scores"].get(name) for name in scorers}


# -- layouts ----------------------------------------------------------------------------------------------------------

Tables = Callable[[int], Iterator[pa.Table]]


def _write_parquet(folder: Path, parts: int, tables: Tables, schema: pa.Schema) -> None:
    (folder / "data").mkdir()
    for part in range(parts):
        name = f"train-{part:05}-of-{parts:05}.parquet"
        with pq.ParquetWriter(folder / "data" / name, schema) as writer:
            for table in tables(part):
                writer.write_table(table)


def _write_imagefolder(folder: Path, parts: int, tables: Tables, _schema: pa.Schema) -> None:
    (folder / "train").mkdir()
    with (folder / "train" / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for part in range(parts):
            for table in tables(part):
                for row in table.to_pylist():
                    image = row.pop("image")
                    (folder / "train" / image["path"]).write_bytes(image["bytes"])
                    lines.write(json.dumps({"file_name": image["path"], **row}, ensure_ascii=False) + "\n")


def _write_saved(folder: Path, parts: int, tables: Tables, schema: pa.Schema) -> None:
    names, digest = [f"data-{part:05}-of-{parts:05}.arrow" for part in range(parts)], hashlib.sha256()
    for part, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in tables(part):
                writer.write_table(table)
                digest.update("".join(table["sample"].to_pylist()).encode())
    info: dict[str, Any] = {"citation": "", "description": "", "homepage": "", "license": ""}
    info |= {"features": json.loads(schema.metadata[b"huggingface"])["info"]["features"]}
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest.hexdigest()[:16],
        **dict.fromkeys(("_format_columns", "_format_type")),
        **{"_format_kwargs": {}, "_output_all_columns": False, "_split": "train"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "state.json").write_text(json.dumps(state, indent=2))


LAYOUTS: dict[Layout, Callable[[Path, int, Tables, pa.Schema], None]] = {
    "parquet": _write_parquet,
    "imagefolder": _write_imagefolder,
    "hf": _write_saved,
}

# -- the card ---------------------------------------------------------------------------------------------------------

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
"""As hubs name them, below so many images."""
LOADING = {
    "parquet": 'load_dataset("parquet", data_files="data/*.parquet", split="train")',
    "imagefolder": 'load_dataset("imagefolder", data_dir=".", split="train")',
    "hf": 'load_from_disk(".")',
}


def card(config: RunConfig, to: Layout, counts: Counter[Any], scorers: Sequence[str], labels: str | None) -> str:
    """README.md, with front matter as hubs of data sets read it."""
    images = counts.total()
    front: dict[str, Any] = {
        "pretty_name": f"Images of the run {config.run}, and verdicts on them",
        "task_categories": ["text-to-image"],
        "tags": ["kto", "unpaired-preference", "kto-ray"],
        "size_categories": [next((name for most, name in SIZES.items() if images < most), "n>1M")],
    }
    if to == "parquet":
        files = [{"split": "train", "path": "data/train-*.parquet"}]
        front["configs"] = [{"config_name": "default", "data_files": files}]
    who = f"the label set `{labels}`" if labels else f"labeler `{config.label.labeler}`"
    judges = ", ".join(f"`{name}`" for name in config.label.voting)
    described = {name: what for name, what in COLUMNS.items() if not name.startswith(SCORE)}
    described |= {f"{SCORE}{name}": f"what scorer `{name}` says of it; null where it failed" for name in scorers}
    parts = [
        f"---\n{yaml12.dump(front)}---",
        f"# Images of the run {config.run}, and verdicts on them",
        f"Drawn by `{config.model.name}` and the policies that kto-ray trained of it, round after round; judged by "
        f"{who}" + (f", from the scores of {judges}" if judges else "") + ".",
        "| images | desirable | undesirable | no verdict |\n| --- | --- | --- | --- |\n"
        f"| {images:,} | {counts[True]:,} | {counts[False]:,} | {counts[None]:,} |",
        "## Columns",
        "| | |\n| --- | --- |\n" + "\n".join(f"| `{name}` | {what} |" for name, what in described.items()),
        "## How to load it",
        f"```python\nfrom datasets import {LOADING[to].partition('(')[0]}\n\ndataset = {LOADING[to]}\n```",
        "With kto-ray: `kto-ray dataset show .`, and `data=...` to train on it.",
        f"Exported by kto-ray {kto_ray.__version__}. What the base model's licence says of its images holds.",
    ]
    return "\n\n".join(parts) + "\n"
