"""What the configuration says of labelled images that are there already: `data`. `kto_ray/data/` goes by it.

Each kind of source is a section; a path alone stands for whatever kind lies there.
"""
# ruff: noqa: RUF012  pydantic copies mutable defaults

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kto_ray.config.label import Filter
from kto_ray.config.people import DatabaseUrl
from kto_ray.config.preparing import Prepare, StreamSettings
from kto_ray.identity import ByContent, Fixed
from kto_ray.section import Count, InnerShare, Section, Share

UNLABELLED = "none"


class Labelled(Section):
    """What table-like sources have in common: which columns are what, and how a verdict is read."""

    prompt: Fixed[str | None] = None
    """Column of prompts; None, as for the others: found by its name, see `data/columns.py`."""
    image: Fixed[str | None] = None
    """Column of images: paths, URIs, or the bytes of image files."""
    images: ByContent[str | None] = None
    """Folder or URI that paths of images are relative to; None: the folder of the file they stand in."""
    verdict: Fixed[str | None] = None
    """Column of verdicts; "none": there are none, all is to be scored."""
    desirable: Fixed[tuple[str | float | bool, ...]] = ()
    """Values of that column that mean yes, where they are not usual ones (see `data/verdicts.py`), ..."""
    undesirable: Fixed[tuple[str | float | bool, ...]] = ()
    """... and those that mean no; all others are no verdict then."""
    expression: Fixed[str | None] = None
    """The verdict as an SQL expression over the columns, in the place of a column: "rating >= 4"; null: no verdict."""
    where: Fixed[str | None] = None
    """Only rows of which this SQL expression over the columns is true: "split = 'train'"."""
    who: Fixed[str | None] = None
    """Column of whoever gave the verdict."""
    id: Fixed[str | None] = None
    """Column of unique ids; None: rows are known by their place in their file."""
    keep: Fixed[tuple[str, ...]] = ()
    """Columns that are kept as metadata."""

    @model_validator(mode="after")
    def _a_verdict_is_read_in_one_way(self) -> "Labelled":
        if self.expression and (self.verdict or self.desirable or self.undesirable):
            raise ValueError(
                "expression stands in the place of verdict, desirable and undesirable: give one or the other"
            )
        if bool(self.desirable) != bool(self.undesirable):
            raise ValueError("desirable and undesirable: give the values of both, or of neither")
        if both := set(map(_word, self.desirable)) & set(map(_word, self.undesirable)):
            raise ValueError(f"desirable and undesirable both have {sorted(both)[0]!r}")
        return self


def _word(value: str | float | bool) -> str:
    """What a cell of a table would have to hold."""
    return f"{value:g}" if isinstance(value, float) else str(value).strip().lower()


class AutoData(Section):
    """Whatever lies there, found by its layout and columns, with all settings at their defaults."""

    kind: Literal["auto"] = "auto"
    path: ByContent[str]
    """A file, a folder, or a pattern such as data/*.parquet, local or as a URI."""


class TableData(Labelled):
    """A row an image: CSV, TSV, JSON lines, JSON, Parquet or Arrow, as TRL's unpaired preference, too."""

    kind: Literal["table"] = "table"
    path: ByContent[str]
    """A file, a folder, or a pattern such as data/*.parquet, local or as a URI."""


class PaperData(Section):
    """The CSV of the authors' script, in either spelling."""

    kind: Literal["paper"] = "paper"
    path: ByContent[str]
    """The CSV, local or as a URI."""
    choice: Fixed[Literal["win_and_intersections", "win"]] = "win_and_intersections"
    """Which images are desirable: those that won at least once, the paper's best; or only those that never lost, the
    others that won being left out."""
    images: ByContent[str | None] = None
    """Folder or URI that paths are relative to; None: that of the file."""


class PairsData(Section):
    """Two images a row and which one is better, as Pick-a-Pic v2 has them."""

    kind: Literal["pairs"] = "pairs"
    path: ByContent[str]
    """A file, a folder, or a pattern such as data/*.parquet, local or as a URI."""
    rule: Fixed[Literal["ever", "share"]] = "ever"
    """ever: an image is desirable if it was ever preferred, as in the paper; share: by its share of wins."""
    share: Fixed[InnerShare] = 0.5
    """For `rule: share`: desirable above it, undesirable below, no verdict at it; a tie is half a win."""
    min_votes: Fixed[Count] = 1
    """Images in fewer pairs than this have no verdict."""
    where: Fixed[str | None] = None
    """Only rows of which this SQL expression over the columns is true: "has_label"."""
    images: ByContent[str | None] = None
    """Folder or URI that paths are relative to, where images are not in the rows."""


