"""The sources that `data:` of a configuration names, by kind; and which kind it is that lies at a path.

    source_of(config.data) -> Source

A new kind is a section in `config/data.py`, a file beside this one, and a line below.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from kto_ray.config.data import (
    AutoData,
    Data,
    FoldersData,
    HuggingFaceData,
    ImageFolderData,
    PairsData,
    PaperData,
    RatingsData,
    RunData,
    TableData,
    VotesData,
    WebDatasetData,
)
from kto_ray.data.columns import usual
from kto_ray.data.files import find, listed
from kto_ray.data.folders import DISLIKED, LIKED
from kto_ray.data.formats import FORMATS
from kto_ray.data.imagefolder import NAMES
from kto_ray.data.pairs import LABELS
from kto_ray.data.paper import BOTH, LOSE, SPELLINGS, WIN
from kto_ray.data.protocol import Part, Preview, Source
from kto_ray.data.rows import FileRows
from kto_ray.data.webdataset import TARS
from kto_ray.errors import UserError
from kto_ray.plugins import load_plugin

SOURCES = {
    "table": "kto_ray.data.table:TableSource",
    "paper": "kto_ray.data.paper:PaperSource",
    "pairs": "kto_ray.data.pairs:PairsSource",
    "ratings": "kto_ray.data.ratings:RatingsSource",
    "folders": "kto_ray.data.folders:FoldersSource",
    "imagefolder": "kto_ray.data.imagefolder:ImageFolderSource",
    "webdataset": "kto_ray.data.webdataset:WebDatasetSource",
    "hugging_face": "kto_ray.data.hugging_face:HuggingFaceSource",
    "votes": "kto_ray.data.votes:VotesSource",
    "run": "kto_ray.data.runs:RunSource",
}
"""What reads each kind."""


def source_of(data: Data) -> Source:
    """What `data.sources`, or `data.mix`, names, one after the other.

    Raises:
        UserError: nothing at a path is known.
    """
    found = [make_source(settings) for settings in data.named]
    return found[0] if len(found) == 1 else Several(found)


def make_source(settings: Any) -> Source:
    """The source that a section of `config/data.py` describes."""
    known = kind_at(settings.path) if isinstance(settings, AutoData) else settings
    made: Source = load_plugin("data.sources", known.kind, SOURCES)(known)
    return made


def kind_at(path: str) -> Any:
    """The settings of whatever lies at a path, by its layout, names and columns.

    Raises:
        UserError: it is nothing that is known.
    """
    field = "data.sources"
    if (there := listed(path, field)) and (settings := _of_folder(path, {name.lower() for name in there}, field)):
        return settings
    if path.lower().endswith(TARS) or (there and _has(path, TARS, field)):
        return WebDatasetData(path=path)
    if there and not _has(path, tuple(FORMATS), field):
        raise UserError(
            f"{field}: {path} is no folder of a known layout: it has neither liked and disliked folders, nor "
            f"{', '.join(NAMES)}, nor tables or tars in it, and is neither a saved data set nor a run"
        )
    return _of_table(path, FileRows(path, field))


def _of_folder(path: str, names: set[str], field: str) -> Any:
    if {"config.yaml", "rounds"} <= names:
        return RunData(run=path)
    if names & {"dataset_dict.json", "state.json"}:
        return HuggingFaceData(name=path)
    if names & set(LIKED) and names & set(DISLIKED):
        return FoldersData(path=path)
    return ImageFolderData(path=path) if _has(path, NAMES, field) else None


def _has(path: str, endings: Sequence[str], field: str) -> bool:
    try:
        return bool(find(path, endings, field))
    except UserError:
        return False


def _of_table(path: str, rows: FileRows) -> Any:
    schema = rows.schema()
    names = set(schema.names)
    if set(LABELS) <= names:
        return PairsData(path=path)
    for spelling in SPELLINGS:
        if set(spelling) <= names and _words(rows, spelling[2]) & {WIN, BOTH, LOSE}:
            return PaperData(path=path)
    if "vote" in usual(schema, "verdict") and usual(schema, "who"):
        return VotesData(path=path)
    if usual(schema, "score") and not usual(schema, "verdict"):
        return RatingsData(path=path)
    return TableData(path=path)


def _words(rows: FileRows, column: str) -> set[str]:
    """What stands in the first rows of a column."""
    for part in rows.parts():
        for batch in rows.batches(part, [column]):
            return {str(value) for value in batch.column(0).to_pylist()}
    return set()


class Several(Source):
    """Sources one after the other; ids begin with the number of theirs."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)

    def parts(self) -> Sequence[Part]:
        return [
            Part(f"{number}/{part.name}", {"source": number, "part": part}, part.rows)
            for number, source in enumerate(self.sources)
            for part in source.parts()
        ]

    def read(self, part: Part) -> Iterator[pa.Table]:
        number = part.of["source"]
        for table in self.sources[number].read(part.of["part"]):
            ids = pa.array([f"{number}/{name}" for name in table["id"].to_pylist()], pa.string())
            yield table.set_column(0, table.schema.field("id"), ids)

    def preview(self) -> Preview:
        all_ = self.previews()
        rows = [preview.rows for preview in all_]
        counts = [preview.verdicts for preview in all_]
        return Preview(
            "several",
            ", ".join(preview.where for preview in all_),
            {},
            None if None in rows else sum(filter(None, rows)),
            None
            if None in counts
            else {name: sum(each[name] for each in counts if each) for name in ("desirable", "undesirable", "none")},
            pa.concat_tables([preview.first for preview in all_]).slice(0, 5),
            {f"{preview.kind}: {what}": number for preview in all_ for what, number in preview.wrong.items()},
            {f"{preview.kind}: {what}": cases for preview in all_ for what, cases in preview.examples.items()},
        )

    def previews(self) -> list[Preview]:
        """One a source."""
        return [source.preview() for source in self.sources]
