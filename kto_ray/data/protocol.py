"""What every source of labelled images gives, whatever it reads: rows of `LABELLED`, in parts that can be read apart.

    preview()   before anything is spent: columns, counts, first rows, and what looks wrong; no image is decoded
    parts()     how it can be read side by side: small descriptions that pickle, in a stable order
    read(part)  the rows of one part, as small tables, one after the other
    tables()    all rows: those of all parts, in their order

A source pickles, without anything that it has open, so that Ray Data's tasks call `read`; two of them that read the
same files give the same rows in the same order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

LABELLED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("image", pa.binary()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("desirable", pa.bool_()),
        pa.field("who", pa.string()),
        pa.field("metadata", pa.string()),
    ]
)
"""One row an image and prompt:

- id: of the row, unique in its source: the kind of source and what the row is known by there, not its content;
- uri: where the image lies, an absolute path or a URI that pyarrow or fsspec opens; null: its bytes are in the row;
- image: the bytes of an image file (PNG, JPEG, ...), as they are, not decoded; null where there is a uri;
- prompt: never null, never blank;
- desirable: null: no verdict, by abstention or because it is still to be scored;
- who: who said so, or where it is from; null: not known;
- metadata: a JSON object of what else is kept (votes, rank, split, ...); null: nothing.
"""


@dataclass(frozen=True)
class Part:
    """A share of a source. `of` is the source's own business: small, and picklable.

    `name` is unique in the source and stays the same as long as its files do. `rows`: None where only reading tells.
    """

    name: str
    of: Mapping[str, Any]
    rows: int | None = None


@dataclass(frozen=True)
class Preview:
    """A source at a glance, as cheaply as it can be had."""

    kind: str
    where: str
    columns: Mapping[str, str]
    """What was taken for what: "prompt" -> "caption"; for people to check."""
    rows: int | None
    """Rows of `LABELLED` that it gives; None: only reading all of it would tell."""
    verdicts: Mapping[str, int] | None
    """"desirable", "undesirable" and "none" of all rows; None: only reading all of it would tell."""
    first: pa.Table
    """The first few rows, of `LABELLED`."""
    wrong: Mapping[str, int] = field(default_factory=Counter)
    """What is left out or looks wrong, by sentence: how often, at least."""
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """A few cases, by the same sentences."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else is worth knowing of it."""


class Source(Protocol):
    """Labelled images. Built from its settings alone, without reading anything. To be subclassed.

    Raises (from every method): UserError: what is wrong with the files or settings, and what would be right.
    """

    def preview(self) -> Preview: ...

    def parts(self) -> Sequence[Part]:
        """May read all votes, where an image has several, but no image."""
        ...

    def read(self, part: Part) -> Iterator[pa.Table]:
        """Tables of `LABELLED`, of at most some dozens of megabytes each, at least one row."""
        ...

    def tables(self) -> Iterator[pa.Table]:
        for part in self.parts():
            yield from self.read(part)
