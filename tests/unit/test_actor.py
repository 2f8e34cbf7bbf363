"""What the actor that holds a scorer makes of its answers and failures; here as a plain object, without Ray."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kto_ray.errors import UserError
from kto_ray.records import Prompt
from kto_ray.score.actor import PlainPixels, ScorerActor, plain
from kto_ray.score.protocol import BatchFailed
from tests.plugins import CoinScorer

Images = npt.NDArray[np.uint8]


def images(count: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3), np.uint8)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"p{place}", text) for place, text in enumerate(texts)]


class Answering(CoinScorer):
    """Gives what it is told to, or raises it, and counts the batches."""

    batches = 0

    def __init__(self, answer: Callable[[Sequence[Prompt]], Any]) -> None:
        super().__init__()
        self.answer = answer

    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        self.batches += 1
        answer = self.answer(prompts)
        if isinstance(answer, Exception):
            raise answer
        return answer


def answering(answer: Callable[[Sequence[Prompt]], Any]) -> tuple[ScorerActor, Answering]:
    actor = ScorerActor(f"{__name__}:Answering", {"answer": answer})
    assert isinstance(actor.scorer, Answering)
    return actor, actor.scorer


# -- answers ----------------------------------------------------------------------------------------------------------


def test_scores_come_in_order_under_the_scorer_s_name() -> None:
    actor = ScorerActor("tests.plugins:CoinScorer", {})
    shown = images(3)
    assert actor.describe() == ("coin", "1")
    expected = [float(image.astype(int).sum() % 97) / 96 for image in shown]
    assert actor.score(shown, prompts("a", "b", "c")) == [(value, None) for value in expected]


def test_no_images_have_no_scores() -> None:
    assert ScorerActor("tests.plugins:CoinScorer", {}).score(images(0), []) == []
    assert ScorerActor("tests.plugins:brightness", {}).score(images(0), []) == []


def test_whatever_counts_as_numbers_becomes_floats() -> None:
    actor, _ = answering(lambda prompts: np.arange(len(prompts), dtype=np.float32))
    assert actor.score(images(3), prompts("a", "b", "c")) == [(0.0, None), (1.0, None), (2.0, None)]


def test_a_function_is_a_scorer() -> None:
    actor = ScorerActor("tests.plugins:brightness", {"scale": 51})
    shown = images(2)
    assert actor.describe() == ("brightness", "1")
    values = [value for value, _ in actor.score(shown, prompts("a", "b"))]
    assert values == pytest.approx([image.mean() / 51 for image in shown])


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UserError, match="did you mean 'shapes'"):
        ScorerActor("shape", {})
    with pytest.raises(UserError, match=r"brightness.*unexpected keyword argument 'scal'"):
        ScorerActor("tests.plugins:brightness", {"scal": 1})


# -- failures ---------------------------------------------------------------------------------------------------------


def test_one_bad_image_costs_one_score() -> None:
    actor = ScorerActor("tests.plugins:BrittleScorer", {})
    shown = images(4)
    answers = actor.score(shown, prompts("a red square", "a red circle", "a red ring", "a blue square"))
    (good, bad, ring, last) = answers
    assert bad == (None, "RuntimeError: no circles, please")
    assert ring == (None, "the score is nan")
    assert (good[1], last[1]) == (None, None)
    assert [good[0], last[0]] == CoinScorer().score(shown[[0, 3]], prompts("a", "b"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_a_failure(value: float) -> None:
    actor, scorer = answering(lambda prompts: [0.5, value])
    assert actor.score(images(2), prompts("a", "b")) == [(0.5, None), (None, f"the score is {value}")]
    assert scorer.batches == 1


def test_a_failed_batch_fails_at_once() -> None:
    actor, scorer = answering(lambda prompts: BatchFailed("the server is away"))
    assert actor.score(images(3), prompts("a", "b", "c")) == [(None, "the server is away")] * 3
    assert scorer.batches == 1


def test_any_other_failure_has_each_image_tried_once() -> None:
    actor, scorer = answering(lambda prompts: ValueError(f"{len(prompts)} of them"))
    assert actor.score(images(3), prompts("a", "b", "c")) == [(None, "ValueError: 1 of them")] * 3
    assert scorer.batches == 4
    assert actor.score(images(1), prompts("a")) == [(None, "ValueError: 1 of them")]
    assert scorer.batches == 5


def test_a_batch_may_fail_image_by_image_and_then_at_once() -> None:
    actor, _ = answering(lambda prompts: ValueError("no") if len(prompts) > 1 else BatchFailed("the server is away"))
    assert actor.score(images(2), prompts("a", "b")) == [(None, "the server is away")] * 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([], r"ValueError: coin gave 0 scores for 1 images"),
        ([0.5, 0.5], r"ValueError: coin gave 2 scores for 1 images"),
        (["good"], r"ValueError: could not convert string to float: 'good'"),
        ([None], r"TypeError: .*'NoneType'"),
        (None, r"TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_an_answer_that_is_no_list_of_scores_is_a_failure(answer: Any, problem: str) -> None:
    actor, _ = answering(lambda prompts: answer)
    ((value, error),) = actor.score(images(1), prompts("a"))
    assert value is None
    assert re.fullmatch(problem, error or "")


@pytest.mark.parametrize(
    ("shown", "count", "problem"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), 2, r"float32 of shape \(2, 16, 16, 3\)"),
        (np.zeros((16, 16, 3), np.uint8), 16, r"uint8 of shape \(16, 16, 3\)"),
        (np.zeros((2, 16, 16, 4), np.uint8), 2, r"uint8 of shape \(2, 16, 16, 4\)"),
        (np.zeros((2, 3, 16, 16), np.uint8), 2, r"uint8 of shape \(2, 3, 16, 16\)"),
        (np.zeros((3, 16, 16, 3), np.uint8), 2, r"3 images with 2 prompts"),
    ],
)
def test_what_is_no_batch_reaches_no_scorer(shown: Any, count: int, problem: str) -> None:
    actor, scorer = answering(lambda prompts: [0.5] * len(prompts))
    with pytest.raises(ValueError, match=problem):
        actor.score(shown, prompts(*"abcdefghijklmnopqrst"[:count]))
    assert scorer.batches == 0


# -- across the border of an environment ------------------------------------------------------------------------------


def plain_pixels(shown: Images) -> PlainPixels:
    return shown.tobytes(), shown.shape


def test_only_plain_types_cross_the_border() -> None:
    asked = [Prompt("1", "a red circle", {"style": "flat"}), Prompt("2", "a ring")]
    crossing = [plain_pixels(images(2)), plain(asked)]
    assert ast.literal_eval(repr(crossing)) == crossing


@pytest.mark.parametrize("shape", [(3, 16, 24, 3), (1, 1, 1, 3), (2, 65, 7, 3)])
def test_pixels_arrive_as_they_were(shape: tuple[int, ...]) -> None:
    seen: list[Images] = []

    class Sees(CoinScorer):
        def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> list[float]:
            seen.append(images_BHWC)
            return super().score(images_BHWC, prompts)

    actor, shown = (
        ScorerActor("tests.plugins:CoinScorer", {}),
        np.random.default_rng(1).integers(0, 256, shape, np.uint8),
    )
    actor.scorer = Sees()
    actor.score_plain(plain_pixels(shown), plain(prompts(*"abc"[: len(shown)])))
    assert seen[0].dtype == np.uint8
    np.testing.assert_array_equal(seen[0], shown)
    assert not seen[0].flags.writeable  # other scorers may be given the same bytes


def test_scores_of_what_crossed_are_those_of_the_arrays() -> None:
    actor = ScorerActor("tests.plugins:BrittleScorer", {})
    shown, asked = images(3), prompts("a red square", "a red circle", "a blue square")
    assert actor.score_plain(plain_pixels(shown), plain(asked)) == actor.score(shown, asked)


def test_prompts_arrive_with_their_metadata() -> None:
    actor, _ = answering(lambda prompts: [float(prompt.metadata["weight"]) for prompt in prompts])
    asked = [Prompt("1", "a", {"weight": "0.25"}), Prompt("2", "b", {"weight": "4"})]
    assert actor.score_plain(plain_pixels(images(2)), plain(asked)) == [(0.25, None), (4.0, None)]


def test_the_actor_needs_little_of_an_environment() -> None:
    heavy = ["torch", "ray", "pydantic", "yaml", "scipy", "diffusers", "transformers"]
    code = f"import kto_ray.score.actor, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
