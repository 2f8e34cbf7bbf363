"""YAML 1.2: what plain words are, what is refused, and that what is written is read again by either version."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kto_ray.cli import main
from kto_ray.config import load, yaml12
from kto_ray.errors import UserError
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e1", 10.0), ("1e-4", 1e-4), ("1E+2", 100.0), ("-.5", -0.5), ("1.", 1.0), (".inf", math.inf)),
        *(("7", 7), ("-7", -7), ("+7", 7), ("007", 7), ("010", 10), ("0o17", 15), ("0x1f", 31)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
        # Of these YAML 1.1 makes booleans, numbers, times and dates.
        *((word, word) for word in ("yes", "No", "on", "off", "OFF", "y", "12:30", "1_000", "0b1", "2026-11-25", "=")),
        *((f'"{word}"', word) for word in ("1e1", "true", "", "7")),
    ],
)
def test_plain_words_are_what_the_core_schema_says(text: str, value: Any) -> None:
    found = yaml12.load(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


words = st.sampled_from(["1e1", "off", "yes", "0o17", "09", "007", "1_0", "2026-11-25", "12:30", "<<", "=", "~", ""])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | words
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | words, inner, max_size=3)
)


@given(trees)
def test_what_is_written_is_read_again_by_either_version(tree: Any) -> None:
    assert yaml12.load(yaml12.dump(tree)) == yaml.safe_load(yaml12.dump(tree)) == tree


# -- recipes, overrides, saved configurations -------------------------------------------------------------------------


def recipe(folder: Path, content: str | bytes) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refusal(folder: Path, content: str | bytes) -> str:
    path = recipe(folder, content)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"recipe {path} ")
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "run: a\ntrain:\n  beta: 75\nseed: 1\ntrain:\n  epochs: 1\n",
        "run: a\n'train': {beta: 75}\n\n\ntrain: {epochs: 1}\n",
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path, content: str) -> None:
    text = refusal(tmp_path, content)
    assert "'train'" in text
    assert "line 2" in text
    assert "line 5" in text


def test_a_key_that_stands_twice_deep_in_arguments_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, "label:\n  scorers:\n    redness:\n      args: {a: {b: 1,\n        b: 2}}\n")
    assert "'b'" in text
    assert "line 4" in text
    assert "line 5" in text


def test_a_merged_key_may_be_said_again(tmp_path: Path) -> None:
    content = "generate: {resources: &d {num_cpus: 1, threads: 2}}\ntrain: {resources: {<<: *d, threads: 1}}\n"
    config = load(recipe(tmp_path, content))
    assert (config.train.resources.num_cpus, config.train.resources.threads) == (1, 1)
    assert config.generate.resources.threads == 2


def test_an_override_reaches_one_of_two_aliases(tmp_path: Path) -> None:
    path = recipe(tmp_path, "generate: {resources: &d {num_cpus: 1, threads: 2}}\ntrain: {resources: *d}\n")
    config = load(path, ["train.resources.threads=1"])
    assert (config.generate.resources.threads, config.train.resources.threads) == (2, 1)


def test_numbers_are_numbers_inside_arguments_too(tmp_path: Path) -> None:
    config = load(recipe(tmp_path, "label: {labeler_args: {low: 1e1}, scorers: {redness: {args: {x: 1e-4}}}}"))
    assert config.label.labeler_args == {"low": 10.0}
    assert config.label.scorers["redness"].args == {"x": 1e-4}
    assert load(None, ["label.labeler_args.low=1e1"]).label.labeler_args == {"low": 10.0}


def test_off_is_a_word_where_a_field_has_that_word(tmp_path: Path) -> None:
    assert load(None, ["label.watch.action=off"]).label.watch.action == "off"
    assert load(recipe(tmp_path, "label: {watch: {action: off}}")).label.watch.action == "off"
    assert load(None, ["train.watch=off"]).train.watch.action == "off"
    assert load(None, ["tracking.tensorboard=off"]).tracking.tensorboard is False


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    assert "save it as UTF-8" in refusal(tmp_path, "run: café\n".encode(encoding))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load(recipe(tmp_path, "model: Übung\r\nseed: 3\r\n".encode("utf-8-sig"))) == load(
        None, ["model=Übung", "seed=3"]
    )


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("train:\n\tbeta: 75\n", ["tab", "line 2"]),
        ("run: a\n---\nrun: b\n", ["single document", "line 2"]),
        ("run: !!int many\n", ["many"]),
        ("seed: !!python/object/apply:os.getpid []\n", ["python/object"]),
        ("false\n", ["mapping of fields"]),
        ("run: " + "[" * 5000, ["recursion"]),
    ],
)
def test_what_cannot_be_a_recipe_is_refused(tmp_path: Path, content: str, problems: list[str]) -> None:
    text = refusal(tmp_path, content)
    assert all(problem.replace("tab", "\\t") in text for problem in problems)


@pytest.mark.parametrize("name", ["2024 #1", "#1", "2026-11-25", 'the "best" # so far'])
def test_an_override_is_taken_whole(name: str) -> None:
    assert load(None, [f"prompts.train={name}"]).prompts.train.source == name


@pytest.mark.parametrize("text", ["{", "7", "{a: 1, a: 2}"])
def test_arguments_of_a_check_are_refused_in_a_sentence(text: str) -> None:
    outcome = CliRunner().invoke(main, ["check", "scorer", "nowhere:Nobody", "--args", text])
    assert outcome.exit_code == 2
    assert f"'{text}' is not" in outcome.stderr


def test_a_comment_in_a_recipe_is_one(tmp_path: Path) -> None:
    assert load(recipe(tmp_path, "# mine\nrun: a #1\n")).run == "a"


def test_a_run_of_an_earlier_release_opens(tmp_path: Path) -> None:
    config = load("sd15_lora", ["run=off", "label.scorers.pickscore.args={note: 'yes'}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert saved_config(Storage(str(tmp_path))) == config
