"""The built-in labeler: whole rounds judged by stored scores, in any order of arrival, over restarts."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from kto_ray.config import Labeling, RunConfig, ScorerSettings
from kto_ray.errors import UserError
from kto_ray.label.judging import judge_round, one_sided
from kto_ray.label.protocol import Labeler
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.labelers import LABELERS, make_labeler
from kto_ray.objectives.protocol import Needs
from kto_ray.people.labeler import HumanLabeler
from kto_ray.plugins import load_plugin
from kto_ray.records import Label, Prompt, Sample, Score, Verdict
from kto_ray.samples import Samples
from kto_ray.score.scorers import SCORERS, load_scorer
from kto_ray.storage import Storage
from kto_ray.verdicts.thresholds import Absolute, Agreement, Majority, PromptQuantile, RoundQuantile, RunningMean
from tests.factories import make_samples

Figures = Mapping[str, float]
ABSOLUTE = Labeling(threshold=0.5)


def score(sample: Sample, value: float | None, scorer: str = "shapes") -> Score:
    return Score(sample.id, scorer, "1", value, None if value is not None else f"RuntimeError: {scorer} is unwell")


def scores_of(samples: Sequence[Sample], values: Sequence[float | None], scorer: str = "shapes") -> list[Score]:
    return [score(sample, value, scorer) for sample, value in zip(samples, values, strict=True)]


async def judged(
    labeler: Labeler, stage: str, values: Sequence[float | None], **others: Sequence[float | None]
) -> tuple[list[Verdict], Figures]:
    """Submit a round with scores of "shapes" and of others, and take its verdicts in the order of the samples."""
    samples = make_samples(stage, len(values))
    scores = scores_of(samples, values)
    for scorer, more in others.items():
        scores += scores_of(samples, more, scorer)
    await labeler.submit(Samples.of(samples))
    await labeler.scored(stage, scores)
    await labeler.finish(stage)
    verdicts = await asyncio.wait_for(labeler.collect(), 5)
    assert [verdict.sample_id for verdict in verdicts] == [sample.id for sample in samples]
    return list(verdicts), labeler.figures(stage)


def labels(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.label for verdict in verdicts]


async def started(config: Labeling, memory: Mapping[str, Any] | None = None) -> ThresholdLabeler:
    labeler = ThresholdLabeler(config)
    await labeler.start(memory or {})
    return labeler


# -- rounds -----------------------------------------------------------------------------------------------------------


async def test_every_sample_is_judged_once_the_round_is_complete() -> None:
    labeler, samples = await started(ABSOLUTE), make_samples("round-00000", 4)
    await labeler.submit(Samples.of(samples[:1]))
    await labeler.scored("round-00000", scores_of(samples[:1], [0.9]))
    await labeler.submit(Samples.of(samples[1:]))
    await labeler.scored("round-00000", scores_of(samples[1:], [0.1, None, 0.5]))
    waiting = asyncio.create_task(labeler.collect())
    await asyncio.sleep(0)
    assert not waiting.done()
    await labeler.finish("round-00000")
    verdicts = await asyncio.wait_for(waiting, 5)
    assert labels(verdicts) == ["desirable", "undesirable", "failed", "desirable"]
    assert {verdict.labeler for verdict in verdicts} == {"threshold"}
    assert verdicts[0].rule == "absolute@1(value=0.5, dead_band=0): shapes >= 0.5"


async def test_submitting_twice_judges_once() -> None:
    labeler, samples = await started(ABSOLUTE), make_samples("round-00000", 3)
    for _ in range(2):
        await labeler.submit(Samples.of(samples))
        await labeler.scored("round-00000", scores_of(samples, [0.9, 0.1, 0.5]))
    await labeler.finish("round-00000")
    assert labels(await labeler.collect()) == ["desirable", "undesirable", "desirable"]


async def test_cancelling_collect_loses_no_verdict() -> None:
    labeler = await started(ABSOLUTE)
    waiting = asyncio.create_task(labeler.collect())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    verdicts, _ = await judged(labeler, "round-00000", [0.9, 0.1])
    assert len(verdicts) == 2


async def test_rounds_do_not_mix() -> None:
    labeler = await started(Labeling(threshold=RoundQuantile()))
    early, late = make_samples("round-00000", 2), make_samples("round-00001", 2)
    await labeler.submit(Samples.of(late))
    await labeler.submit(Samples.of(early))
    await labeler.scored("round-00001", scores_of(late, [100, 200]))
    await labeler.scored("round-00000", scores_of(early, [1, 2]))
    await labeler.finish("round-00000")
    assert labels(await labeler.collect()) == ["undesirable", "desirable"]


async def test_a_round_that_was_judged_before_a_crash_has_nothing_to_say() -> None:
    first = await started(Labeling(threshold=RunningMean()))
    await judged(first, "round-00000", [1, 3])
    second = await started(Labeling(threshold=RunningMean()), first.memory())
    await second.finish("round-00001")
    assert second.memory() == first.memory()
    assert second.figures("round-00001") == {}


ENSEMBLE = Labeling(
    scorers={name: ScorerSettings() for name in ("shapes", "redness")},
    combine=Majority(),
    threshold=RunningMean(),
    on_one_class="widen",
)


@pytest.mark.parametrize("seed", range(5))
async def test_the_order_of_arrival_does_not_matter(seed: int) -> None:
    chance, rng = random.Random(seed), np.random.default_rng(0)
    samples = make_samples("round-00000", 12)
    values = [None, *rng.normal(size=11).tolist()], [*rng.normal(size=11).tolist(), None]
    pairs = list(zip(samples, scores_of(samples, values[0]), scores_of(samples, values[1], "redness"), strict=True))

    async def judge(order: list[int], several: int, swap: bool) -> tuple[Any, ...]:
        labeler = await started(ENSEMBLE)
        for start in range(0, 12, several):
            batch = [pairs[place] for place in order[start : start + several]]
            columns = [[pair[column] for pair in batch] for column in ((2, 1) if swap else (1, 2))]
            await labeler.submit(Samples.of([pair[0] for pair in batch]))
            await labeler.scored("round-00000", cast(list[Score], columns[0] + columns[1]))
        await labeler.finish("round-00000")
        return await labeler.collect(), labeler.figures("round-00000"), labeler.memory()

    shuffled = chance.sample(range(12), 12)
    assert await judge(shuffled, chance.randint(1, 5), True) == await judge(list(range(12)), 12, False)


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_a_failed_verdict_says_whose_score_is_missing_and_why() -> None:
    verdicts, _ = await judged(await started(ENSEMBLE), "round-00000", [None, 1, None, 2], redness=[1, None, None, 2])
    assert labels(verdicts)[:3] == ["failed"] * 3
    assert verdicts[0].rule == "no score of shapes: RuntimeError: shapes is unwell"
    assert verdicts[1].rule == "no score of redness: RuntimeError: redness is unwell"
    assert verdicts[2].rule == f"{verdicts[0].rule}; {verdicts[1].rule}"


async def test_a_sample_that_was_not_scored_has_failed() -> None:
    labeler, samples = await started(ENSEMBLE), make_samples("round-00000", 2)
    await labeler.submit(Samples.of(samples))
    await labeler.scored("round-00000", scores_of(samples, [1, 2]))
    await labeler.finish("round-00000")
    verdicts = await labeler.collect()
    assert labels(verdicts) == ["failed", "failed"]
    assert verdicts[0].rule == "no score of redness: not scored"


async def test_all_may_have_failed() -> None:
    labeler = await started(Labeling(threshold=RunningMean()))
    verdicts, figures = await judged(labeler, "round-00000", [None, None])
    assert labels(verdicts) == ["failed", "failed"]
    assert figures == {}


@pytest.mark.parametrize("held_out", [[0, 0, 0, 0], [9, 1, 5, 7], [None, None, None, None]])
async def test_held_out_scores_do_not_matter(held_out: list[float | None]) -> None:
    scorers = {"shapes": ScorerSettings(), "redness": ScorerSettings(held_out=True)}
    with_it = Labeling(scorers=scorers, threshold=RoundQuantile(), on_one_class="widen")
    without = Labeling(threshold=RoundQuantile(), on_one_class="widen")
    values = [0.1, 0.4, None, 0.9]
    found = await judged(await started(with_it), "round-00000", values, redness=held_out)
    assert found == await judged(await started(without), "round-00000", values)


# -- memory -----------------------------------------------------------------------------------------------------------

ROUNDS = [[1.0, 3.0, 8.0], [5.0, 7.0, 6.0], [2.0, 9.0, 4.0]]


@pytest.mark.parametrize(
    "config",
    [
        Labeling(threshold=RunningMean(decay=0.5)),
        Labeling(threshold=RoundQuantile()),
        Labeling(threshold=PromptQuantile()),
        ENSEMBLE,
        Labeling(scorers=ENSEMBLE.scorers, combine={"calibration": "running"}, threshold=0),  # type: ignore[arg-type]
        Labeling(scorers=ENSEMBLE.scorers, combine=Agreement(), threshold=4, on_one_class="widen"),  # type: ignore[arg-type]
    ],
    ids=lambda config: f"{config.combine} {config.threshold}",
)
async def test_a_restarted_labeler_goes_on_where_it_was(config: Labeling) -> None:
    steady, restarted = await started(config), await started(config)
    for index, values in enumerate(ROUNDS):
        others = [-value for value in values]
        stage = f"round-{index:05}"
        expected = await judged(steady, stage, values, redness=others)
        assert await judged(restarted, stage, values, redness=others) == expected
        restarted = await started(config, json.loads(json.dumps(restarted.memory(), allow_nan=False)))


async def test_what_was_before_matters_to_the_running_mean() -> None:
    first = await started(Labeling(threshold=RunningMean()))
    await judged(first, "round-00000", [100, 200])
    fresh, later = await started(Labeling(threshold=RunningMean())), await started(first.config, first.memory())
    assert labels((await judged(fresh, "round-00001", [1, 2]))[0]) == ["undesirable", "desirable"]
    assert labels((await judged(later, "round-00001", [1, 2]))[0]) == ["undesirable", "undesirable"]


# -- figures ----------------------------------------------------------------------------------------------------------


async def test_cut_mean_and_flips_are_logged() -> None:
    labeler = await started(Labeling(threshold=RoundQuantile()))
    _, first = await judged(labeler, "round-00000", [0, 1, 2, 3])
    assert first == {"threshold/sum": 2, "score_mean": 1.5}
    _, second = await judged(labeler, "round-00001", [1, 2, 3, 4, None])
    assert second == {"threshold/sum": 3, "score_mean": 2.5, "flip_rate": 0.25}
    assert labeler.figures("round-00001") == {}


async def test_every_voter_logs_its_own_cut() -> None:
    _, figures = await judged(await started(ENSEMBLE), "round-00000", [1, 3, 2, 2], redness=[10, 30, 20, 20])
    assert figures == {"threshold/shapes": 2, "threshold/redness": 20, "score_mean": 0.75}


# -- one class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "min_verdicts", "verdict"),
    [
        ({"desirable": 3}, 2, True),
        ({"undesirable": 3, "abstain": 4}, 2, True),
        ({}, 2, True),
        ({"desirable": 1, "undesirable": 1}, 2, False),
        ({"desirable": 1, "undesirable": 1, "failed": 9}, 3, True),
        ({"desirable": 2, "undesirable": 1}, 3, False),
    ],
)
def test_one_sided_is_yes_or_no_only_or_too_few(labels: dict[str, int], min_verdicts: int, verdict: bool) -> None:
    assert one_sided(Labeling(min_verdicts=min_verdicts), labels) == verdict


@pytest.mark.parametrize(
    ("needs", "labels", "verdict"),
    [
        (Needs(undesirable=False), {"desirable": 3}, False),
        (Needs(undesirable=False), {"undesirable": 3}, True),
        (Needs(pairs="verdicts"), {"desirable": 3}, True),
        (Needs(pairs="scores"), {"desirable": 3}, False),
        (Needs(pairs="scores"), {"undesirable": 3}, False),
        (Needs(pairs="scores"), {"undesirable": 1}, True),
        (Needs(pairs="scores"), {}, True),
    ],
)
def test_what_is_one_sided_depends_on_what_the_objective_needs(
    needs: Needs, labels: dict[Label, int], verdict: bool
) -> None:
    assert one_sided(Labeling(min_verdicts=2), labels, needs) == verdict


@pytest.mark.parametrize("choice", ["stop", "skip", "train", "widen"])
async def test_only_widening_changes_the_verdicts_of_one_class(choice: Any) -> None:
    labeler = await started(Labeling(threshold=Absolute(value=9), on_one_class=choice))
    verdicts, figures = await judged(labeler, "round-00000", [1, 2, None, 3, 4])
    widened = choice == "widen"
    low, high = ("undesirable", "desirable") if widened else ("undesirable", "undesirable")
    assert labels(verdicts) == [low, low, "failed", high, high]
    assert verdicts[0].rule.startswith("widened@1" if widened else "absolute@1")
    assert figures.get("threshold/widened") == (3 if widened else None)
    assert figures["threshold/sum"] == 9


async def test_too_few_verdicts_are_widened_too() -> None:
    config = Labeling(threshold=Absolute(value=5, dead_band=4), on_one_class="widen", min_verdicts=3)
    verdicts, _ = await judged(await started(config), "round-00000", [1, 4, 6, 9])
    assert Counter(labels(verdicts)) == {"desirable": 2, "undesirable": 2}


async def test_a_round_that_is_all_the_same_cannot_be_widened() -> None:
    labeler = await started(Labeling(threshold=Absolute(value=9), on_one_class="widen"))
    verdicts, figures = await judged(labeler, "round-00000", [1, 1, 1])
    assert labels(verdicts) == ["undesirable"] * 3
    assert "threshold/widened" not in figures


async def test_the_round_after_a_widened_one_does_not_start_from_it() -> None:
    config = Labeling(threshold=Absolute(value=9), on_one_class="widen")
    labeler = await started(config)
    await judged(labeler, "round-00000", [1, 2, 3, 4])
    _, figures = await judged(labeler, "round-00001", [1, 2, 3, 10])
    assert figures["flip_rate"] == 0
    plain = judge_round(config.model_copy(update={"on_one_class": "stop"}), {}, {"s": "p"}, None)
    assert labeler.memory() == {"fit": plain.fit.to_json()}


# -- plug-ins ---------------------------------------------------------------------------------------------------------


class MyLabeler(Labeler):
    """A user's labeler, as far as finding it goes."""

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting


