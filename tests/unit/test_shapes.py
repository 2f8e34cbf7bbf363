"""The embedded world: pictures and scorer agree, captions read back, and the held-out split is fair."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from kto_ray.prompts import load_prompts
from kto_ray.records import Prompt
from kto_ray.shapes.scorer import ShapesScorer, score_picture
from kto_ray.shapes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Scene,
    all_scenes,
    covers,
    draw,
    draw_somewhere,
    is_held_out,
    mistaken_caption,
)

SCENES = all_scenes()
WORDS = {"color": list(COLORS), "shape": list(SHAPES), "background": list(BACKGROUNDS)}
Picture = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """One picture of every scene, somewhere."""
    rng = np.random.default_rng(0)
    return [draw_somewhere(scene, rng) for scene in SCENES]


# -- scorer -----------------------------------------------------------------------------------------------------------


def test_every_true_picture_passes(pictures: list[Picture]) -> None:
    rng = np.random.default_rng(1)
    pairs = [*zip(pictures, SCENES, strict=True), *((draw_somewhere(scene, rng), scene) for scene in SCENES)]
    assert min(score_picture(picture, scene) for picture, scene in pairs) >= 0.8


@pytest.mark.parametrize("position", [(27, 27), (37, 37), (27, 37), (32, 32)])
@pytest.mark.parametrize("radius", [16, 22])
@pytest.mark.parametrize("shape", SHAPES)
def test_place_and_size_do_not_matter(shape: str, radius: float, position: tuple[float, float]) -> None:
    scene = Scene("orange", shape, "gray")
    assert score_picture(draw(scene, position, radius), scene) >= 0.8


@pytest.mark.parametrize("field", ["color", "shape", "background"])
def test_one_wrong_word_is_noticed(field: str, pictures: list[Picture]) -> None:
    rng = np.random.default_rng(2)
    for picture, scene in zip(pictures, SCENES, strict=True):
        others = [word for word in WORDS[field] if word != getattr(scene, field)]
        assert score_picture(picture, replace(scene, **{field: others[rng.integers(len(others))]})) < 0.05


def test_every_pair_of_words_is_told_apart() -> None:
    for field, words in WORDS.items():
        for shown, named in itertools.permutations(words, 2):
            scene = replace(Scene("blue", "diamond", "white"), **{field: shown})
            assert score_picture(draw(scene), replace(scene, **{field: named})) < 0.05


def test_noise_and_blank_pictures_show_nothing() -> None:
    rng = np.random.default_rng(3)
    for scene in SCENES[::7]:
        noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
        blank = np.broadcast_to(np.array(BACKGROUNDS[scene.background], np.uint8), (64, 64, 3))
        flat = np.broadcast_to(np.array(COLORS[scene.color], np.uint8), (64, 64, 3))
        assert all(score_picture(picture, scene) < 0.05 for picture in (noise, blank, flat))


def test_a_little_noise_is_forgiven(pictures: list[Picture]) -> None:
    rng = np.random.default_rng(4)
    for picture, scene in list(zip(pictures, SCENES, strict=True))[::5]:
        grainy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        assert score_picture(grainy, scene) >= 0.5


def test_the_scorer_is_a_batch_of_single_scores(pictures: list[Picture]) -> None:
    prompts = [Prompt(str(i), scene.caption) for i, scene in enumerate(SCENES[:4])]
    scores = ShapesScorer().score(np.stack(pictures[:4]), prompts)
    assert scores == [score_picture(picture, scene) for picture, scene in zip(pictures[:4], SCENES[:4], strict=True)]
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores)


@pytest.mark.parametrize(
    ("images", "caption", "problem"),
    [
        (np.zeros((1, 32, 32, 3), np.uint8), "a red circle on black", "32, 32"),
        (np.zeros((1, 64, 64, 3), np.float32), "a red circle on black", "float32"),
        (np.zeros((1, 64, 64, 3), np.uint8), "a photo of a cat", "'a photo of a cat'"),
    ],
)
def test_what_cannot_be_scored_is_refused(images: npt.NDArray[np.uint8], caption: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ShapesScorer().score(images, [Prompt("1", caption)])


# -- world ------------------------------------------------------------------------------------------------------------


def test_captions_read_back() -> None:
    assert len({scene.caption for scene in SCENES}) == len(SCENES) == 192
    assert all(Scene.parse(scene.caption) == scene for scene in SCENES)


@pytest.mark.parametrize(
    "caption",
    ["", "red circle on black", "a red circle", "a black circle on red", "a red red on black", "A red circle on black"],
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="a red circle on black"):
        Scene.parse(caption)


def test_pictures_are_what_the_pipeline_makes(pictures: list[Picture]) -> None:
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in pictures)


def test_an_unknown_shape_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'star'.*circle"):
        covers("star", np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_a_careless_caption_is_right_as_often_as_said_and_wrong_in_one_word() -> None:
    rng = np.random.default_rng(5)
    scene = Scene("red", "circle", "black")
    captions = [mistaken_caption(scene, rng, share_right=0.4) for _ in range(2000)]
    assert captions.count(scene.caption) / 2000 == pytest.approx(0.4, abs=0.05)
    wrong = Counter(caption for caption in captions if caption != scene.caption)
    assert set(wrong) == {"a green circle on black", "a red triangle on black", "a red circle on white"}
    assert min(wrong.values()) > 300


@pytest.mark.parametrize("scene", SCENES[::11])
def test_a_mix_up_is_mutual(scene: Scene) -> None:
    rng = np.random.default_rng(6)
    for _ in range(10):
        mistaken = Scene.parse(mistaken_caption(scene, rng, share_right=0))
        back = {mistaken_caption(mistaken, rng, share_right=0) for _ in range(50)}
        assert mistaken != scene
        assert scene.caption in back


# -- held-out split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", list(WORDS))
def test_a_quarter_of_every_word_is_held_out(field: str) -> None:
    for word in WORDS[field]:
        scenes = [scene for scene in SCENES if getattr(scene, field) == word]
        assert sum(map(is_held_out, scenes)) * 4 == len(scenes)


@pytest.mark.parametrize("pair", list(itertools.combinations(WORDS, 2)))
def test_pairs_of_words_are_held_out_evenly_and_never_wholly(pair: tuple[str, str]) -> None:
    held_out = Counter(tuple(getattr(scene, field) for field in pair) for scene in SCENES if is_held_out(scene))
    train = Counter(tuple(getattr(scene, field) for field in pair) for scene in SCENES if not is_held_out(scene))
    everything = set(itertools.product(*(WORDS[field] for field in pair)))
    assert held_out.keys() == train.keys() == everything
    assert max(held_out.values()) - min(held_out.values()) <= 1


@pytest.mark.parametrize(("source", "held_out"), [("shapes:train", False), ("shapes:held_out", True)])
def test_the_shipped_prompts_are_the_split(source: str, held_out: bool) -> None:
    texts = [prompt.text for prompt in load_prompts("prompts", source)]
    assert sorted(texts) == sorted(scene.caption for scene in SCENES if is_held_out(scene) == held_out)
