"""Prompt sets: read a file, or take the embedded world's.

The loop cycles through the training set, round after round; the held-out set is only ever evaluated on.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from kto_ray.errors import UserError
from kto_ray.prompt_files import READERS, read_prompts
from kto_ray.records import Prompt, SampleRequest
from kto_ray.shapes import HELD_OUT_PROMPTS, TRAIN_PROMPTS
from kto_ray.storage import Storage

BUILT_IN = {"shapes:train": TRAIN_PROMPTS, "shapes:held_out": HELD_OUT_PROMPTS}


def load_prompts(field: str, source: str) -> list[Prompt]:
    """Read a prompt set.

    Args:
        field: name of the configuration field, for messages.
        source: "shapes:train", "shapes:held_out", or a file; `prompt_files.py` says which.

    Raises:
        UserError: names file and place: no such file, no prompts, an id that was there before, or see `read_prompts`.
    """
    path = BUILT_IN.get(source, Path(source))
    if not path.is_file():
        raise UserError(
            f"{field}: no prompts file {source!r}; give a file ({', '.join(READERS)}), or one of {', '.join(BUILT_IN)}"
        )
    what = f"{field}: {source}"
    prompts: list[Prompt] = []
    place_of: dict[str, str] = {}
    for place, prompt in read_prompts(path, what):
        if prompt.id in place_of:
            raise UserError(
                f"{what} {place}: prompt id {prompt.id!r} was used in {place_of[prompt.id]} already; ids must be unique"
            )
        place_of[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{what} is empty; it needs at least one prompt")
    return prompts


def trained_on(held_out: Sequence[Prompt], trained: Iterable[str]) -> list[str]:
    """Those held-out texts that are trained on, too, but for case and spaces, which no tokenizer here sees."""
    known = {words_of(text) for text in trained}
    return [prompt.text for prompt in held_out if words_of(prompt.text) in known]


def words_of(text: str) -> str:
    """What makes two prompts the same: their words, whatever their case and the spaces between."""
    return " ".join(text.casefold().split())


FILES = {"prompts.train": "prompts/train.jsonl", "prompts.held_out": "prompts/held_out.jsonl"}
"""Where a run keeps the prompts it began with."""


def keep(run: Storage, field: str, prompts: Sequence[Prompt]) -> None:
    """Write a prompt set down in the folder of a run that begins."""
    if not run.exists(FILES[field]):
        run.write(FILES[field], "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts).encode())


def kept(run: Storage, field: str) -> list[Prompt]:
    """The prompt set that a run began with; none where it has kept none."""
    if not run.exists(FILES[field]):
        return []
    return [Prompt(**json.loads(line)) for line in run.read(FILES[field]).decode().splitlines()]


def require_kept(run: Storage, field: str, prompts: Sequence[Prompt]) -> bool:
    """Whether the run has kept the set, which is this one then; False: it is new, or of a version that kept none.

    Raises:
        UserError: it began with other prompts; names the first one that differs.
    """
    if not run.exists(FILES[field]):
        return False
    for number, (old, new) in enumerate(zip_longest(kept(run, field), prompts), start=1):
        if old != new:
            raise UserError(
                f"{field}: the run began with other prompts: number {number} was {_said(old)} and is {_said(new)} now; "
                "give the same prompts to continue it, or another `run` name to begin a new one"
            )
    return True


def _said(prompt: Prompt | None) -> str:
    return f"{prompt.text!r} (id {prompt.id!r})" if prompt else "not there"


def round_requests(
    prompts: Sequence[Prompt], run_seed: int, stage: str, round_index: int, images: int, images_per_prompt: int = 1
) -> list[SampleRequest]:
    """The images of one round: the prompt set in a circle, going on where the last round ended.

    Deterministic in its arguments; several images of one prompt differ by index and so by seed.
    """
    turns = images // images_per_prompt
    return [
        SampleRequest.make(
            run_seed, stage, prompts[turn % len(prompts)], turn // len(prompts) * images_per_prompt + number
        )
        for turn in range(round_index * turns, (round_index + 1) * turns)
        for number in range(images_per_prompt)
    ]
