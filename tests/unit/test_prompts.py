"""Prompt files: what is read, what is refused with its line, and in what order rounds go through them."""

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.config import PromptSet
from kto_ray.errors import UserError
from kto_ray.prompt_files import split_of
from kto_ray.prompts import keep, load_prompts, prompts_of, round_requests
from kto_ray.records import Prompt
from kto_ray.storage import Storage
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


def named(*texts: str) -> list[Prompt]:
    """By SHA-256, as prompts without an id are."""
    return [Prompt(sha256(text.encode()).hexdigest()[:16], text) for text in texts]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a cat\n\n  a dog \r\n", "prompts.txt")
    assert load_prompts("prompts.train", str(path)) == named("a cat", "a dog")


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    text = written(tmp_path, "\ufeffa cat\n", "prompts.txt")
    jsonl = written(tmp_path, '\ufeff{"id": "1", "text": "a cat"}\n')
    assert load_prompts("f", str(text)) == named("a cat")
    assert load_prompts("f", str(jsonl)) == [Prompt("1", "a cat")]


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
    ("name", "content"),
    [
        ("p.csv", "prompt\na cat\n\na dog\n"),
        ("p.json", '["a cat", {"prompt": "a dog"}]'),
        ("p.jsonl", '{"text": "a cat"}\n\n"a dog"\n'),
    ],
)
def test_a_prompt_without_an_id_is_named_by_its_text(tmp_path: Path, name: str, content: str) -> None:
    assert load_prompts("f", str(written(tmp_path, content, name))) == named("a cat", "a dog")


def test_names_made_from_texts_stay_when_a_line_comes_before(tmp_path: Path) -> None:
    (dog,) = load_prompts("f", str(written(tmp_path, "a dog\n", "one.txt")))
    assert dog in load_prompts("f", str(written(tmp_path, "a cat\na dog\n", "two.txt")))


def test_texts_that_repeat_are_said_and_named_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "a cat\na dog\n A  cat\na cat\n", "p.txt")
    prompts = load_prompts("prompts.train", str(path))
    assert len({prompt.id for prompt in prompts}) == 4
    assert prompts[3].id == f"{prompts[0].id}-2"
    assert "2 of 4 prompts have the text of an earlier one" in caplog.text
    assert "line 3 has that of line 1, 'A  cat'" in caplog.text


def test_of_several_columns_text_comes_first_and_the_others_are_metadata(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "b", "Text": "c", "text": "a", "ID": "2", "id": "1"}\n')
    assert load_prompts("f", str(path)) == [Prompt("1", "a", {"prompt": "b", "Text": "c", "ID": "2"})]


def test_comments_and_invisible_lines_are_no_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, "# my prompts\n#\na cat\n\u200b\u200b\n\u200b\ufeff \n#hashtag cat\n", "prompts.txt")
    assert load_prompts("f", str(path)) == named("a cat", "#hashtag cat")


@pytest.mark.parametrize("name", ["prompts", "prompts.md", "prompts.jsonl.gz", "prompts.xlsx"])
def test_an_unknown_ending_is_refused_with_those_that_are_known(tmp_path: Path, name: str) -> None:
    text = message(written(tmp_path, "a cat\n", name))
    assert ".txt, .csv, .tsv, .json, .jsonl, .ndjson, .parquet, .arrow" in text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.csv", "prompt,style\na cat,oil\na dog,oil,large\n", "line 3 has not the 2 columns"),
        ("p.csv", "prompt,style\na cat\n", "line 2 has not the 2 columns"),
        ("p.csv", "prompt,prompt\na cat,a dog\n", "not all different"),
        ("p.csv", 'prompt\na dog\n"a cat\n', "begins in line 3 cannot be read: unexpected end"),
        ("p.csv", "prompt,style\n ,oil\n", "line 2 has an empty text"),
        ("p.json", '["a cat", 7]', "item 2 is no object, and no text: 7"),
        ("p.json", '["a cat",', "is not JSON"),
        ("p.json", '["a cat", " "]', "item 2 has an empty text"),
        ("p.json", "[" * 100_000, "is not JSON"),
        ("p.json", '{"prompts": ["a cat"]}', "line 1 has a text of type list"),
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
        ('{"id": "3", "text": null}', "empty text"),
        ('{"id": "3", "text": 7}', "a text of type int"),
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
    assert "'text', 'prompt', 'prompts', 'caption'" in text
    assert "'id', 'Style'" in text
    assert "text=COLUMN" in text


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