def brightness(images_BHWC: npt.NDArray[np.uint8], _: Sequence[Prompt]) -> list[float]:
    return [float(image.mean()) for image in images_BHWC]


def test_a_built_in_name_and_a_dotted_path_are_found() -> None:
    assert load_plugin("label.scorers", "shapes", SCORERS).__name__ == "ShapesScorer"
    assert load_plugin("label.labeler", "threshold", LABELERS) is ThresholdLabeler
    assert load_plugin("label.scorers", "tests.plugins:CoinScorer", SCORERS).__name__ == "CoinScorer"
    assert load_plugin("label.scorers", f"{__name__}:brightness", SCORERS, functions=True) is brightness


def test_a_function_is_wrapped_into_a_scorer() -> None:
    scorer = load_scorer(f"{__name__}:brightness")()
    assert list(scorer.score(np.full((1, 2, 2, 3), 7, np.uint8), [Prompt("1", "a")])) == [7.0]


def test_labelers_are_made_as_configured(tmp_path: Path) -> None:
    def make(label: Labeling) -> Labeler:
        return make_labeler(RunConfig(label=label), Storage(str(tmp_path)), Console())

    assert isinstance(make(Labeling()), ThresholdLabeler)
    assert isinstance(make(Labeling(labeler="human")), HumanLabeler)
    config = Labeling(labeler=f"{__name__}:MyLabeler", labeler_args={"greeting": "hello"}, scorers={})
    assert cast(MyLabeler, make(config)).greeting == "hello"


