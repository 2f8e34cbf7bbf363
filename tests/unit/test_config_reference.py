"""The page of all fields is current, and no field is without a text."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import kto_ray.config.reference as reference
from kto_ray.config import RunConfig
from kto_ray.identity import Fixed, Noted
from kto_ray.section import Section

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference.page(), (
        "make it anew: python -m kto_ray.config.reference > docs/configuration.md"
    )


def test_every_field_has_a_row() -> None:
    """Of every section that can be reached, by a walk of its own."""
    rows = reference.page().count("\n| `")
    schema: dict[str, Any] = RunConfig.model_json_schema()
    fields = sum(len(section["properties"]) for section in [schema, *schema["$defs"].values()])
    kinds = sum(
        "const" in section["properties"].get("kind", {}) for section in schema["$defs"].values()
    )  # told in the heading
    assert rows == fields - kinds


class Documented(Section):
    """Of a test."""

    share: Noted[float] = Field(default=0.5, gt=0, le=1)
    """Of something | else."""
    pair: Fixed[tuple[int, ...] | None] = None
    """Several
    of them.

    And more.
    """


def test_a_row_says_type_default_and_mark() -> None:
    shown = [line for line in reference._section(Documented, ["a.b"]).splitlines() if line.startswith("| `")]
    assert shown == [
        "| `share` | number above 0 to 1 | `0.5` | yes, noted | Of something \\| else. |",
        "| `pair` | list of whole number or null | `null` | no | Several of them. |",
    ]


def test_a_field_without_a_text_has_no_place() -> None:
    class Silent(Section):
        """Of a test."""

        share: float = 1

    with pytest.raises(reference.NoText, match=r"Silent\.share says nothing of itself"):
        reference._section(Silent, [])