class RatingsData(Section):
    """Ranks or ratings of several images of a prompt, as HPD and ImageRewardDB have them."""

    kind: Literal["ratings"] = "ratings"
    path: ByContent[str]
    """A file, a folder, or a pattern such as data/*.parquet, local or as a URI."""
    prompt: Fixed[str | None] = None
    """Column of prompts; None, as for the others: found by its name, see `data/columns.py`."""
    image: Fixed[str | None] = None
    """Column of an image, or of a list of all images of the prompt."""
    score: Fixed[str | None] = None
    """Column of a rank or rating, or of a list of them."""
    better: Fixed[Literal["high", "low"] | None] = None
    """None: low for a column whose name has "rank" in it, else high."""
    top: Fixed[InnerShare] = 0.3
    """Share of a prompt's images that is desirable; images of equal score stay together."""
    bottom: Fixed[InnerShare] = 0.3
    """Share that is undesirable; those between have no verdict."""
    min_images: Fixed[Annotated[int, Field(ge=2)]] = 2
    """Prompts with fewer images have no verdicts."""
    where: Fixed[str | None] = None
    """Only rows of which this SQL expression over the columns is true."""
    images: ByContent[str | None] = None
    """Folder or URI that paths are relative to; None: that of the file."""

    @model_validator(mode="after")
    def _shares_are_apart(self) -> "RatingsData":
        if self.top + self.bottom > 1:
            raise ValueError(f"top ({self.top:g}) and bottom ({self.bottom:g}) are more than 1 together")
        return self


class FoldersData(Section):
    """A folder of liked and one of disliked images, each image with its prompt in a text file beside it."""

    kind: Literal["folders"] = "folders"
    path: ByContent[str]
    """The folder that the two lie in, local or as a URI."""
    liked: Fixed[str | None] = None
    """Name of the folder; None: found among usual ones (liked, good, yes, ...)."""
    disliked: Fixed[str | None] = None
    """Name of the other folder; None: found among usual ones (disliked, bad, no, ...)."""
    prompt: Fixed[str | None] = None
    """The prompt of images that have no text file beside them; None: they are left out."""


class ImageFolderData(Labelled):
    """Images in folders with a metadata.csv, .jsonl or .parquet that names them, as Hugging Face's imagefolder."""

    kind: Literal["imagefolder"] = "imagefolder"
    path: ByContent[str]
    """The folder, local or as a URI."""


class WebDatasetData(Labelled):
    """Tar files in which files of one name belong together: 001.jpg, 001.txt, 001.json, 001.cls."""

    kind: Literal["webdataset"] = "webdataset"
    path: ByContent[str]
    """A tar file, a folder of them, or a pattern such as shards/*.tar, local or as a URI."""


class HuggingFaceData(Labelled):
    """A data set of the hub by its name, or a folder that `datasets` has saved."""

    kind: Literal["hugging_face"] = "hugging_face"
    name: ByContent[str]
    """OWNER/NAME, or a folder of `save_to_disk`."""
    config: Fixed[str] = "default"
    """Which configuration (subset) of the data set."""
    split: Fixed[str] = "train"
    """Which split of it."""
    revision: ByContent[str | None] = None
    """Of the hub's repository; a commit hash makes a run reproducible."""


