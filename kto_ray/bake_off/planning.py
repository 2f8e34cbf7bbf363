"""The cells of a bake-off: a task, a method, a seed, and the configuration that they make.

A cell that is done lies in `<out>/cells/` with the configuration that it was run with; it is run again only when that
is another one now. So a bake-off that ended anywhere goes on, and a method that changes is measured anew. Fields that
the configuration did not have then are not compared: what is new is off unless it is asked for.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kto_ray.bake_off.methods import METHODS, TUNING_SEEDS, Method
from kto_ray.bake_off.tasks import COMMON, TASKS, Task
from kto_ray.config import RunConfig, from_tree
from kto_ray.errors import UserError
from kto_ray.storage import to_json


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        setting: of a tuning run; empty for the method's tuned one.
        rounds: cut to so many; None: the task's.
    """

    task: str
    method: str
    seed: int
    setting: str = ""
    rounds: int | None = None

    @property
    def name(self) -> str:
        cut = f"{self.rounds}-rounds" if self.rounds else ""
        return "-".join(filter(None, (self.task, self.method, self.setting, cut, str(self.seed))))

    def config(self) -> RunConfig:
        """Raises UserError when the method cannot do the task."""
        task, method = TASKS[self.task], METHODS[self.method]
        tuned = _parsed(self.setting) if self.setting else method.tuned
        tree = _over(COMMON, {"label": dict(task.label)}, task.more, {"seed": self.seed})
        tree = _over(tree, {"train": dict(method.train), "generate": dict(method.generate)})
        for field, value in tuned.items():
            tree = _over(tree, {"train": _nested(field, value)})
        return from_tree(tree | ({"rounds": self.rounds} if self.rounds else {}))


def tuning_cells(methods: Iterable[str]) -> list[Cell]:
    """Every setting of the methods' grids on every tuning seed, of the first task."""
    task = next(iter(TASKS))
    return [
        Cell(task, name, seed, _said(candidate))
        for seed in TUNING_SEEDS
        for name in methods
        for candidate in METHODS[name].candidates()
    ]


def tuning_rates(results: "Results") -> dict[str, dict[str, list[float]]]:
    """Final held-out pass rate of what was tuned so far, by method and setting: one a tuning seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in tuning_cells(METHODS):
        if (result := results.read(cell)) is not None:
            rate = float(result["rows"][-1]["evaluation"]["pass_rate"]["value"])
            found.setdefault(cell.method, {}).setdefault(cell.setting, []).append(rate)
    return found


def best_setting(rates: Mapping[str, Sequence[float]]) -> str:
    """Of those that were run on most seeds, the one with the best mean."""
    return max(rates, key=lambda setting: (len(rates[setting]), sum(rates[setting]) / len(rates[setting])))


def cells(tasks: Iterable[str], methods: Iterable[str], seeds: Sequence[int], rounds: int | None) -> list[Cell]:
    """Seed by seed, so that what is cut short has compared all methods on fewer seeds."""
    tasks, methods = list(tasks), list(methods)
    return [Cell(task, method, seed, "", rounds) for seed in seeds for task in tasks for method in methods]


def require_known(what: str, names: Iterable[str], known: Mapping[str, Task] | Mapping[str, Method]) -> None:
    """Raises UserError: there is no such task, or method."""
    for name in names:
        if name not in known:
            raise UserError(f"{what}: there is no {name!r}; known: {', '.join(known)}")


class Results:
    """What is known of cells, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell came to; None: it was not run, or with another configuration."""
        path = self.folder / f"{cell.name}.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        return result if _agrees(result["config"], cell.config().model_dump(mode="json")) else None

    def write(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> None:
        """Whole or not at all."""
        result = {"cell": asdict(cell), "config": cell.config().model_dump(mode="json"), "rows": list(rows)}
        partial = self.folder / f"{cell.name}.partial"
        partial.write_text(to_json(result) + "\n")
        partial.rename(self.folder / f"{cell.name}.json")


def _agrees(then: Any, now: Any) -> bool:
    """Whether a configuration is what it was, in the fields that it had."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return all(name in now and _agrees(value, now[name]) for name, value in then.items())
    return bool(then == now)


def _said(setting: Mapping[str, float]) -> str:
    return ",".join(f"{field}={value:g}" for field, value in setting.items())


def _parsed(setting: str) -> dict[str, float]:
    return {field: float(value) for field, _, value in (part.partition("=") for part in setting.split(","))}


def _nested(field: str, value: float) -> dict[str, Any]:
    first, _, rest = field.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _over(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Trees laid over each other, the last on top."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for name, value in tree.items():
            below = merged.get(name)
            if isinstance(below, str) and isinstance(value, Mapping):  # a kind in its short form
                below = {"kind": below}
            merged[name] = _over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
