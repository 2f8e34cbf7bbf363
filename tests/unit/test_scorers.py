"""The scorers of the main environment, against formulations of their own on tiny random checkpoints."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from PIL import Image
from transformers import CLIPModel

from kto_ray.config import Labeling, ScorerSettings
from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.protocol import Scorer
from kto_ray.score.scorers import SCORERS, load_scorer
from kto_ray.score.scorers.aesthetic import Aesthetic
from kto_ray.score.scorers.clip import Clip
from kto_ray.score.scorers.clip_score import ClipScore
from kto_ray.score.scorers.function import Function
from kto_ray.score.scorers.jpeg_size import JpegSize
from kto_ray.score.scorers.pickscore import PickScore
from kto_ray.score.scorers.redness import Redness
from kto_ray.shapes.world import Scene, draw
from tests.checkpoints import (
    CLIP_MEAN,
    CLIP_PIXELS,
    CLIP_STD,
    LOGIT_SCALE,
    edit_safetensors,
    truncate,
    write_aesthetic_head,
    write_clip,
)
from tests.pipelines import TOKENS

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

TEXTS = ["a red circle on black", "white", "", "a blue square on white on black on white on black"]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def wide_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With vectors as wide as the aesthetic predictor wants them, and the older preprocessor_config.json."""
    return write_clip(tmp_path_factory.mktemp("wide_clip"), width=768, preprocessor="old")


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aesthetic_head(tmp_path_factory.mktemp("head") / "head.pth")


def pictures(height: int, width: int) -> Images:
    """A drawing, noise, one colour, and a slope: uint8 of shape (4, height, width, 3), read-only."""
    rng = np.random.default_rng(height * width)
    drawing = Image.fromarray(draw(Scene("red", "circle", "black"))).resize((width, height))
    slope = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    colour = np.full((height, width, 3), (200, 30, 90), np.uint8)
    images_BHWC = np.stack([np.asarray(drawing), noise, colour, slope])
    images_BHWC.flags.writeable = False
    return images_BHWC


# -- independent formulations -----------------------------------------------------------------------------------------


