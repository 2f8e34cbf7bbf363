"""Gold files: what is read, and every way in which one is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kto_ray.errors import UserError
from kto_ray.people.gold import load_gold


def write(folder: Path, *rows: dict[str, Any] | str) -> str:
    for place, name in enumerate(("one.png", "two.jpg")):
        Image.fromarray(np.full((8, 8, 3), 80 * place, np.uint8)).save(folder / name)
    file = folder / "gold.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


YES = {"image": "one.png", "prompt": "a black square", "answer": "desirable"}
NO = {"image": "two.jpg", "prompt": "a black square", "answer": "undesirable"}


def test_gold_is_read_with_its_images_and_ids_that_stay(tmp_path: Path) -> None:
    gold = load_gold(write(tmp_path, YES, "", NO))
    assert [(item.prompt, item.expected) for item in gold] == [
        ("a black square", "desirable"),
        ("a black square", "undesirable"),
    ]
    assert np.array_equal(Image.open(io.BytesIO(gold[0].png)), np.zeros((8, 8, 3)))
    assert Image.open(io.BytesIO(gold[1].png)).format == "PNG"
    assert [item.sample_id for item in load_gold(write(tmp_path, NO, YES))] == [
        item.sample_id for item in reversed(gold)
    ]
    assert len({item.sample_id for item in gold}) == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "line 1 is not JSON"),
        ([YES, "", {"image": "one.png", "answer": "desirable"}], "line 3: .*expected"),
        ([YES, {**NO, "answer": "no"}], "line 2: answer 'no'; expected"),
        ([YES, {**NO, "image": "three.png"}], "line 2: cannot read image 'three.png'"),
        ([YES, {**NO, "image": "gold.jsonl"}], "line 2: cannot read image 'gold.jsonl'"),
        ([YES], "must have images of both answers"),
        ([], "must have images of both answers"),
    ],
)
def test_a_gold_file_that_cannot_be_used_is_refused(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^label.human.gold.file: .*{words}"):
        load_gold(write(tmp_path, *rows))


def test_a_gold_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"no file 'nowhere\.jsonl'; give a JSONL file"):
        load_gold("nowhere.jsonl")
