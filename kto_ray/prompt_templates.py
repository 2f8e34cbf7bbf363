"""Prompts from templates: "a {color} {animal}", with a list of colors and one of animals; `prompts.py` asks for it."""

import itertools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kto_ray.errors import UserError
from kto_ray.prompt_files import Row

MAX_PROMPTS = 1_000_000

Slots = Mapping[str, Mapping[str, int]]
"""Values by slot, each with its weight."""


def fill_in(rows: Sequence[Row], slots: Slots, what: str) -> Iterator[Row]:
    """Every template with every combination of values, which are its metadata, too; weights are multiplied.

    Args:
        what: how messages begin.

    Raises:
        UserError: a slot without values, or values without a slot; braces that do not match; more than a million.
    """
    templates = [_Template(row, _parts(row.text, f"{what} {row.place}")) for row in rows]
    used = {name for template in templates for name in template.slots}
    if unknown := sorted(used - slots.keys()):
        row = next(template.row for template in templates if unknown[0] in template.slots)
        raise UserError(
            f"{what} {row.place}: slots has no values for {{{unknown[0]}}} of {row.text!r}; it has {', '.join(slots)} "
            "(a brace that is no slot is written twice: {{)"
        )
    if unused := sorted(slots.keys() - used):
        raise UserError(f"{what}: slots has values for {{{unused[0]}}}, and no prompt has that slot")
    if empty := [name for name in slots if not slots[name]]:
        raise UserError(f"{what}: slots.{empty[0]} is empty; give it a value at least")
    if (count := sum(math.prod(len(slots[name]) for name in each.slots) for each in templates)) > MAX_PROMPTS:
        raise UserError(f"{what}: slots make {count:,} prompts; {MAX_PROMPTS:,} at most")
    for template in templates:
        if both := sorted(set(template.slots) & template.row.metadata.keys()):
            raise UserError(f"{what} {template.row.place} has a column {both[0]!r} and a slot of that name; rename one")
        for values in itertools.product(*(slots[name] for name in template.slots)):
            yield template.filled(dict(zip(template.slots, values, strict=True)), slots)


@dataclass(frozen=True, slots=True)
class _Template:
    row: Row
    parts: Sequence[tuple[str, str | None]]

    @property
    def slots(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def filled(self, chosen: Mapping[str, str], slots: Slots) -> Row:
        row = self.row
        return replace(
            row,
            text="".join(literal + ("" if name is None else chosen[name]) for literal, name in self.parts),
            id=row.id and "-".join((row.id, *chosen.values())),
            weight=row.weight * math.prod(slots[name][value] for name, value in chosen.items()),
            metadata={**row.metadata, **chosen},
        )


def _parts(template: str, where: str) -> list[tuple[str, str | None]]:
    """Literals, each with the slot that comes after it, if one does."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{where}: {template!r} is no template: {error}; a brace that is no slot is written twice"
        ) from None
    for _, name, form, conversion in parsed:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UserError(f"{where}: {template!r} has a slot {name!r} that is no name; write for instance {{color}}")
    return [(literal, name) for literal, name, _, _ in parsed]
