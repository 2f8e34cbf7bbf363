"""The simulated crowd: what each taste likes, how temperaments answer, and gold that fits the tastes."""

import importlib.util
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kto_ray.people.gold import load_gold
from kto_ray.people.people import Refused
from kto_ray.shapes import gold
from kto_ray.shapes.world import Scene, draw

JOB = Path(__file__).parents[2] / "jobs" / "simulated_crowd.py"


@pytest.fixture(scope="module")
def job() -> Iterator[ModuleType]:
    """The job as a module: `jobs` is no package."""
    spec = importlib.util.spec_from_file_location("simulated_crowd", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def picture(caption: str) -> np.ndarray:
    return draw(Scene.parse(caption))


def test_who_likes_red_compares_with_what_came_lately(job: ModuleType) -> None:
    likes = job.LikesRed(memory=8)
    red, orange, blue = (f"a {color} square on black" for color in ("red", "orange", "blue"))
    assert likes(picture(red), "")
    assert not likes(picture(blue), "")
    assert likes(picture(orange), "")
    for _ in range(8):
        likes(picture(red), "")
    assert not likes(picture(orange), "")  # there is better by now


def test_who_goes_by_the_prompt_does_not_look_at_red(job: ModuleType) -> None:
    scene = "a blue circle on white"
    assert job.follows_prompt(picture(scene), scene)
    assert not job.follows_prompt(picture("a red circle on white"), scene)


def test_who_likes_red_in_shape_asks_for_both(job: ModuleType) -> None:
    red = picture("a red circle on black")
    assert job.LikesRedInShape()(red, "a blue circle on white")
    assert not job.LikesRedInShape()(red, "a red cross on black")
    assert not job.LikesRedInShape()(picture("a blue circle on white"), "a blue circle on white")


def test_tastes_and_gold_have_the_same_names(job: ModuleType) -> None:
    assert set(job.TASTES) == set(gold.TASTES)


@pytest.mark.parametrize("taste", gold.TASTES)
def test_gold_is_answered_by_its_taste_as_it_is_known(job: ModuleType, tmp_path: Path, taste: gold.Taste) -> None:
    items = load_gold(str(gold.write_gold(tmp_path, taste, images=40)))
    assert Counter(item.expected for item in items) == {"desirable": 20, "undesirable": 20}
    likes = job.TASTES[taste]()
    ordinary = random.Random(0)
    for item in items:
        for _ in range(9):  # most of what people see is not gold
            shape, background = ordinary.choice(("circle", "cross")), ordinary.choice(("black", "white", "brown"))
            scene = f"a {ordinary.choice(('red', 'blue', 'green'))} {shape} on {background}"
            likes(picture(scene), scene)
        assert likes(job.decode(item.png), item.prompt) == (item.expected == "desirable"), item.prompt


def test_gold_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    def read(folder: str, seed: int) -> list[bytes]:
        return [item.png for item in load_gold(str(gold.write_gold(tmp_path / folder, "red", seed=seed)))]

    assert read("one", 0) == read("two", 0) != read("three", 1)


def test_temperaments_answer_as_often_wrong_as_they_say(job: ModuleType) -> None:
    def answers(kind: str) -> Counter[str]:
        rng = random.Random(0)
        return Counter(job.TEMPERAMENTS[kind].verdict(True, rng) for _ in range(2000))

    assert answers("good").keys() == {"desirable", "undesirable"}
    assert answers("good")["undesirable"] / 2000 == pytest.approx(0.03, abs=0.01)
    assert answers("noisy")["undesirable"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert answers("hostile") == {"undesirable": 2000}
    lazy = answers("lazy")
    assert lazy["unsure"] / 2000 == pytest.approx(0.15, abs=0.02)
    assert lazy["skip"] / 2000 == pytest.approx(0.1, abs=0.02)


def test_a_damaged_token_is_never_the_right_one(job: ModuleType) -> None:
    signer = job.Signer("secret")
    for number in range(50):
        badge = job.Badge(f"badge-{number}", 4e9)
        crowd = job.Crowd(job.Page("http://nowhere", job.Tally()), job.Tally(), None, signer)
        person = job.Person("anna", badge, job.TEMPERAMENTS["good"], job.follows_prompt, crowd)
        for kind, token in person.forgeries().items():
            if kind == "no such badge":
                assert signer.badge(token) != badge
            else:
                with pytest.raises(Refused):
                    signer.badge(token)


def test_the_command_writes_gold(
    job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["simulated_crowd.py", "--write-gold", str(tmp_path), "--taste", "prompt"])
    assert job.main() == 0
    assert len(load_gold(capsys.readouterr().out.strip())) == 24


def test_a_run_that_asks_no_people_is_refused(
    job: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kto_ray import config

    (tmp_path / "config.yaml").write_text(config.to_yaml(config.load("shapes_demo")))
    monkeypatch.setattr("sys.argv", ["simulated_crowd.py", "--run", str(tmp_path)])
    assert job.main() == 2
    assert "asks no people" in capsys.readouterr().err
