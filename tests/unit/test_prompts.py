"""Prompt files: what is read, what is refused with its line, and in what order rounds go through them."""

from collections import Counter
from pathlib import Path

import pytest

from kto_ray.errors import UserError
from kto_ray.prompts import load_prompts, round_requests
from kto_ray.records import Prompt
from tests.factories import write_prompts


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts("prompts.train", str(path))
    text = str(caught.value)
    assert text.startswith("prompts.train: ")
    assert str(path) in text
    return text


def written(tmp_path: Path, content: str, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_jsonl_is_read_with_its_metadata(tmp_path: Path) -> None:
    path = written(tmp_path, '{"id": "1", "text": "a cat", "style": "oil"}\n\n{"id": "2", "text": "ein Kätzchen"}\n')
    assert load_prompts("prompts.train", str(path)) == [
        Prompt("1", "a cat", {"style": "oil"}),
        Prompt("2", "ein Kätzchen", {}),
    ]


def test_plain_text_is_a_prompt_a_line_named_by_line_number(tmp_path: Path) -> None:
    path = written(tmp_path, "a cat\n\n  a dog \r\n", "prompts.txt")
    assert load_prompts("prompts.train", str(path)) == [Prompt("1", "a cat"), Prompt("3", "a dog")]


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    text = written(tmp_path, "\ufeffa cat\n", "prompts.txt")
    jsonl = written(tmp_path, '\ufeff{"id": "1", "text": "a cat"}\n')
    assert load_prompts("f", str(text)) == load_prompts("f", str(jsonl)) == [Prompt("1", "a cat")]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    (prompt,) = load_prompts("f", str(written(tmp_path, '{"id": "1", "text": "a\u2028b\u0085c"}\n')))
    assert prompt.text == "a\u2028b\u0085c"


@pytest.mark.parametrize("source", ["shapes:train", "shapes:held_out"])
def test_the_embedded_world_has_prompts(source: str) -> None:
    prompts = load_prompts("prompts.train", source)
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 0


def test_a_missing_file_is_named_with_the_choices(tmp_path: Path) -> None:
    assert "shapes:train" in message(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_needs_a_prompt(tmp_path: Path, name: str, content: str) -> None:
    text = message(written(tmp_path, content, name))
    assert "is empty" in text
    assert "at least one prompt" in text


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a red circle", "not JSON"),
        ('["a red circle"]', '["a red circle"]'),
        ('{"id": 3, "text": "a"}', '{"id": 3'),
        ('{"id": "3"}', "no 'text'"),
        ('{"text": "a"}', "no 'id'"),
        ('{"id": "3", "text": " "}', "no 'text'"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_expected(tmp_path: Path, line: str, problem: str) -> None:
    text = message(written(tmp_path, '{"id": "1", "text": "fine"}\n\n' + line + "\n"))
    assert "line 3" in text
    assert problem in text
    assert '{"id": "1", "text": "a red circle"}' in text


def test_duplicate_ids_are_named_with_both_lines(tmp_path: Path) -> None:
    text = message(write_prompts(tmp_path / "prompts.jsonl", ["a", "b", "a"]))
    assert "line 3" in text
    assert "'a'" in text
    assert "line 1" in text
    assert "unique" in text


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein Kätzchen".encode("latin-1"))
    assert "save it as UTF-8" in message(path)


PROMPTS = [Prompt(str(i), f"prompt {i}") for i in range(5)]


def test_rounds_go_round_in_a_circle_where_the_last_ended() -> None:
    rounds = [round_requests(PROMPTS, 0, f"round-{r:05}", r, 3) for r in range(5)]
    assert [request.prompt.id for round_ in rounds for request in round_] == [str(i % 5) for i in range(15)]


def test_no_image_of_a_run_is_asked_for_twice() -> None:
    requests = [request for r in range(6) for request in round_requests(PROMPTS, 0, f"round-{r:05}", r, 7)]
    assert len({request.id for request in requests}) == len({request.seed for request in requests}) == 42
    assert max(Counter((request.prompt.id, request.index) for request in requests).values()) == 1


@pytest.mark.parametrize("images_per_prompt", [2, 3])
def test_a_prompt_may_be_drawn_several_times_in_a_row(images_per_prompt: int) -> None:
    images = 4 * images_per_prompt
    rounds = [round_requests(PROMPTS, 0, f"round-{r:05}", r, images, images_per_prompt) for r in range(5)]
    assert all(
        set(Counter(request.prompt.id for request in round_).values()) == {images_per_prompt} for round_ in rounds
    )
    in_order = [request.prompt.id for round_ in rounds for request in round_[::images_per_prompt]]
    assert in_order == [str(turn % 5) for turn in range(20)]
    requests = [request for round_ in rounds for request in round_]
    assert len({request.seed for request in requests}) == 5 * images
    # Every prompt had 4 turns: its images are numbered through.
    assert {(request.prompt.id, request.index) for request in requests} == {
        (prompt.id, index) for prompt in PROMPTS for index in range(4 * images_per_prompt)
    }


def test_a_prompt_whose_turn_comes_twice_in_a_round_has_other_images() -> None:
    requests = round_requests(PROMPTS[:2], 0, "round-00000", 0, 8, 2)
    assert [(request.prompt.id, request.index) for request in requests] == [
        *(("0", 0), ("0", 1), ("1", 0), ("1", 1), ("0", 2), ("0", 3), ("1", 2), ("1", 3))
    ]


def test_requests_follow_from_their_arguments() -> None:
    assert round_requests(PROMPTS, 3, "round-00001", 1, 8) == round_requests(PROMPTS, 3, "round-00001", 1, 8)
    other = round_requests(PROMPTS, 4, "round-00001", 1, 8)
    assert all(a.seed != b.seed for a, b in zip(round_requests(PROMPTS, 3, "round-00001", 1, 8), other, strict=True))
