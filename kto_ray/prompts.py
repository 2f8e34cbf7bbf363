"""Prompt sets: read a file, or take the embedded world's.

The loop cycles through the training set, round after round; the held-out set is only ever evaluated on.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from kto_ray.errors import UserError
from kto_ray.records import Prompt, SampleRequest
from kto_ray.shapes import HELD_OUT_PROMPTS, TRAIN_PROMPTS

BUILT_IN = {"shapes:train": TRAIN_PROMPTS, "shapes:held_out": HELD_OUT_PROMPTS}
EXPECTED = 'expected an object of strings such as {"id": "1", "text": "a red circle"}'


def load_prompts(field: str, source: str) -> list[Prompt]:
    """Read a prompt set.

    Args:
        field: name of the configuration field, for messages.
        source: "shapes:train", "shapes:held_out", or a UTF-8 file: JSONL with "id", "text" and further string keys as
            metadata, or (any other ending than .jsonl) plain text with a prompt a line, whose line number is its id.

    Raises:
        UserError: names file and line: no such file, no prompts, malformed line, empty text, id that was there before.
    """
    path = BUILT_IN.get(source, Path(source))
    if not path.is_file():
        raise UserError(
            f"{field}: no prompts file {source!r}; give a .jsonl or text file, or one of {', '.join(BUILT_IN)}"
        )
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {source} is not UTF-8 text: {error}; save it as UTF-8") from error
    # Not splitlines(): a JSON string may contain U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{field}: {source} line {number}"
        if not line.strip():
            continue
        prompt = _parse(line, where) if path.suffix == ".jsonl" else Prompt(str(number), line.strip())
        if prompt.id in line_of:
            raise UserError(
                f"{where}: prompt id {prompt.id!r} was used in line {line_of[prompt.id]} already; ids must be unique"
            )
        line_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{field}: {source} is empty; it needs at least one prompt")
    return prompts


def _parse(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}; {EXPECTED}") from error
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise UserError(f"{where} is no object of strings: {line.strip()[:80]}; {EXPECTED}")
    for key in ("id", "text"):
        if not row.get(key, "").strip():
            raise UserError(f"{where} has no {key!r}; {EXPECTED}")
    return Prompt(row.pop("id"), row.pop("text"), row)


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
