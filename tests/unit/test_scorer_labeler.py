"""The threshold's verdicts, the built-in labeler's answers, and how plug-ins are found."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from kto_ray.config import Label
from kto_ray.errors import UserError
from kto_ray.label.protocol import LABELERS, load_plugin
from kto_ray.label.scorer_labeler import ScorerLabeler, Threshold, make_labeler
from kto_ray.label.scorers import SCORERS
from kto_ray.records import Sample, Score
from tests.factories import make_samples, make_score

# -- threshold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "margin", "label"),
    [
        (0.5, 0.0, "desirable"),
        (0.49999, 0.0, "undesirable"),
        (1.0, 0.0, "desirable"),
        (-3.0, 0.0, "undesirable"),
        (0.5, 0.1, "abstain"),
        (0.59, 0.1, "abstain"),
        (0.41, 0.1, "abstain"),
        (0.75, 0.25, "desirable"),
        (0.25, 0.25, "undesirable"),
    ],
)
def test_a_score_becomes_a_verdict(score: float, margin: float, label: str) -> None:
    verdict = Threshold(0.5, margin).verdict(make_score("s", score), "scorer")
    assert verdict is not None
    assert (verdict.sample_id, verdict.label, verdict.labeler) == ("s", label, "scorer")


def test_the_rule_says_how_the_verdict_came_about() -> None:
    score = Score("s", "aesthetic", "2.1", 6.0)
    plain, margin = Threshold(5.5).verdict(score, "scorer"), Threshold(5.5, 0.25).verdict(score, "scorer")
    assert plain is not None
    assert margin is not None
    assert plain.rule == "aesthetic@2.1 >= 5.5"
    assert margin.rule == "aesthetic@2.1 >= 5.5 +- 0.25"


def test_a_failure_is_never_a_verdict() -> None:
    assert Threshold(0.5).verdict(make_score("s", None), "scorer") is None
    assert Threshold(-1e9, 5).verdict(make_score("s", None), "scorer") is None


# -- labeler ----------------------------------------------------------------------------------------------------------


class FakePool:
    """Scores by the order of samples; fails for the third; raises when told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.shrunk = False

    async def score(self, samples: Sequence[Sample]) -> list[Score]:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return [make_score(s.id, [0.9, 0.1, None][i % 3]) for i, s in enumerate(samples)]

    def shrink(self) -> None:
        self.shrunk = True


def labeler(pool: FakePool) -> ScorerLabeler:
    return ScorerLabeler(Label(), cast(Any, pool))


async def test_every_sample_is_answered_once_with_its_score() -> None:
    samples, built_in = make_samples("round-00000", 6), labeler(FakePool())
    await built_in.start()
    await built_in.submit(samples[:3])
    await built_in.submit(samples[3:])
    answers = [*await built_in.collect(), *await built_in.collect()]
    await built_in.close()
    assert sorted(answer.sample_id for answer in answers) == [s.id for s in samples]
    labels = [answer.verdict.label if answer.verdict else None for answer in answers]
    assert labels == ["desirable", "undesirable", None] * 2
    assert all(answer.scores[0].error for answer in answers if answer.verdict is None)


async def test_cancelling_collect_loses_no_answer() -> None:
    samples, built_in = make_samples("round-00000", 3), labeler(FakePool())
    waiting = asyncio.create_task(built_in.collect())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await built_in.submit(samples)
    assert len(await asyncio.wait_for(built_in.collect(), 5)) == 3


async def test_what_breaks_the_pool_reaches_whoever_collects() -> None:
    built_in = labeler(FakePool(UserError("label.scorer: no GPU left")))
    await built_in.submit(make_samples("round-00000", 1))
    with pytest.raises(UserError, match="no GPU left"):
        await asyncio.wait_for(built_in.collect(), 5)


async def test_the_pool_shrinks_when_a_round_is_complete() -> None:
    pool = FakePool()
    await labeler(pool).finish("round-00000")
    assert pool.shrunk


# -- plug-ins ---------------------------------------------------------------------------------------------------------


class MyLabeler:
    """A user's labeler, as far as finding it goes."""

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting


def test_a_built_in_name_and_a_dotted_path_are_found() -> None:
    assert load_plugin("label.scorer", "shapes", SCORERS).__name__ == "ShapesScorer"
    assert load_plugin("label.labeler", "scorer", LABELERS) is ScorerLabeler
    assert load_plugin("label.scorer", "tests.plugins:CoinScorer", SCORERS).__name__ == "CoinScorer"


def test_labelers_are_made_as_configured() -> None:
    assert isinstance(make_labeler(Label(), cast(Any, FakePool())), ScorerLabeler)
    config = Label(labeler=f"{__name__}:MyLabeler", labeler_args={"greeting": "hello"})
    assert cast(MyLabeler, make_labeler(config, cast(Any, FakePool()))).greeting == "hello"


@pytest.mark.parametrize(
    ("kind", "built_in", "path", "said"),
    [
        ("label.scorer", SCORERS, "shape", ["'shape'", "did you mean 'shapes'", "package.module:Name"]),
        ("label.labeler", LABELERS, "people", ["'people'", "built in: scorer;", "package.module:Name"]),
        ("label.scorer", SCORERS, "no_such_package.mod:Name", ["cannot import 'no_such_package.mod'"]),
        ("label.scorer", SCORERS, ":Name", ["cannot import ''", "':Name'"]),
        ("label.scorer", SCORERS, ".relative:Name", ["cannot import '.relative'"]),
        ("label.scorer", SCORERS, "tests.plugins:NoScorer", ["'tests.plugins' has no class 'NoScorer'"]),
        ("label.scorer", SCORERS, "tests.plugins:os", ["'tests.plugins' has no class 'os'"]),
    ],
)
def test_a_plug_in_that_is_not_there_is_named(kind: str, built_in: dict[str, str], path: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_plugin(kind, path, built_in)
    assert str(caught.value).startswith(f"{kind}: ")
    assert all(words in str(caught.value) for words in said)
