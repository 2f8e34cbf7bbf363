"""Configurations in words: what is wrong with one, in the user's terms, and what a right one implies."""

import builtins
import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from kto_ray.config.run import RunConfig
from kto_ray.secrets import hide
from kto_ray.section import Section

UNIONS = (Union, UnionType)


def explain(detail: Any) -> str:
    """One pydantic error in the words of this project."""
    location = [str(part) for part in detail["loc"]]
    keys, section = _resolve(location[:-1])
    field = ".".join(keys if get_origin(section) in UNIONS else [*keys, *location[-1:]])
    if detail["type"] == "extra_forbidden":
        known = list(section.model_fields)
        return f"unknown field {field!r}{nearest(location[-1], known)}; known here: {', '.join(known)}"
    if detail["type"] in ("union_tag_invalid", "model_attributes_type"):
        known, kind = list(_kinds(_resolve(location)[1])), str(detail.get("ctx", {}).get("tag", detail["input"]))
        return f"{field}: unknown kind {kind!r}{nearest(kind, known)}; known: {', '.join(known)}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (given: {hide(detail['input'], keys[-1] if keys else '')!r})"
    return f"{field}: {message}{given}" if field else message


def _resolve(location: list[str]) -> tuple[list[str], Any]:
    """The keys that a user wrote, and the type they lead to; pydantic also names the kind that it chose."""
    keys: list[str] = []
    here: Any = RunConfig
    for part in location:
        if get_origin(here) in UNIONS:
            here = _kinds(here)[part]
            continue
        keys.append(part)
        here = _bare(_inside(here, part))
    return keys, here


def _inside(here: Any, key: str) -> Any:
    match get_origin(here):
        case builtins.dict:
            return get_args(here)[1]
        case builtins.tuple:
            return get_args(here)[0]
    return here.model_fields[key].annotation


def _kinds(union: Any) -> dict[str, type[Section]]:
    return {section.model_fields["kind"].default: section for section in get_args(union)}


def _bare(annotation: Any) -> Any:
    """Without Annotated, and without None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in UNIONS:
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def leads_to(keys: Sequence[str], field: str) -> bool:
    """Whether keys lead to a field, in whose dotted name * stands for any one key."""
    names = field.split(".")
    return len(keys) == len(names) and all(name in ("*", key) for key, name in zip(keys, names, strict=True))


def implied(config: RunConfig, held_out_prompts: int | None = None) -> dict[str, str]:
    """What the tree implies, in words: images, steps, effective batch, disk."""
    train, images, steps = config.train, config.generate.images_per_round, config.optimizer_steps_per_round
    per_worker = train.global_batch // train.workers
    accumulated = per_worker // min(train.micro_batch, per_worker)
    batch = f"{train.global_batch} = {train.workers} workers x {per_worker // accumulated} x {accumulated} accumulated"
    if config.offline:
        lines = {
            "optimizer steps": f"{steps} an interval x {config.rounds} intervals = {steps * config.rounds}",
            "effective batch": batch,
            "images drawn": f"{steps * config.rounds * train.global_batch} in all",
        }
    else:
        lines = {
            "images": f"{images} a round x {config.rounds} rounds = {images * config.rounds}",
            "optimizer steps": f"up to {steps} a round, {steps * config.rounds} in all",
            "effective batch": batch,
            "draws of a sample": f"{train.epochs:g} a round on average",
        }
    if config.mixed_places:
        lines["mixed in"] = f"{config.mixed_places} labelled images of the {train.global_batch} samples of a step"
    if held_out_prompts is not None:
        prompts, each = config.evaluate.prompts_of(held_out_prompts), config.evaluate.images_per_prompt
        lines["held-out images"] = f"{prompts} prompts x {each} = {prompts * each} an evaluation"
    return lines