def prepare(image_HWC: Images) -> torch.Tensor:
    """Short side to 16 by bicubic interpolation, central 16x16, intensities minus mean by standard deviation."""
    height, width = image_HWC.shape[:2]
    short = min(height, width)
    height, width = CLIP_PIXELS * height // short, CLIP_PIXELS * width // short
    image = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - CLIP_PIXELS) // 2, (height - CLIP_PIXELS) // 2
    cropped = np.asarray(image.crop((left, top, left + CLIP_PIXELS, top + CLIP_PIXELS)), np.float64)
    return torch.from_numpy((cropped / 255 - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)[None]


def tokenize(folder: Path, text: str) -> torch.Tensor:
    """Start, one token a word (the tiny tokenizer knows them all), end; at most 8 of them."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = [vocabulary[f"{word}</w>"] for word in text.split()][: TOKENS - 2]
    return torch.tensor([[vocabulary["<|startoftext|>"], *words, vocabulary["<|endoftext|>"]]])


@torch.inference_mode()
def vectors(folder: Path, images_BHWC: Images, texts: Sequence[str]) -> tuple[Floats, Floats]:
    """Unit vectors in float64 of images and texts, one pair at a time: no batches, no padding."""
    model = CLIPModel.from_pretrained(folder).double().eval()
    pairs = [
        model(input_ids=tokenize(folder, text), pixel_values=prepare(image_HWC))
        for image_HWC, text in zip(images_BHWC, texts, strict=True)
    ]
    return (
        np.concatenate([pair.image_embeds.numpy() for pair in pairs]),
        np.concatenate([pair.text_embeds.numpy() for pair in pairs]),
    )


SIZES = [(16, 16), (64, 64), (40, 71), (33, 24), (5, 9)]


@pytest.mark.parametrize("size", SIZES)
def test_clip_score_is_a_hundred_times_the_cosine_or_nothing(clip_folder: Path, size: tuple[int, int]) -> None:
    images_BHWC = pictures(*size)
    images_BD, texts_BD = vectors(clip_folder, images_BHWC, TEXTS)
    cosines = (images_BD * texts_BD).sum(1)
    scores = ClipScore(str(clip_folder)).score(images_BHWC, PROMPTS)
    assert scores == pytest.approx(list(100 * np.maximum(cosines, 0)), abs=2e-3)
    assert max(scores) - min(scores) > 5


def test_clip_score_of_opposites_is_zero(clip_folder: Path) -> None:
    rng = np.random.default_rng(0)
    images_BHWC = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
    texts = ["red", "white", "blue"] * 4
    images_BD, texts_BD = vectors(clip_folder, images_BHWC, texts)
    cosines = (images_BD * texts_BD).sum(1)
    assert cosines.min() < 0 < cosines.max()
    scores = ClipScore(str(clip_folder)).score(images_BHWC, [Prompt(text, text) for text in texts])
    assert [score == 0 for score in scores] == list(cosines <= 0)


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_is_the_cosine_at_the_models_temperature(clip_folder: Path, size: tuple[int, int]) -> None:
    images_BHWC = pictures(*size)
    images_BD, texts_BD = vectors(clip_folder, images_BHWC, TEXTS)
    expected = np.exp(LOGIT_SCALE) * (images_BD * texts_BD).sum(1)
    scores = PickScore(str(clip_folder)).score(images_BHWC, PROMPTS)
    assert scores == pytest.approx(list(expected), abs=2e-3)
    assert max(scores) - min(scores) > 5


@pytest.mark.parametrize("size", SIZES)
def test_the_aesthetic_score_is_a_product_of_matrices(
    wide_clip_folder: Path, head: Path, size: tuple[int, int]
) -> None:
    images_BHWC = pictures(*size)
    values_BD, _ = vectors(wide_clip_folder, images_BHWC, TEXTS)
    weights = {name: value.double().numpy() for name, value in torch.load(head, weights_only=True).items()}
    for layer in (0, 2, 4, 6, 7):
        values_BD = values_BD @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    scorer = Aesthetic(str(head), clip=str(wide_clip_folder))
    assert scorer.score(images_BHWC, PROMPTS) == pytest.approx(list(values_BD[:, 0]), abs=2e-5)
    assert scorer.score(images_BHWC, PROMPTS[::-1]) == scorer.score(images_BHWC, PROMPTS), "it looks at the prompts"
    assert np.ptp(values_BD) > 1e-3


def test_redness_counts_channels() -> None:
    images_BHWC = pictures(24, 40)
    expected = []
    for image_HWC in images_BHWC:
        red, green, blue = (int(image_HWC[:, :, channel].astype(int).sum()) for channel in range(3))
        expected.append((red - (red + green + blue) / 3) / (24 * 40 * 255))
    assert Redness().score(images_BHWC, PROMPTS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("colour", "score"), [((255, 0, 0), 2 / 3), ((0, 255, 255), -2 / 3), ((90, 90, 90), 0), ((255, 255, 0), 1 / 3)]
)
def test_redness_has_the_documented_range(colour: tuple[int, int, int], score: float) -> None:
    image = np.full((1, 4, 4, 3), colour, np.uint8)
    assert Redness().score(image, PROMPTS[:1]) == pytest.approx([score])


def test_jpeg_size_is_that_of_the_file(tmp_path: Path) -> None:
    images_BHWC = pictures(64, 48)
    sizes = []
    for i, image_HWC in enumerate(images_BHWC):
        Image.fromarray(image_HWC).save(tmp_path / f"{i}.jpg", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    assert JpegSize("incompressible").score(images_BHWC, PROMPTS) == sizes
    assert JpegSize("compressible").score(images_BHWC, PROMPTS) == [-size for size in sizes]
    assert JpegSize().score(images_BHWC, PROMPTS) == [-size for size in sizes]
    noise, colour = sizes[1], sizes[2]
    assert noise > 3 * colour


def test_an_unknown_goal_lists_the_known() -> None:
    with pytest.raises(UserError, match="'small' is not one of compressible, incompressible"):
        JpegSize("small")  # type: ignore[arg-type]


# -- what every scorer promises ---------------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[Path, Path, Path], Scorer]] = {
    "clip_score": lambda clip, wide, head: ClipScore(str(clip)),
    "pickscore": lambda clip, wide, head: PickScore(str(clip)),
    "aesthetic": lambda clip, wide, head: Aesthetic(str(head), clip=str(wide)),
    "redness": lambda clip, wide, head: Redness(),
    "jpeg_size": lambda clip, wide, head: JpegSize(),
    "function": lambda clip, wide, head: Function(f"{__name__}:brightness", scale=2),
}


@pytest.fixture(scope="session", params=BUILDERS)
def scorer(request: pytest.FixtureRequest, clip_folder: Path, wide_clip_folder: Path, head: Path) -> Scorer:
    return BUILDERS[request.param](clip_folder, wide_clip_folder, head)


def test_scores_are_finite_floats_one_an_image(scorer: Scorer) -> None:
    scores = scorer.score(pictures(32, 48), PROMPTS)
    assert len(scores) == 4
    assert len(set(scores)) > 1
    assert all(type(score) is float and np.isfinite(score) for score in scores)
    assert all(isinstance(text, str) and text for text in (scorer.name, scorer.version))


def test_a_batch_is_its_images_one_by_one_in_order(scorer: Scorer) -> None:
    images_BHWC = pictures(32, 48)
    scores = scorer.score(images_BHWC, PROMPTS)
    singles = [scorer.score(images_BHWC[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(4)]
    assert scores == pytest.approx(singles, rel=1e-4, abs=1e-4)
    assert scorer.score(images_BHWC[::-1], PROMPTS[::-1])[::-1] == pytest.approx(scores, rel=1e-4, abs=1e-4)


def test_the_same_again_is_the_same(scorer: Scorer) -> None:
    assert scorer.score(pictures(32, 48), PROMPTS) == scorer.score(pictures(32, 48), PROMPTS)


def test_no_images_have_no_scores(scorer: Scorer) -> None:
    assert scorer.score(np.zeros((0, 32, 48, 3), np.uint8), []) == []


@pytest.mark.parametrize(
    ("images", "prompts", "problem"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), PROMPTS[:1], r"not float32 of shape \(1, 16, 16, 3\)"),
        (np.zeros((1, 3, 16, 16), np.uint8), PROMPTS[:1], r"not uint8 of shape \(1, 3, 16, 16\)"),
        (np.zeros((16, 16, 3), np.uint8), PROMPTS[:1], r"not uint8 of shape \(16, 16, 3\)"),
        (np.zeros((2, 16, 16, 3), np.uint8), PROMPTS[:1], "2 images with 1 prompts"),
    ],
)
def test_what_is_no_batch_is_refused(scorer: Scorer, images: Images, prompts: list[Prompt], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        scorer.score(images, prompts)


def test_any_text_can_be_scored(scorer: Scorer) -> None:
    texts = ["", "circle " * 1000, "🔴⚫ \u202e", "<|endoftext|> red", "<script>"]
    scores = scorer.score(np.repeat(pictures(16, 16)[:1], len(texts), axis=0), [Prompt(text, text) for text in texts])
    assert all(np.isfinite(score) for score in scores)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_table_knows_it_and_its_docstring_says_what_to_expect(name: str) -> None:
    built: Any = load_scorer(name)
    words = (built.__doc__ or "").lower()
    assert SCORERS[name].startswith(f"kto_ray.score.scorers.{name}:")
    assert "threshold" in words
    assert name in ("redness", "jpeg_size", "function") or "licence" in words


def test_the_docs_have_every_scorer_and_examples_that_hold() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text()
    table = re.split("\n\n", page)[2]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(SCORERS)
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        label = Labeling(**yaml.safe_load(block)["label"])
        assert all((settings.scorer or name) in SCORERS for name, settings in label.scorers.items())
    assert set(re.findall(r"`(\w+)`", page.partition("| field |")[2].partition("\n\n")[0])) - {
        "num_cpus",
        "num_gpus",
        "threads",
    } <= set(ScorerSettings.model_fields)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_near_and_keeps_the_temperature(clip_folder: Path, dtype: str) -> None:
    images_BHWC, folder = pictures(32, 32), str(clip_folder)
    exact = PickScore(folder).score(images_BHWC, PROMPTS)
    coarse = PickScore(folder, dtype=dtype).score(images_BHWC, PROMPTS)
    assert coarse != exact
    assert coarse == pytest.approx(exact, abs=3)
    cosines = Clip(folder, "cpu", dtype).cosines(images_BHWC, PROMPTS).double() * np.exp(LOGIT_SCALE)
    assert coarse == pytest.approx(cosines.tolist(), rel=1e-5)


def test_pickscores_processor_may_lie_elsewhere(clip_folder: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "weights")
    for path in (tmp_path / "weights").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(UserError, match=f"of the folder {tmp_path / 'weights'}"):
        PickScore(str(tmp_path / "weights"))
    scorer = PickScore(str(tmp_path / "weights"), processor=str(clip_folder))
    images_BHWC = pictures(16, 16)
    assert scorer.score(images_BHWC, PROMPTS) == PickScore(str(clip_folder)).score(images_BHWC, PROMPTS)


def test_the_aesthetic_predictor_does_without_texts(wide_clip_folder: Path, head: Path, tmp_path: Path) -> None:
    write_clip(tmp_path, width=768)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    scorer = Aesthetic(str(head), clip=str(tmp_path))
    assert not any(name.startswith("text") for name, _ in scorer.clip.model.named_parameters())
    images_BHWC = pictures(32, 32)
    assert scorer.score(images_BHWC, PROMPTS) == Aesthetic(str(head), clip=str(wide_clip_folder)).score(
        images_BHWC, PROMPTS
    )


def missing_weight(folder: Path) -> None:
    edit_safetensors(folder / "model.safetensors", visual_projection__weight=None)


def wrong_shape(folder: Path) -> None:
    edit_safetensors(folder / "model.safetensors", text_projection__weight=torch.zeros(16, 17))


def garbled_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clip", ')


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load a CLIP of the folder"),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), "cannot load a CLIP of the folder"),
    "a weight is missing": (missing_weight, r"has no 'visual_projection\.weight'"),
    "a shape is wrong": (wrong_shape, r"'text_projection\.weight' has shape \(16, 17\), .* wants \(16, 16\)"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "a garbled config": (garbled_config, "cannot load a CLIP of the folder"),
    "no preprocessor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        r"cannot load preprocessor_config\.json of the folder",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"the tokenizer of .* has \d tokens, .* has \d\d",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("scorer_class", [ClipScore, PickScore])
def test_a_broken_folder_is_named(scorer_class: type[ClipScore | PickScore], damage: str, tmp_path: Path) -> None:
    break_it, problem = BROKEN[damage]
    break_it(write_clip(tmp_path))
    with pytest.raises(UserError, match=problem) as caught:
        scorer_class(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_named_and_the_hub_is_not_asked(tmp_path: Path) -> None:
    for source in (tmp_path / "missing", write_clip(tmp_path / "clip") / "model.safetensors"):
        with pytest.raises(UserError, match=f"there is no folder {source}"):
            ClipScore(str(source))


def test_a_hub_name_that_cannot_be_had_is_told() -> None:
    with pytest.raises(UserError, match=r"hub repository \(there is no folder of that name\) nobody/nothing"):
        ClipScore("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("clip_score", "openai/clip-vit-large-patch14"),
        ("pickscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("aesthetic", "trl-lib/ddpo-aesthetic-predictor"),
    ],
)
def test_the_default_is_asked_of_the_hub(name: str, repository: str) -> None:
    with pytest.raises(UserError, match=repository):
        load_scorer(name)()


def test_the_head_must_be_whole_and_fit_its_clip(clip_folder: Path, head: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vectors of 16, the aesthetic predictor reads 768"):
        Aesthetic(str(head), clip=str(clip_folder))
    broken = tmp_path / "head.pth"
    broken.write_bytes(head.read_bytes())
    truncate(broken)
    with pytest.raises(UserError, match=f"{broken} cannot be read"):
        Aesthetic(str(broken), clip=str(clip_folder))
    weights = torch.load(head, weights_only=True)
    torch.save({name: value for name, value in weights.items() if name != "layers.7.bias"}, broken)
    with pytest.raises(UserError, match=rf"{broken} has no 'layers\.7\.bias'"):
        Aesthetic(str(broken), clip=str(clip_folder))


# -- functions --------------------------------------------------------------------------------------------------------


def brightness(images_BHWC: Images, prompts: Sequence[Prompt], scale: float = 1) -> Floats:  # noqa: ARG001
    means: Floats = images_BHWC.mean(axis=(1, 2, 3)) * scale
    return means


def words(images_BHWC: Images, prompts: Sequence[Prompt]) -> list[int]:  # noqa: ARG001
    return [len(prompt.text.split()) for prompt in prompts]


words.version = "words-2"  # type: ignore[attr-defined]


class Taste:
    """A callable that is no function."""

    def __call__(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> list[float]:
        return [0.5] * len(prompts)


taste = Taste()


def test_a_function_is_a_scorer() -> None:
    scorer = Function(f"{__name__}:brightness", scale=3)
    assert (scorer.name, scorer.version) == ("brightness", "1")
    images_BHWC = pictures(8, 8)
    assert scorer.score(images_BHWC, PROMPTS) == pytest.approx([3 * image.mean() for image in images_BHWC])


def test_a_functions_version_is_its_own() -> None:
    scorer = Function(f"{__name__}:words")
    assert (scorer.name, scorer.version) == ("words", "words-2")
    assert scorer.score(pictures(8, 8), PROMPTS) == [5.0, 1.0, 0.0, 11.0]


def test_a_callable_object_is_called_by_its_path() -> None:
    scorer = Function(f"{__name__}:taste")
    assert scorer.name == "taste"
    assert scorer.score(pictures(8, 8), PROMPTS) == [0.5] * 4


def test_a_dotted_path_to_a_function_needs_no_more_words() -> None:
    build = load_scorer(f"{__name__}:brightness")
    assert build(scale=2).score(pictures(8, 8), PROMPTS) == load_scorer("function")(
        path=f"{__name__}:brightness", scale=2
    ).score(pictures(8, 8), PROMPTS)
    assert pickle.loads(pickle.dumps(build))().name == "brightness"


@pytest.mark.parametrize(
    ("path", "arguments", "problem"),
    [
        (f"{__name__}:missing", {}, "has no class or function 'missing'"),
        ("no_such_module:score", {}, "cannot import 'no_such_module'"),
        ("brightness", {}, "unknown name 'brightness'"),
        (f"{__name__}:brightness", {"scales": 2}, "cannot be called with images_BHWC, prompts, scales.*'scales'"),
        (f"{__name__}:Taste", {}, "is a class"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(path: str, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Function(path, **arguments)


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_to_look_at_the_class_does_not_load_transformers(name: str) -> None:
    code = f"""
import sys
from kto_ray.score.scorers import load_scorer
load_scorer({name!r})
print([module for module in ("transformers", "torchvision", "ray") if module in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
