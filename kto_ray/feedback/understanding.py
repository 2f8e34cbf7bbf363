"""What rows of an application's table mean: which column is what, and which vote a row is.

`sql_votes.py` and `file_votes.py` find the rows. A row that cannot be understood is counted, with what stands in it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa

from kto_ray.config.feedback import Feedback
from kto_ray.data.columns import SPELLINGS, FoundColumns, find_columns
from kto_ray.data.verdicts import Reading
from kto_ray.people.votes import Outcomes, Vote

USUAL: Mapping[str, Sequence[str]] = {
    **SPELLINGS,
    "id": ("id", "vote_id", "event_id", "feedback_id", "rowid"),
    "image": ("image", "image_id", "sample", "sample_id", "image_name", "image_file", "image_url", "file", "file_name"),
}
"""The usual names of each column; those of verdicts, of whom and of when are the same as in logs of votes."""
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
ENDING = re.compile(r"\.(png|jpe?g)$", re.IGNORECASE)


@dataclass(frozen=True)
class VoteRow:
    """Cells of a row, as the database or file has them. `key` tells it from all others."""

    key: str
    image: Any
    verdict: Any
    who: Any = None
    when: Any = None


@dataclass(frozen=True)
class NewVotes:
    """Some votes, in order, with what was not understood of their rows, and how far the table was read with them."""

    votes: list[Vote]
    odd: Outcomes
    position: str


class VoteTable(Protocol):
    """Rows of votes that become more. All methods block."""

    where: str
    """For messages."""

    def check(self) -> FoundColumns:
        """Look whether it can be read, and which column is what. Raises UserError."""
        ...

    def read(self, position: str | None) -> Iterator[NewVotes]:
        """What is new since a position, some at a time; at least what was not there then, maybe more.

        Raises:
            UserError: something cannot be read now; what can be read of it came before.
        """
        ...


def columns_of(
    names: Sequence[str], settings: Feedback, where: str, field: str, optional: frozenset[str]
) -> FoundColumns:
    """Which column of a table is what.

    Raises:
        UserError: one is not there, or two could be meant.
    """
    named = {what: getattr(settings, what) for what in ("id", "image", "verdict", "who", "when")}
    schema = pa.schema([(name, pa.string()) for name in names])
    return find_columns(schema, named, where, field, optional, USUAL)


class Understanding:
    """Makes votes of rows."""

    def __init__(self, settings: Feedback) -> None:
        self.reading = Reading(settings.desirable, settings.undesirable)

    def votes(self, rows: Sequence[VoteRow], odd: Outcomes) -> list[Vote]:
        """Args: odd: takes what is not understood."""
        if not rows:
            return []
        verdicts, strange = self.reading.read(pa.array([_text(row.verdict) for row in rows], pa.string()))
        found = []
        for row, yes, is_strange in zip(rows, verdicts.to_pylist(), strange.to_pylist(), strict=True):
            image = image_id(row.image)
            if image is None:
                odd.add("odd", "a row without an image")
                continue
            if is_strange:
                odd.add("odd", f"vote {row.verdict!r}")
                continue
            moment = moment_of(row.when)
            if moment is None and _text(row.when):
                odd.add("odd", f"time {row.when!r}")
                continue
            found.append(
                Vote(
                    row.key,
                    image,
                    "none" if yes is None else "desirable" if yes else "undesirable",
                    _text(row.who),
                    moment,
                )
            )
        return found


def image_id(cell: Any) -> str | None:
    """The id of a published image: itself, or out of the name, path or URI of its file; None: nothing stands there."""
    text = _text(cell)
    if text is None:
        return None
    last = PurePosixPath(text.replace("\\", "/").partition("?")[0]).name
    return ENDING.sub("", last) or None


def moment_of(cell: Any) -> float | None:
    """Seconds since 1970 of a time; None: there is none, or it is no time. Without a zone it is UTC."""
    if cell is None or isinstance(cell, bool):
        return None
    try:
        if isinstance(cell, str):
            cell = cell.strip()
            cell = float(cell) if NUMBER.fullmatch(cell) else datetime.fromisoformat(cell)
        if isinstance(cell, datetime):
            return (cell if cell.tzinfo else cell.replace(tzinfo=UTC)).timestamp()
        return float(cell) if isfinite(cell) else None
    except (TypeError, ValueError):
        return None


def _text(cell: Any) -> str | None:
    """A cell as text, without spaces around; None where nothing stands."""
    if isinstance(cell, bool):
        return str(cell).lower()
    return None if cell is None else str(cell).strip() or None