@pytest.mark.parametrize(
    ("kind", "built_in", "path", "said"),
    [
        ("label.scorers", SCORERS, "shape", ["'shape'", "did you mean 'shapes'", "package.module:Name"]),
        (
            "label.labeler",
            LABELERS,
            "people",
            ["'people'", "built in: feedback, human, threshold;", "package.module:Name"],
        ),
        ("label.scorers", SCORERS, "no_such_package.mod:Name", ["cannot import 'no_such_package.mod'"]),
        ("label.scorers", SCORERS, ":Name", ["cannot import ''", "':Name'"]),
        ("label.scorers", SCORERS, ".relative:Name", ["cannot import '.relative'"]),
        ("label.scorers", SCORERS, "tests.plugins:NoScorer", ["'tests.plugins' has no class 'NoScorer'"]),
        ("label.scorers", SCORERS, "tests.plugins:os", ["'tests.plugins' has no class 'os'"]),
        ("label.labeler", LABELERS, f"{__name__}:brightness", ["has no class 'brightness'"]),
    ],
)
def test_a_plug_in_that_is_not_there_is_named(kind: str, built_in: dict[str, str], path: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_plugin(kind, path, built_in)
    assert str(caught.value).startswith(f"{kind}: ")
    assert all(words in str(caught.value) for words in said)
