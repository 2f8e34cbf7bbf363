"""How a configuration is read: a YAML recipe, dotted overrides laid over it, everything checked; and written again."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kto_ray.config import yaml12
from kto_ray.config.explaining import explain, leads_to, nearest
from kto_ray.config.moved import refuse_moved
from kto_ray.config.run import SHORT_FORMS, RunConfig, require_name
from kto_ray.errors import UserError
from kto_ray.secrets import hide
from kto_ray.section import Section
from kto_ray.text import read_text


def recipe_names() -> list[str]:
    return sorted(
        path.name.removesuffix(".yaml")
        for path in resources.files("kto_ray.recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def load(recipe: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, lay the overrides over it, check everything.

    Args:
        recipe: a built-in name (`recipe_names`), a path to a YAML file, or None for the defaults.
        overrides: "dotted.field=value" each; values are read as YAML, without comments.

    Raises:
        UserError: names the field, the value and what would be right.
    """
    config = from_tree(_overlay(_read_recipe(recipe) if recipe else {}, overrides))
    require_name(config.run)
    return config


def public(section: Section) -> dict[str, Any]:
    """A configuration, or a section of one, as it may be written and shown: as JSON has it, without secrets."""
    shown: dict[str, Any] = hide(section.model_dump(mode="json"))
    return shown


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config`, but for its secrets, with overrides laid over it; raises as `load`."""
    return from_tree(_overlay(public(config), overrides))


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """Raises UserError, as `load`."""
    refuse_moved(tree)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(explain(detail) for detail in error.errors())) from error


def _overlay(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form field=value, for instance rounds=3")
        keys = path.split(".")
        branch = tree
        for depth, key in enumerate(keys[:-1], start=1):
            value = branch.get(key)
            for field, written_out in SHORT_FORMS.items():
                if leads_to(keys[:depth], field):
                    value = written_out(value)
            branch[key] = dict(value) if isinstance(value, dict) else {}  # a copy: an alias may stand elsewhere, too
            branch = branch[key]
        try:
            branch[keys[-1]] = yaml12.load_whole(text)
        except yaml12.YAMLError as error:
            raise UserError(f"override {path}: {hide(text)!r} is not a YAML value: {hide(str(error))}") from None
    return tree


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            raise UserError(
                f"unknown recipe {recipe!r}{nearest(recipe, recipe_names())}; known: {', '.join(recipe_names())}"
            )
        text = (resources.files("kto_ray.recipes") / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        text = read_text(path, f"recipe {recipe}")
    else:
        raise UserError(f"recipe file {recipe} does not exist; built-in recipes: {', '.join(recipe_names())}")
    try:
        tree = yaml12.load(text, path.name)
    except yaml12.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {hide(str(error))}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"recipe {recipe} must be a mapping of fields, not a {type(tree).__name__}")
    return tree


def to_yaml(config: RunConfig) -> str:
    """The resolved tree, without secrets; but for them, `load` of this text gives an equal configuration."""
    return yaml12.dump(public(config))
