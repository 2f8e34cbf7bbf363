"""What a continued run may change: `require_same` guards its folder against another experiment's configuration.

Each field of the tree, and each argument of a plug-in, says itself what a change of it means; see `identity.py`. What
changed, and from which round on, is a row in `changes.jsonl` of the run's folder.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from kto_ray.config.run import RunConfig
from kto_ray.errors import UserError
from kto_ray.identity import OnResume
from kto_ray.secrets import hide, hide_in_database, without_credentials
from kto_ray.section import Section
from kto_ray.storage import Storage, to_json

logger = logging.getLogger(__name__)

CHANGES = "changes.jsonl"

Marks = Mapping[str, OnResume]


@dataclass(frozen=True)
class Change:
    """A field in which a continued run differs from its folder, with both values as JSON has them."""

    field: str
    before: Any
    after: Any
    mark: OnResume

    def __str__(self) -> str:
        return f"{self.field}: the run has {self.before!r}, this command says {self.after!r}"


def differences(config: RunConfig, saved: RunConfig) -> list[Change]:
    """All of them, whatever they mean."""
    return list(_changes(config, saved, (), OnResume.FIXED, {}))


def is_part(field: str, of: str) -> bool:
    """Whether a dotted name is that of a field, or of something in it."""
    return f"{field}.".startswith(f"{of}.")


def mark_of(field: FieldInfo) -> OnResume:
    """What a field says of itself; one that only holds a section leaves it to the section's fields."""
    return next((mark for mark in field.metadata if isinstance(mark, OnResume)), OnResume.FIXED)


def require_same(
    config: RunConfig,
    saved: RunConfig,
    arguments: Mapping[str, Marks] | None = None,
    same_content: Collection[str] = (),
) -> list[Change]:
    """What changes, when a run folder was begun with `saved` and goes on with `config`.

    Args:
        arguments: marks of plug-ins' arguments, by the field that holds them, for instance "label.scorers.shapes.args".
        same_content: fields, or sections, known to name the same content as the run's, by whatever name.

    Raises:
        UserError: they differ in what makes a run another experiment.
    """
    changes = list(_changes(config, saved, (), OnResume.FIXED, arguments or {}))
    refused = [
        change
        for change in changes
        if change.mark is OnResume.FIXED
        or (change.mark is OnResume.BY_CONTENT and not any(is_part(change.field, of) for of in same_content))
    ]
    if refused:
        raise UserError(
            f"run {config.run!r} was begun with another configuration:\n"
            + "\n".join(f"  {change}" for change in refused)
            + "\nGive the same values to continue it, or another `run` name to begin a new one."
        )
    return changes


def _changes(
    new: Any, old: Any, keys: tuple[str, ...], mark: OnResume, arguments: Mapping[str, Marks]
) -> Iterator[Change]:
    if isinstance(new, Section) and type(new) is type(old):
        for name, field in type(new).model_fields.items():
            yield from _changes(getattr(new, name), getattr(old, name), (*keys, name), mark_of(field), arguments)
    elif isinstance(new, dict) and isinstance(old, dict):
        marks = arguments.get(".".join(keys), {})
        for key in old | new:
            yield from _changes(new.get(key), old.get(key), (*keys, key), marks.get(key, mark), arguments)
    else:
        name = "headers" if "headers" in keys else keys[-1]
        if _compared(new, name) != _compared(old, name):
            yield Change(".".join(keys), _shown(old, name), _shown(new, name), mark)


def _compared(value: Any, name: str) -> Any:
    """Secrets may change: folders do not have them."""
    if isinstance(value, SecretStr):
        return without_credentials(value.get_secret_value())
    return _shown(value, name)


def _shown(value: Any, name: str) -> Any:
    if isinstance(value, SecretStr):
        return hide_in_database(value.get_secret_value())
    return hide(to_jsonable_python(value), name)


def write_down(changes: Sequence[Change], run: Storage, round_index: int) -> None:
    """Add changes to the run's record, and say those after which results are not what they would have been.

    Args:
        round_index: the first round that is not trained yet.
    """
    rows = [
        {"round": round_index, "field": change.field, "before": change.before, "after": change.after}
        for change in changes
    ]
    known = changes_of(run)
    if known[-len(rows) :] != rows:  # a start that came no further than this wrote the same
        run.write(CHANGES, "".join(to_json(row) + "\n" for row in [*known, *rows]).encode())
    if noted := [change.field for change in changes if change.mark is OnResume.NOTED]:
        logger.warning(
            "%s changed: from round %d on, results are not to the last bit what they would have been (%s/%s says what)",
            *(", ".join(noted), round_index, run, CHANGES),
        )


def changes_of(run: Storage) -> list[dict[str, Any]]:
    """What changed in a run since it began: {"round", "field", "before", "after"} each, in the order of the starts."""
    return [json.loads(line) for line in run.read(CHANGES).decode().splitlines()] if run.exists(CHANGES) else []
