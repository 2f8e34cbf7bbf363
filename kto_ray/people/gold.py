"""Gold: images with known answers, read from a file of the operator's; `queue.py` mixes them in."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from kto_ray.errors import UserError
from kto_ray.people.terms import NewItem
from kto_ray.text import read_text

EXPECTED = 'expected {"image": "gold/1.png", "prompt": "a red circle", "answer": "desirable"} or "undesirable"'


def load_gold(file: str) -> list[NewItem]:
    """Read `label.human.gold.file`.

    Raises:
        UserError: names file and line: no such file, no UTF-8, malformed line, image that cannot be read, other answer,
            or answers of one kind only (who always says yes would be right).
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"label.human.gold.file: no file {file!r}; give a JSONL file: {EXPECTED}")
    found = []
    for number, line in enumerate(read_text(path, f"label.human.gold.file: {file}").split("\n"), start=1):
        if line.strip():
            found.append(_parse(line, path, f"label.human.gold.file: {file} line {number}"))
    if len({item.expected for item in found}) < 2:
        raise UserError(f"label.human.gold.file: {file} must have images of both answers, desirable and undesirable")
    return found


def _parse(line: str, path: Path, where: str) -> NewItem:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}; {EXPECTED}") from error
    fields = ("image", "prompt", "answer")
    if not isinstance(row, dict) or any(not isinstance(row.get(field), str) for field in fields):
        raise UserError(f"{where}: {line.strip()[:80]}; {EXPECTED}")
    if row["answer"] not in ("desirable", "undesirable"):
        raise UserError(f"{where}: answer {row['answer']!r}; {EXPECTED}")
    buffer = io.BytesIO()
    try:
        with Image.open(path.parent / row["image"]) as image:
            image.convert("RGB").save(buffer, "png")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{where}: cannot read image {row['image']!r}: {error}") from error
    png = buffer.getvalue()
    proof = hashlib.sha256(png + row["prompt"].encode()).hexdigest()[:16]
    return NewItem(f"gold-{proof}", "gold", row["prompt"], png, expected=row["answer"])