# -- layouts as they are downloaded -----------------------------------------------------------------------------------


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_partiprompts_are_read_as_downloaded(tmp_path: Path) -> None:
    """Nothing is quoted there, and some prompts begin with, or hold, a quotation mark; notes may be empty."""
    content = (
        "Prompt\tCategory\tChallenge\tNote\n"
        "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
        '"GIGGLE" painted in thick lettering on a wall.\tIllustrations\tWriting & Symbols\t\n'
        'a sign that reads "STOP".\tIllustrations\tWriting & Symbols\t\n'
    )
    prompts = load_prompts("f", str(written(tmp_path, content, "PartiPrompts.tsv")))
    assert texts(prompts) == ["bond", '"GIGGLE" painted in thick lettering on a wall.', 'a sign that reads "STOP".']
    assert prompts[0].metadata == {
        "Category": "Abstract",
        "Challenge": "Basic",
        "Note": "Biology-inspired concepts with multiple meanings",
    }


def test_drawbench_is_read_as_downloaded(tmp_path: Path) -> None:
    content = 'Prompts,Category\nA red colored car.,Colors\n"A panda, making latte art.",Gary Marcus et al. \n'
    prompts = load_prompts("f", str(written(tmp_path, content, "DrawBench.csv")))
    assert texts(prompts) == ["A red colored car.", "A panda, making latte art."]
    assert prompts[1].metadata == {"Category": "Gary Marcus et al. "}


