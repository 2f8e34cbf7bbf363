"""Which column is what: named by the configuration, or found by its name among the usual ones.

A name is found in any case, with spaces or - for _. Where two columns could be meant nobody guesses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from kto_ray.errors import UserError

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "caption", "text", "prompt_text", "description"),
    "image": (
        *("image", "file_name", "file_path", "image_path", "filename", "filepath", "path", "file", "img", "img_path"),
        *("uri", "url", "image_uri", "image_url", "image_bytes", "bytes", "jpg", "png", "image_file"),
    ),
    "verdict": (
        *("desirable", "label", "verdict", "vote", "liked", "is_liked", "like", "feedback", "thumbs", "thumb"),
        *("is_good", "good", "preferred", "approved", "accepted", "is_desirable"),
    ),
    "who": (
        "who",
        "user",
        "user_id",
        "username",
        "labeler",
        "annotator",
        "annotator_id",
        "rater",
        "voter",
        "worker_id",
    ),
    "when": ("when", "time", "timestamp", "created_at", "voted_at", "date", "datetime", "ts"),
    "score": ("rank", "ranks", "overall_rating", "rating", "ratings", "score", "scores", "reward", "human_preference"),
}
"""The usual names of each column."""

OPTIONAL = frozenset({"who"})
"""What a table need not have; where two columns could be meant, neither is taken."""


@dataclass(frozen=True)
class FoundColumns:
    """Names of columns by what they are: "prompt" -> "caption"."""

    of: Mapping[str, str]

    def __getitem__(self, what: str) -> str:
        return self.of[what]

    def get(self, what: str) -> str | None:
        return self.of.get(what)


def find_columns(
    schema: pa.Schema,
    named: Mapping[str, str | None],
    where: str,
    field: str,
    optional: frozenset[str] = OPTIONAL,
    spellings: Mapping[str, Sequence[str]] = SPELLINGS,
) -> FoundColumns:
    """The columns of a table by what they are.

    Args:
        named: what is looked for, with its name where the configuration has one.
        where: the table, for messages.
        field: the source's field in the configuration, for messages.
        optional: what need not be there.
        spellings: the usual names.

    Raises:
        UserError: one is not there, or two could be meant; lists the columns that are there.
    """
    found: dict[str, str] = {}
    there = ", ".join(f"{name!r} ({_type(column.type)})" for name, column in zip(schema.names, schema, strict=True))
    for what, name in named.items():
        if name is not None:
            if name not in schema.names:
                raise UserError(f"{field}: {what}: {where} has no column {name!r}; it has: {there}")
            found[what] = name
            continue
        fitting = usual(schema, what, spellings)
        if len(fitting) == 1:
            found[what] = fitting[0]
        elif what not in optional:
            several = ", ".join(map(repr, fitting))
            problem = f"could be any of {several}" if fitting else "has none of the usual names"
            raise UserError(
                f"{field}: {what}: its column in {where} {problem}; name it: {{{what}: COLUMN}}; there are: {there}"
            )
    return FoundColumns(found)


def usual(schema: pa.Schema, what: str, spellings: Mapping[str, Sequence[str]] = SPELLINGS) -> Sequence[str]:
    """Columns that have a usual name for it."""
    return [name for name in schema.names if _plain(name) in spellings[what]]


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _type(kind: pa.DataType) -> str:
    return "image" if is_image(kind) else str(kind)


def is_image(kind: pa.DataType) -> bool:
    """Whether it holds bytes of files: as they are, or as `datasets` keeps them, with a path beside."""
    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return is_binary(kind)


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
