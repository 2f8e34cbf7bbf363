"""Every field of the configuration on one page: `python -m kto_ray.config.reference > docs/configuration.md`.

Made from the fields themselves: the text under each, its type, its default, and the mark that says whether it may
change when a run is continued. A field without a text has no place on the page, and a test fails.
"""

import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from kto_ray.config.resuming import mark_of
from kto_ray.config.run import RunConfig
from kto_ray.identity import OnResume
from kto_ray.section import Section

ON_RESUME = {
    OnResume.FIXED: "no",
    OnResume.BY_CONTENT: "same content",
    OnResume.NOTED: "yes, noted",
    OnResume.FREE: "yes",
}
WORDS: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}
INTRODUCTION = """# Every field of the configuration

A recipe is a YAML file with some of these fields; everything else has its default. On the command line a field is
given by its dotted name, `train.learning_rate=1e-4`, with a value as YAML has it, in quotes where a shell would read it
otherwise: `'label.threshold={kind: round_quantile, quantile: 0.7}'`. `*` stands for a name of your choice.
`--dry-run` prints what a recipe resolves to.

Whether a run that is **continued** may have another value: *no*, it would be another experiment, and is refused; *same
content*, to the byte, such as a file that has moved; *yes, noted*, results are not to the last bit what they would have
been, which is said and kept in `changes.jsonl`; *yes*, and nothing that comes of it is another. What Python calls None,
YAML calls `null`.

<!-- Made by kto_ray/config/reference.py. -->
"""


class NoText(Exception):  # noqa: N818  it says what is missing
    """A field says nothing of itself."""


def page() -> str:
    """The page, in Markdown. Raises NoText."""
    places: dict[type[Section], list[str]] = {}
    for path, section in _sections(RunConfig, ""):
        places.setdefault(section, []).append(path)
    return INTRODUCTION + "".join(_section(section, paths) for section, paths in places.items())


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    """Every section with its dotted name, each before those in it."""
    yield path, section
    for name, field in section.model_fields.items():
        here = f"{path}.{name}" if path else name
        for inside, star in _inside(field.annotation):
            yield from _sections(inside, f"{here}.*" if star else here)


def _inside(annotation: Any, star: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """The sections in a type, and whether they stand under names, or in a list."""
    if get_origin(annotation) is Literal:
        return
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, star
    for part in get_args(annotation):
        yield from _inside(part, star or get_origin(annotation) in (dict, tuple))


def _section(section: type[Section], paths: list[str]) -> str:
    kind = section.model_fields.get("kind")
    tags = get_args(kind.annotation) if kind is not None else ()  # several: it is a setting like others
    chosen = f", kind `{tags[0]}`" if len(tags) == 1 else ""
    title = ", ".join(f"`{path}`" for path in dict.fromkeys(paths)) if paths != [""] else "The run"
    rows = "".join(
        _row(section, name, field) for name, field in section.model_fields.items() if not (name == "kind" and chosen)
    )
    table = f"| field | value | default | may change | |\n|---|---|---|---|---|\n{rows}" if rows else ""
    return f"\n## {title}{chosen}\n\n{_text(section.__doc__ or '', section.__name__)}\n\n{table}"


def _row(section: type[Section], name: str, field: FieldInfo) -> str:
    inside = [part for part, _ in _inside(field.annotation)]
    marked = any(isinstance(mark, OnResume) for mark in field.metadata)  # or else its own fields say it
    text = field.description or (inside[0].__doc__ if len(inside) == 1 else None)
    cells = (
        f"`{name}`",
        _type(field.annotation, field.metadata),
        _default(field),
        "" if inside and not marked else ON_RESUME[mark_of(field)],
        _text(text or "", f"{section.__name__}.{name}"),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _text(text: str, of: str) -> str:
    """The first paragraph, on one line."""
    words = " ".join(text.strip().split("\n\n")[0].split())
    if not words:
        raise NoText(f"{of} says nothing of itself: write a text under it")
    return words


def _type(annotation: Any, metadata: Any = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0], (*parts[1:], *metadata))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys("null" if part is type(None) else _type(part, metadata) for part in parts))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_type(parts[0])}" if parts[1:] == (...,) else f"[{', '.join(map(_type, parts))}]"
    if origin is dict:
        return f"mapping of names to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "settings"
    if annotation is SecretStr:
        return "text"
    return WORDS[annotation] + _limits(metadata)


def _limits(metadata: Any) -> str:
    """ "from 1 on", "above 0", "from 0 to 1"."""
    found: dict[str, Any] = {}
    for limit in metadata:
        for part in (*getattr(limit, "metadata", ()), limit):
            match part:
                case Ge(least):
                    found["from"] = least
                case Gt(least):
                    found["above"] = least
                case Le(most):
                    found["to"] = most
                case Lt(most):
                    found["below"] = most
                case MinLen(1):
                    return ", not empty"
    if set(found) == {"from"}:
        return f" from {found['from']} on"
    return "".join(f" {word} {bound:g}" for word, bound in found.items())


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "must be given"
    if isinstance(default, Section):
        default = default.model_dump(mode="json", exclude_unset=True) | (
            {"kind": default.kind} if hasattr(default, "kind") and len([*_inside(field.annotation)]) > 1 else {}
        )
        return f"`{_flow(default)}`" if default else ""
    if isinstance(default, dict):
        default = {
            name: part.model_dump(mode="json", exclude_defaults=True) if isinstance(part, Section) else part
            for name, part in default.items()
        }
    return f"`{_flow(to_jsonable_python(default))}`"


def _flow(value: Any) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    plain = isinstance(value, str) and value.replace("_", "").replace("/", "").isalnum()
    return value if plain else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    print(page(), end="")