class VotesData(Labelled):
    """A log of votes, several an image, that are combined into one verdict."""

    kind: Literal["votes"] = "votes"
    path: ByContent[str | None] = None
    """Tables as those of kind `table`, a row a vote; or ..."""
    database: ByContent[DatabaseUrl | None] = None
    """... the SQLAlchemy URL of a database, with $NAME for passwords, and ..."""
    query: Fixed[str | None] = None
    """... what is asked of it, in a stable order: "SELECT ... ORDER BY id"."""
    when: Fixed[str | None] = None
    """Column of the time of a vote; needed by `combine: latest`."""
    combine: Fixed[Literal["majority", "share", "latest"]] = "majority"
    """majority: more yes than no, or the reverse; share: a share of yes of at least `share`; latest: the last vote."""
    share: Fixed[InnerShare] = 0.5
    """For `combine: share`: the least share of yes that makes an image desirable."""
    min_votes: Fixed[Count] = 1
    """Images with fewer votes have no verdict."""
    one_vote_each: Fixed[bool] = True
    """Of several votes of one person on an image the last one counts."""
    agree_at_least: Fixed[Share] = 0
    """Who agrees less often than this with the majority of the others is left out; 0: nobody."""
    agree_on: Fixed[Count] = 10
    """Judged by so many images that others judged, too, at least."""

    @model_validator(mode="after")
    def _votes_come_from_one_place(self) -> "VotesData":
        if bool(self.path) == bool(self.database):
            raise ValueError("give path, or database and query")
        if bool(self.database) != bool(self.query):
            raise ValueError("database and query belong together")
        return self


class RunData(Section):
    """The sealed rounds of a run of this project, with its own verdicts or those of a label set."""

    kind: Literal["run"] = "run"
    run: ByContent[str]
    """The run's folder or URI."""
    labels: Fixed[str | None] = None
    """A label set that `kto-ray relabel` has made; None: the run's own verdicts."""


AnySource = Annotated[
    AutoData
    | TableData
    | PaperData
    | PairsData
    | RatingsData
    | FoldersData
    | ImageFolderData
    | WebDatasetData
    | HuggingFaceData
    | VotesData
    | RunData,
    Field(discriminator="kind"),
]
"""One line each; `data/sources.py` has what reads it."""


def as_source(value: Any) -> Any:
    """A path is whatever lies there, and so is a mapping without a kind."""
    if isinstance(value, str):
        return {"kind": "auto", "path": value}
    return {"kind": "auto", **value} if isinstance(value, Mapping) else value


def as_sources(value: Any) -> Any:
    """One source for a list of it."""
    several = [value] if isinstance(value, str | Mapping) else value
    return [as_source(one) for one in several] if isinstance(several, list | tuple) else several


class Mix(Section):
    """Labelled images that an online run learns from besides those that it draws."""

    source: ByContent[Annotated[tuple[AnySource, ...], BeforeValidator(as_sources), Field(min_length=1)]]
    """One or several; a path stands for the source of whatever kind lies there."""
    share: Fixed[InnerShare] = 0.2
    """Of the samples of every optimizer step, rounded to whole samples."""


class Data(Section):
    """Labelled images to learn from that are there already; a path alone is short for `{sources: PATH}`."""

    sources: ByContent[Annotated[tuple[AnySource, ...], BeforeValidator(as_sources)]] = ()
    """One or several, to learn from alone; a path stands for the source of whatever kind lies there."""
    mix: Fixed[Mix | None] = None
    """In the place of `sources`: the run draws rounds of its own, and these images are mixed into their training."""
    held_out_share: Fixed[Share] = 0
    """Share of their prompts that is set apart to evaluate on, in the place of `prompts.held_out`; by a hash of the
    prompt, whatever its case and spaces. Images of held-out prompts are never trained on."""
    score: Fixed[Literal["none", "missing", "all"]] = "none"
    """Which images get their verdict from `label`, by its scorers, combination and threshold, as those of a round do:
    none; those without a verdict of their own; or all. The scores are kept."""
    filters: Fixed[dict[str, Filter]] = {}
    """Scorers by which images are left out, by the names that their scores are kept under: `{nsfw: {scorer:
    my_module:Nsfw, at_most: 0.5}}`."""
    prepare: Prepare = Prepare()
    """How images are read, cut to size and encoded."""
    stream: StreamSettings = StreamSettings()
    """How training draws from what was prepared."""

    @model_validator(mode="after")
    def _they_are_learned_from_alone_or_mixed(self) -> "Data":
        if bool(self.sources) == bool(self.mix):
            raise ValueError(
                "give sources, to learn from labelled images alone, or mix, to learn from them besides what is drawn"
            )
        return self

    @property
    def named(self) -> tuple[AnySource, ...]:
        """All sources."""
        return self.mix.source if self.mix else self.sources


def as_data(value: Any) -> Any:
    """A path, or a list, stands for its sources."""
    if isinstance(value, str | list):
        return {"sources": value}
    if isinstance(value, Mapping) and "sources" not in value and ("kind" in value or "path" in value):
        return {"sources": [value]}
    return value
