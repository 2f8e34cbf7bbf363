"""What the configuration says of prompts; `kto_ray/prompts.py` makes a set of it, `prompt_files.py` reads the files."""
# ruff: noqa: RUF012  pydantic copies mutable defaults

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from kto_ray.identity import ByContent
from kto_ray.section import Count, Section


def as_slot(value: Any) -> Any:
    """A list of values stands for each as often as it is there."""
    several = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return dict(Counter(value)) if several else value


Slot = Annotated[dict[str, Count], BeforeValidator(as_slot)]


class PromptSet(Section):
    """One set of prompts; a source alone is short for `{source: SOURCE}`."""

    source: ByContent[str]
    """"shapes:train" or "shapes:held_out" (the embedded world); a file; a folder of such files, as of a Hugging Face
    dataset; a URI of either (s3://..., gs://..., hf://datasets/OWNER/NAME, https://...); or a `PromptSource` of one's
    own, `my_module:MyPrompts`."""
    args: ByContent[dict[str, Any]] = {}
    """Keyword arguments that a `PromptSource` of one's own is built with."""
    split: ByContent[str | None] = None
    """Which split of a folder that has several, for instance "train"."""
    text: ByContent[str | None] = None
    """Column of the texts; None: `text`, `prompt`, `prompts` or `caption`, in upper or lower case."""
    id: ByContent[str | None] = None
    """Column of the names, which seeds go by; None: `id`, in upper or lower case, or else made from the text."""
    weight: ByContent[str | None] = None
    """Column of whole numbers from 1 on: how often a prompt's turn comes while one without comes once. Held-out prompts
    have none."""
    slots: ByContent[dict[str, Slot]] = {}
    """Values of the slots of texts such as "a {color} {animal}", a list each, or a mapping from values to weights:
    every combination becomes a prompt, in an order that mixes them. A brace that is none is written twice."""
    mix: ByContent[bool] = False
    """Take the prompts in an order that follows from their texts, so that the rounds of a file that is sorted by topic
    have all of its topics."""


def as_prompt_set(value: Any) -> Any:
    """A text stands for the set of that source."""
    return {"source": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value


class Prompts(Section):
    """What is drawn."""

    train: Annotated[PromptSet, BeforeValidator(as_prompt_set)] = PromptSet(source="shapes:train")
    """The prompts of rounds, in a circle."""
    held_out: Annotated[PromptSet, BeforeValidator(as_prompt_set)] = PromptSet(source="shapes:held_out")
    """Prompts that are never trained on; policies are evaluated on them."""
