"""Prompt files: what is read, what is refused with its line, and in what order rounds go through them."""

import json
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


TWO = [Prompt("a", 'a "red" circle, flat', {"Style": "flat"}), Prompt("b", "two\nlines", {"Style": "oil"})]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", 'ID,Prompt,Style\na,"a ""red"" circle, flat",flat\nb,"two\nlines",oil\n'),
        ("p.CSV", '\ufeffStyle, id, text\r\nflat, a, "a ""red"" circle, flat"\r\n\r\noil,b,"two\r\nlines"\r\n'),
        ("p.tsv", 'caption\tid\tStyle\n"a ""red"" circle, flat"\ta\tflat\n"two\nlines"\tb\toil\n'),
        ("p.json", json.dumps([{"id": p.id, "prompt": p.text, **p.metadata} for p in TWO], indent=1)),
        *(
            (name, "".join(json.dumps({"id": p.id, "Prompt": p.text, **p.metadata}) + "\n" for p in TWO))
            for name in ("p.json", "p.ndjson", "p.JSONL")
        ),
    ],
)
def test_tables_and_json_are_read_by_their_ending(tmp_path: Path, name: str, content: str) -> None:
    assert load_prompts("f", str(written(tmp_path, content, name))) == TWO


@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("p.csv", "prompt\na cat\n\na dog\n", ["1", "2"]),
        ("p.json", '["a cat", {"prompt": "a dog"}]', ["1", "2"]),
        ("p.jsonl", '{"text": "a cat"}\n\n"a dog"\n', ["1", "3"]),
    ],
)
def test_rows_without_an_id_are_named_by_their_number(tmp_path: Path, name: str, content: str, ids: list[str]) -> None:
    prompts = load_prompts("f", str(written(tmp_path, content, name)))
    assert [(prompt.id, prompt.text) for prompt in prompts] == list(zip(ids, ["a cat", "a dog"], strict=True))


def test_of_several_columns_text_comes_first_and_the_others_are_metadata(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "b", "Text": "c", "text": "a", "ID": "2", "id": "1"}\n')
    assert load_prompts("f", str(path)) == [Prompt("1", "a", {"prompt": "b", "Text": "c", "ID": "2"})]


def test_comments_and_invisible_lines_are_no_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, "# my prompts\n#\na cat\n\u200b\u200b\n\u200b\ufeff \n#hashtag cat\n", "prompts.txt")
    assert load_prompts("f", str(path)) == [Prompt("3", "a cat"), Prompt("6", "#hashtag cat")]


@pytest.mark.parametrize("name", ["prompts", "prompts.md", "prompts.jsonl.gz", "prompts.parquet"])
def test_an_unknown_ending_is_refused_with_those_that_are_known(tmp_path: Path, name: str) -> None:
    text = message(written(tmp_path, "a cat\n", name))
    assert ".txt, .csv, .tsv, .json, .jsonl, .ndjson" in text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.csv", "prompt,style\na cat,oil\na dog,oil,large\n", "line 3 has not the 2 columns"),
        ("p.csv", "prompt,style\na cat\n", "line 2 has not the 2 columns"),
        ("p.csv", "prompt,prompt\na cat,a dog\n", "not all different"),
        ("p.csv", 'prompt\na dog\n"a cat\n', "begins in line 3 cannot be read: unexpected end"),
        ("p.csv", "prompt,style\n ,oil\n", "line 2 has an empty text"),
        ("p.json", '["a cat", 7]', "item 2 is no object of strings: 7"),
        ("p.json", '["a cat",', "is not JSON"),
        ("p.json", '["a cat", " "]', "item 2 is no object of strings"),
        ("p.json", "[" * 100_000, "is not JSON"),
        ("p.json", '{"prompts": ["a cat"]}', "line 1 is no object of strings"),
        ("p.csv", "id,prompt\n1,a cat\n\n1,a dog\n", "line 4: prompt id '1' was used in line 2"),
    ],
)
def test_a_malformed_table_is_named_with_the_place(tmp_path: Path, name: str, content: str, problem: str) -> None:
    assert problem in message(written(tmp_path, content, name))


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
        ('{"id": " ", "text": "a"}', "empty id"),
        ('{"id": "3", "text": " "}', "empty text"),
        ('{"id": "3", "text": "\u200b"}', "empty text"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_expected(tmp_path: Path, line: str, problem: str) -> None:
    text = message(written(tmp_path, '{"id": "1", "text": "fine"}\n\n' + line + "\n"))
    assert "line 3" in text
    assert problem in text
    assert '{"id": "1", "text": "a red circle"}' in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"id": "3", "Style": "flat"}'),
        ("p.csv", "id,Style\n3,flat"),
        ("p.tsv", "id\tStyle\n3\tflat"),
        ("p.json", '[{"id": "3", "Style": "flat"}]'),
    ],
)
def test_a_file_without_a_column_of_texts_is_refused_with_the_columns_it_has(
    tmp_path: Path, name: str, content: str
) -> None:
    text = message(written(tmp_path, content, name))
    assert "'text', 'prompt', 'caption'" in text
    assert "'id', 'Style'" in text


def test_duplicate_ids_are_named_with_both_lines(tmp_path: Path) -> None:
    text = message(write_prompts(tmp_path / "prompts.jsonl", ["a", "b", "a"]))
    assert "line 3" in text
    assert "'a'" in text
    assert "line 1" in text
    assert "unique" in text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_file_in_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein Kätzchen".encode(encoding))
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
