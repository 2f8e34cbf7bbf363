"""Fields that stand elsewhere now: refused by their new name in what a user writes, moved in what an old run saved.

`reading.py` reads every tree through here.
"""

import copy
from typing import Any

from kto_ray.errors import UserError

MOVED = {
    "train.beta": "train.objective.beta",
    "train.utility": "train.objective.utility",
    "train.reference_point": "train.objective.reference_point",
    "train.desirable_weight": "train.objective.desirable_weight",
    "train.undesirable_weight": "train.objective.undesirable_weight",
}


def refuse_moved(tree: dict[str, Any]) -> None:
    """Raises UserError: names the new place of each field that stands at its old one."""
    found = [f"{old}: is now {new}" for old, new in MOVED.items() if _parent(tree, old) is not None]
    if found:
        raise UserError("\n".join(found))


def upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """A saved tree with every field where it stands now."""
    tree = copy.deepcopy(tree)
    for old, new in MOVED.items():
        if (parent := _parent(tree, old)) is not None:
            branch = tree
            for key in new.split(".")[:-1]:
                branch = branch.setdefault(key, {})
            branch[new.rpartition(".")[2]] = parent.pop(old.rpartition(".")[2])
    return tree


def _parent(tree: dict[str, Any], field: str) -> dict[str, Any] | None:
    """The mapping in which a field is given, if it is."""
    *keys, name = field.split(".")
    branch: Any = tree
    for key in keys:
        branch = branch.get(key) if isinstance(branch, dict) else None
    return branch if isinstance(branch, dict) and name in branch else None