def test_hpd_is_read_as_downloaded(tmp_path: Path) -> None:
    """A list of texts for each style; and a table of what people preferred, with lists in it."""
    for style in ("anime", "photo"):
        written(tmp_path, json.dumps([f"{style} of a cat", f"{style} of a dog"], indent=0), f"{style}.json")
    assert texts(load_prompts("f", str(tmp_path))) == [
        *("anime of a cat", "anime of a dog", "photo of a cat", "photo of a dog")
    ]
    rows = [{"prompt": "a cat", "image_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0], "raw": None}]
    (tmp_path / "test").mkdir()
    (prompt,) = load_prompts("f", str(written(tmp_path / "test", json.dumps(rows), "test.json")))
    assert prompt.metadata == {"image_path": '["0.jpg", "1.jpg"]', "human_preference": "[1, 0]"}


def test_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    (prompt,) = load_prompts(
        "f", str(written(tmp_path, '{"id": 7, "prompt": "a cat", "aesthetic": 0.5, "nsfw": false}'))
    )
    assert prompt == Prompt("7", "a cat", {"aesthetic": "0.5", "nsfw": "false"})


def write_parquet(path: Path, *prompts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "caption": list(prompts),
        "width": list(range(len(prompts))),
        "image": [{"bytes": b"png", "path": "1.png"}] * len(prompts),
        "thumbnail": [b"png"] * len(prompts),
    }
    pq.write_table(pa.table(table), path)


def test_parquet_is_read_without_its_pictures(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet", "a cat", "a dog")
    prompts = load_prompts("f", str(tmp_path / "p.parquet"))
    assert [(prompt.text, prompt.metadata) for prompt in prompts] == [
        ("a cat", {"width": "0"}),
        ("a dog", {"width": "1"}),
    ]
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in named("a cat", "a dog")]


def test_the_folder_of_a_dataset_has_splits(tmp_path: Path) -> None:
    """Laid out as on the Hugging Face hub, with what else lies there."""
    for name in ("README.md", ".gitattributes", "LICENSE.txt", "dataset_infos.json"):
        written(tmp_path, "{}", name)
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", "a cat")
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", "a dog")
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", "a cow")
    assert texts(load_prompts("f", PromptSet(source=str(tmp_path), split="train"))) == ["a cat", "a dog"]
    assert texts(load_prompts("f", PromptSet(source=str(tmp_path), split="test"))) == ["a cow"]
    assert "has the splits test, train; say which one: split=test" in message(tmp_path)
    with pytest.raises(UserError, match="has no split 'val'; it has test, train"):
        load_prompts("f", PromptSet(source=str(tmp_path), split="val"))


def test_what_datasets_has_saved_to_disk_is_read(tmp_path: Path) -> None:
    """`DatasetDict.save_to_disk`: a folder a split with Arrow streams, and JSON beside them."""
    written(tmp_path, '{"splits": ["train", "fold"]}', "dataset_dict.json")
    for split, text in (("train", "a cat"), ("fold", "a dog")):
        (tmp_path / split).mkdir()
        for name in ("state.json", "dataset_info.json"):
            written(tmp_path / split, "{}", name)
        table = pa.table({"text": [text]})
        with pa.ipc.new_stream(tmp_path / split / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
    assert texts(load_prompts("f", PromptSet(source=str(tmp_path), split="fold"))) == ["a dog"]
    assert texts(load_prompts("f", PromptSet(source=str(tmp_path / "train")))) == ["a cat"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("data/my_validation_set.jsonl", "validation"),
        ("val/0.parquet", "validation"),
        ("prompts.txt", "train"),
        ("contest/prompts.txt", "train"),
        ("testing-2.txt", "test"),
        ("default/hard.v2-00003-of-00010.parquet", "hard.v2"),
    ],
)
def test_the_split_of_a_file_follows_from_its_path(name: str, split: str) -> None:
    assert split_of(name) == split


def test_a_folder_is_of_one_kind(tmp_path: Path) -> None:
    assert "no file of prompts there" in message(tmp_path)
    written(tmp_path, "a cat\n", "a.txt")
    written(tmp_path, "prompt\na cat\n", "b.csv")
    assert "several kinds, .csv, .txt" in message(tmp_path)


@pytest.mark.parametrize("name", ["p.parquet", "p.arrow"])
def test_a_damaged_table_is_named(tmp_path: Path, name: str) -> None:
    assert "file that can be read" in message(written(tmp_path, "a cat", name))


def test_files_and_folders_are_read_from_anywhere(tmp_path: Path) -> None:
    there = Storage(f"memory:/{tmp_path}")
    there.write("set/p.csv", b"Prompt\na cat\n")
    for source in (f"{there}/set/p.csv", f"{there}/set", f"{there}/set/"):
        assert texts(load_prompts("f", source)) == ["a cat"]
    with pytest.raises(UserError, match=r"^prompts.train: memory:.*gone.csv: there is no such file"):
        load_prompts("prompts.train", f"{there}/gone.csv")
    with pytest.raises(UserError, match=r"^prompts.train: nowhere://p/x.csv: cannot open"):
        load_prompts("prompts.train", "nowhere://p/x.csv")


def test_a_dataset_is_read_from_s3(s3_bucket: str) -> None:
    there = Storage(f"{s3_bucket}/parti")
    there.write("data/train.tsv", b"Prompt\tNote\na cat\t\n")
    there.write("data/test.tsv", b"Prompt\tNote\na dog\t\n")
    there.write("README.md", b"")
    assert texts(load_prompts("f", PromptSet(source=str(there), split="test"))) == ["a dog"]
    assert texts(load_prompts("f", f"{there}/data/train.tsv")) == ["a cat"]


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, "key,prompt,de\n1,a cat,eine Katze\n")
    path = path.rename(path.with_suffix(".csv"))
    assert load_prompts("f", PromptSet(source=str(path), text="de", id="key")) == [
        Prompt("1", "eine Katze", {"prompt": "a cat"})
    ]
    with pytest.raises(UserError, match="line 2 has no column 'fr'; it has 'key', 'prompt', 'de'"):
        load_prompts("f", PromptSet(source=str(path), text="fr"))


# -- templates, weights, order ----------------------------------------------------------------------------------------


def from_text(tmp_path: Path, content: str, **settings: Any) -> list[Prompt]:
    path = written(tmp_path, content, "t.jsonl" if content.startswith("{") else "t.txt")
    return load_prompts("prompts.train", PromptSet.model_validate({"source": str(path), **settings}))


def test_slots_are_filled_with_every_combination(tmp_path: Path) -> None:
    slots = {"color": ["red", "blue"], "animal": ["cat", "dog", "cow"]}
    prompts = from_text(tmp_path, "a {color} {animal}, {{flat}}, {color}\nno slot\n", slots=slots)
    expected = {f"a {color} {animal}, {{flat}}, {color}" for color in slots["color"] for animal in slots["animal"]}
    assert {prompt.text for prompt in prompts} == {"no slot"} | expected
    assert len(prompts) == 7
    assert dict(next(p.metadata for p in prompts if "blue dog" in p.text)) == {"color": "blue", "animal": "dog"}
    again = from_text(tmp_path, "no slot\na {color} {animal}, {{flat}}, {color}\n", slots=slots)
    assert again == prompts, "order and names follow from the texts"
    assert [prompt.id for prompt in prompts] == sorted(prompt.id for prompt in prompts), "mixed, by digest"


def test_a_template_with_an_id_gives_it_to_its_prompts(tmp_path: Path) -> None:
    prompts = from_text(tmp_path, '{"id": "pet", "text": "a {animal}"}', slots={"animal": ["cat", "dog"]})
    assert sorted(prompt.id for prompt in prompts) == ["pet-cat", "pet-dog"]


@pytest.mark.parametrize(
    ("content", "slots", "problem"),
    [
        ("a {color} cat", {"colour": ["red"]}, "slots has no values for {color} of 'a {color} cat'; it has colour"),
        ("a cat", {"color": ["red"]}, "no prompt has that slot"),
        ("a {color cat", {"color": ["red"]}, "is no template: expected '}'"),
        ("a {0} cat", {"color": ["red"]}, "has a slot '0' that is no name"),
        ("a {color:>9} cat", {"color": ["red"]}, "has a slot 'color' that is no name"),
        ("a {color} cat", {"color": []}, "slots.color is empty"),
        ("a {a} {b} {c}", {name: [str(i) for i in range(101)] for name in "abc"}, "make 1,030,301 prompts; 1,000,000"),
        ('{"text": "a {color} cat", "color": "red"}', {"color": ["red"]}, "a column 'color' and a slot of that name"),
    ],
)
def test_templates_that_do_not_fit_their_slots(
    tmp_path: Path, content: str, slots: dict[str, list[str]], problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        from_text(tmp_path, content, slots=slots)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("prompts.train: ")


def test_a_weight_is_how_often_a_turn_comes(tmp_path: Path) -> None:
    rows = [{"text": "often", "share": 3}, {"text": "once"}, {"text": "twice", "share": "2"}]
    content = "".join(json.dumps({"share": 1} | row) + "\n" for row in rows)
    prompts = from_text(tmp_path, content, weight="share")
    assert texts(prompts) == ["often", "twice", "often", "once", "twice", "often"]
    assert not prompts[0].metadata
    requests = [r for index in range(4) for r in round_requests(prompts, 0, f"round-{index:05}", index, 6, 2)]
    assert Counter(request.prompt.text for request in requests) == {"often": 12, "twice": 8, "once": 4}
    for text, images in (("often", 12), ("twice", 8), ("once", 4)):
        assert [request.index for request in requests if request.prompt.text == text] == list(range(images))


def test_values_of_slots_have_weights(tmp_path: Path) -> None:
    prompts = from_text(
        tmp_path, "a {size} {color} cat", slots={"size": {"big": 2, "small": 1}, "color": ["red", "red"]}
    )
    assert Counter(texts(prompts)) == {"a big red cat": 4, "a small red cat": 2}


@pytest.mark.parametrize("weight", ["0", "-1", "1.5", "much", "1001", ""])
def test_weights_are_whole_numbers(tmp_path: Path, weight: str) -> None:
    with pytest.raises(UserError, match=r"line 1 has the weight '.*' in 'w'; give a whole number from 1 to 1000"):
        from_text(tmp_path, json.dumps({"text": "a", "w": weight}), weight="w")


def test_held_out_prompts_have_no_weights() -> None:
    with pytest.raises(UserError, match=r"^prompts.held_out.weight: 'w': held-out prompts have no weights"):
        load_prompts("prompts.held_out", PromptSet(source="shapes:held_out", weight="w"))


def test_a_sorted_file_can_be_mixed(tmp_path: Path) -> None:
    content = "".join(f"{topic} {i}\n" for topic in ("animals", "cars") for i in range(20))
    mixed = texts(from_text(tmp_path, content, mix=True))
    assert sorted(mixed) == sorted(texts(from_text(tmp_path, content)))
    assert 3 < sum(text.startswith("cars") for text in mixed[:20]) < 17


# -- a source of one's own --------------------------------------------------------------------------------------------


class Counted:
    def __init__(self, dogs: int) -> None:
        self.dogs = dogs

    def __iter__(self) -> Iterator[Prompt | str | dict[str, Any]]:
        yield Prompt("first", "a cat", {"style": "oil"})
        yield {"prompt": "a cow", "size": 3}
        yield from (f"{i} dogs" for i in range(self.dogs))


def generated() -> Iterator[str]:
    yield "a cat"


def endless() -> Iterator[str]:
    return (f"{i} cats" for i in count())


def a_text() -> str:
    return "a cat"


def one_of_none() -> list[None]:
    return [None]


def own(name: str, **args: Any) -> list[Prompt]:
    return load_prompts("prompts.train", PromptSet(source=f"{__name__}:{name}", args=args))


def test_a_source_of_ones_own_gives_prompts_texts_or_columns() -> None:
    prompts = own("Counted", dogs=2)
    assert prompts[0] == Prompt("first", "a cat", {"style": "oil"})
    assert prompts[1].metadata == {"size": "3"}
    assert texts(prompts) == ["a cat", "a cow", "0 dogs", "1 dogs"]
    assert own("generated") == named("a cat")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "has no class or function 'missing'"),
        ("a_text", "gives a str; give prompts one after the other"),
        ("one_of_none", "prompt 1 is no object, and no text: null"),
    ],
)
def test_a_source_of_ones_own_that_gives_no_prompts(name: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        own(name)
    assert str(caught.value).startswith("prompts.train: ")
    assert problem in str(caught.value)


def test_a_source_without_an_end_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kto_ray.prompts.MAX_PROMPTS", 1000)
    with pytest.raises(UserError, match="gives more than 1,000 prompts; does it ever end"):
        own("endless")


def test_settings_that_do_not_belong_to_the_source() -> None:
    with pytest.raises(UserError, match="args are for a source of one's own"):
        load_prompts("f", PromptSet(source="p.txt", args={"a": 1}))
    with pytest.raises(UserError, match="split='x' chooses among files of a folder"):
        load_prompts("f", PromptSet(source=f"{__name__}:generated", split="x"))


# -- names that a run began with --------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_names_that_it_began_with(tmp_path: Path) -> None:
    """Prompts of files without ids were once named by their number."""
    run, settings = Storage(str(tmp_path / "run")), PromptSet(source=str(written(tmp_path, "a cat\na dog\n", "p.txt")))
    assert prompts_of(run, "prompts.train", settings) == named("a cat", "a dog")
    run.write("config.yaml", b"")  # of 0.1.0, which kept no prompts
    numbered = [Prompt("1", "a cat"), Prompt("2", "a dog")]
    assert prompts_of(run, "prompts.train", settings) == numbered
    keep(run, "prompts.train", numbered)
    assert prompts_of(run, "prompts.train", settings) == numbered
    written(tmp_path, "a cat\na cow\n", "p.txt")
    assert prompts_of(run, "prompts.train", settings) == named("a cat", "a cow")
