"""Held-out evaluation: one bar for all policies, nothing drawn or scored twice, nothing made up."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kto_ray.config import Cluster, Labeling, RunConfig
from kto_ray.errors import UserError
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.evaluate.statistics import mean_difference, mean_interval, pass_rate_difference
from kto_ray.evaluate.summary import evaluation_row
from kto_ray.parts import Kind, read_arrays
from kto_ray.records import PolicyRef, Prompt, SampleRecord, SampleRequest, Score
from kto_ray.rounds import Round
from kto_ray.samples import Samples
from kto_ray.score.pool import Scorers
from kto_ray.storage import Storage
from tests.counting import counted
from tests.factories import make_sample, make_samples, same_sample
from tests.in_process import InProcess

PROMPTS, IMAGES = 5, 4
POLICIES = [PolicyRef(version, f"{version}" * 64) for version in range(3)]


def evaluation(folder: Path, label: dict[str, Any] | None = None, fresh: bool = False, **more: Any) -> Evaluation:
    tree = {"label": {"scorers": "shapes", **(label or {})}, "evaluate": {"images_per_prompt": IMAGES}, **more}
    prompts = [Prompt(f"p{place}", f"prompt {place}") for place in range(PROMPTS)]
    return Evaluation(RunConfig.model_validate(tree), Storage(str(folder)), prompts, fresh)


async def run(evaluation: Evaluation, version: int, **values: Callable[[SampleRecord], float | None]) -> InProcess:
    workers = InProcess(values)
    await evaluation.run_for(POLICIES[version], cast(Any, workers), cast(Any, workers))
    return workers


def coin(sample: SampleRecord) -> float:
    """A value that looks like chance and is the same every time, by policy and image."""
    return float(np.random.default_rng((sample.seed, sample.policy.version)).normal(loc=sample.policy.version))


def by_hand(
    evaluation: Evaluation, value: Callable[[SampleRecord], float | None], version: int
) -> np.ndarray[Any, Any]:
    """Values (P, K) in the order of prompts and images."""
    samples = [make_sample(request, POLICIES[version]) for request in evaluation.requests]
    return np.array([value(sample) for sample in samples], np.float64).reshape(PROMPTS, IMAGES)


# -- drawing and scoring ----------------------------------------------------------------------------------------------


async def test_every_image_is_drawn_and_scored_once_and_sealed(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"scorers": {"shapes": {}, "other": {"held_out": True}}})
    workers = await run(held_out, 0, shapes=coin, other=coin)
    ids = [request.id for request in held_out.requests]
    assert len(ids) == PROMPTS * IMAGES
    assert sorted(workers.drawn) == sorted(ids)
    assert sorted(workers.scored) == sorted((sample_id, name) for sample_id in ids for name in ("shapes", "other"))
    again = await run(held_out, 0, shapes=coin, other=coin)
    assert (again.drawn, again.scored) == ([], [])
    folder = Round(Storage(str(tmp_path)) / "evaluations/00000", "evaluation")
    assert folder.manifest["policy_digest"] == POLICIES[0].digest
    folder.verify()


async def test_what_it_was_drawn_with_is_sealed_when_rounds_are_drawn_otherwise(tmp_path: Path) -> None:
    for name, otherwise in (("same", {}), ("more", {"steps": 99})):
        held_out = evaluation(tmp_path / name, evaluate={"images_per_prompt": IMAGES, "generate": otherwise})
        await run(held_out, 0, shapes=coin)
        assert held_out.round(0).manifest.get("drawn_with", {}) == otherwise


async def test_what_a_crash_left_is_neither_drawn_nor_scored_again(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"scorers": {"shapes": {}, "other": {"held_out": True}}})
    folder = Round(Storage(str(tmp_path)) / "evaluations/00000", "evaluation")
    there = [make_sample(request, POLICIES[0]) for request in held_out.requests[3:9]]
    folder.add_samples(there)
    folder.add_scores([Score(sample.id, "shapes", "1", 0.75) for sample in there[:2]])
    workers = await run(held_out, 0, shapes=coin, other=coin)
    assert set(workers.drawn) == {request.id for request in held_out.requests} - {sample.id for sample in there}
    asked = {sample_id for sample_id, name in workers.scored if name == "shapes"}
    assert asked == {request.id for request in held_out.requests} - {sample.id for sample in there[:2]}
    assert len([name for _, name in workers.scored if name == "other"]) == PROMPTS * IMAGES


class Looking(InProcess):
    """Looks at the images that it scores, as actors do: through the reference that its scorers share."""

    async def score(self, samples: Samples, known: Iterable[Score] = ()) -> list[Score]:  # type: ignore[override]
        scorers = Scorers(Labeling.model_validate({"scorers": "shapes"}), Cluster())
        scorers.pools = cast(Any, {name: SimpleNamespace(score=partial(self._look, name)) for name in self.values})
        return await scorers.score(samples, list(known))

    async def _look(self, name: str, samples: Samples) -> list[Score]:
        pixels_BHWC = await samples.reference()
        expected = [make_sample(request_of(record), record.policy).pixels_HWC for record in samples]
        np.testing.assert_array_equal(pixels_BHWC, np.stack(expected))
        self.scored += [(record.id, name) for record in samples]
        return [self._score(record, name) for record in samples]


def request_of(record: SampleRecord) -> SampleRequest:
    return SampleRequest(record.id, record.stage, record.prompt, record.index, record.seed)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often pixels of each sample are read of storage; Ray's object store is this process."""
    count = Counter[str]()

    def reading(folder: Storage, kind: Kind, records: Sequence[SampleRecord]) -> Any:
        if kind == "pixels":
            count.update(record.id for record in records)
        return read_arrays(folder, kind, records)

    for module in ("samples", "rounds"):
        monkeypatch.setattr(f"kto_ray.{module}.read_arrays", reading)
    monkeypatch.setattr("kto_ray.samples._put", lambda pixels_BHWC: pixels_BHWC)
    return count


async def test_nothing_that_is_drawn_is_read_of_storage_to_score_it_and_sum_up(
    tmp_path: Path, decoded: Counter[str]
) -> None:
    held_out = evaluation(tmp_path, {"scorers": {"shapes": {}, "other": {"held_out": True}}})
    with counted() as moved:
        for version in (0, 1):
            workers = Looking({"shapes": coin, "other": coin})
            summary = await held_out.run_for(POLICIES[version], cast(Any, workers), cast(Any, workers))
            assert len(workers.scored) == 2 * PROMPTS * IMAGES
    assert summary.win_rate is not None
    assert not decoded
    assert moved.files_read == 0  # not even tables: the base's are in memory, too


async def test_what_a_crash_left_is_decoded_once_to_score_it(tmp_path: Path, decoded: Counter[str]) -> None:
    held_out = evaluation(tmp_path, {"scorers": {"shapes": {}, "other": {"held_out": True}}})
    left = [make_sample(request, POLICIES[0]) for request in held_out.requests[3:12]]
    Round(Storage(str(tmp_path)) / "evaluations/00000", "evaluation").add_samples(left)
    workers = Looking({"shapes": coin, "other": coin})
    await held_out.run_for(POLICIES[0], cast(Any, workers), cast(Any, workers))
    assert decoded == Counter(sample.id for sample in left)
    assert len(workers.scored) == 2 * PROMPTS * IMAGES


async def test_too_many_failed_scores_stop_the_run_with_the_scorer_s_error(tmp_path: Path) -> None:
    def fails_on_the_first_prompt(sample: SampleRecord) -> float | None:
        return None if sample.prompt.id == "p0" else 0.5

    with pytest.raises(UserError, match=r"evaluation of policy 0: 4 of 20 .*max_failed_fraction.*shapes: RuntimeError"):
        await run(evaluation(tmp_path), 0, shapes=fails_on_the_first_prompt)
    tolerant = evaluation(tmp_path, {"max_failed_fraction": 0.2})
    workers = await run(tolerant, 0, shapes=fails_on_the_first_prompt)
    assert workers.drawn == []
    assert len(workers.scored) == 4  # those that failed, once more
    assert tolerant.summary(0).failed == 4


async def test_figures_and_another_run_need_no_arrays_and_pairs_only_pixels(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path)
    for version in (0, 1):
        await run(held_out, version, shapes=coin)
    before, pairs = held_out.summary(1), held_out.pairs(1, 3)
    for version in (0, 1):
        for file in (tmp_path / f"evaluations/{version:05}/samples").iterdir():
            file.unlink()
    for one, other in zip(evaluation(tmp_path).pairs(1, 3), pairs, strict=True):
        np.testing.assert_array_equal([one.base, one.final], [other.base, other.final])
    for version in (0, 1):
        for file in (tmp_path / f"evaluations/{version:05}/pixels").iterdir():
            file.unlink()
    again = evaluation(tmp_path)
    workers = await run(again, 1, shapes=coin)
    assert (workers.drawn, workers.scored, again.summary(1)) == ([], [], before)


# -- figures ----------------------------------------------------------------------------------------------------------


async def test_what_is_no_image_gets_no_score(tmp_path: Path) -> None:
    lenient = evaluation(tmp_path, {"max_failed_fraction": 0.5})
    workers = InProcess({"shapes": lambda sample: 0.7})
    workers.ruined = {"p0"}
    summary = await lenient.run_for(POLICIES[0], cast(Any, workers), cast(Any, workers))
    assert len(workers.scored) == (PROMPTS - 1) * IMAGES
    assert summary.failed == IMAGES
    assert summary.pass_rate.value == 1
    strict = evaluation(tmp_path / "strict", {"max_failed_fraction": 0.1})
    with pytest.raises(UserError, match=r"evaluation of policy 0: \d of 20 images have .* not finite"):
        await strict.run_for(POLICIES[0], cast(Any, workers), cast(Any, workers))


async def test_figures_are_those_of_the_scores(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"threshold": 0.5})
    for version in (0, 2):
        await run(held_out, version, shapes=coin)
    before, after = (by_hand(held_out, coin, version) for version in (0, 2))
    found = held_out.summary(2)
    assert (found.policy_version, found.images, found.failed) == (2, 20, 0)
    assert found.mean_score.value == pytest.approx(after.mean())
    assert found.pass_rate.value == pytest.approx((after >= 0.5).mean())
    better = np.sign(np.median(after, axis=1) - np.median(before, axis=1))
    assert found.win_rate is not None
    assert found.win_rate.value == pytest.approx(((better + 1) / 2).mean())
    assert held_out.summary(0).win_rate is None
    assert found.scores == {"shapes": found.mean_score}
    prompts = [request.prompt.id for request in held_out.requests]
    of_scores = mean_difference(after.ravel(), before.ravel(), prompts)
    of_passes = pass_rate_difference(after.ravel(), before.ravel(), prompts, 0.5)
    assert found.differences == {"pass_rate": of_passes, "mean_score": of_scores, "score/shapes": of_scores}
    assert held_out.summary(0).differences == {}
    row = evaluation_row(found)
    names = ("difference/pass_rate", "difference/pass_rate_low", "difference/pass_rate_high")
    assert [row[name] for name in names] == [of_passes.value, of_passes.low, of_passes.high]


async def test_every_policy_is_judged_by_the_base_s_bar(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"threshold": {"kind": "round_quantile", "quantile": 0.7}})
    for version in (0, 1, 2):
        await run(held_out, version, shapes=coin)
    bar = np.sort(by_hand(held_out, coin, 0).ravel())[14]  # the best 6 of 20 are as good or better
    for version, some in ((0, 6), (1, None), (2, None)):
        passing = (by_hand(held_out, coin, version) >= bar).sum()
        assert some is None or passing == some
        assert held_out.summary(version).pass_rate.value == pytest.approx(passing / 20)


async def test_a_fresh_evaluation_has_other_seeds_a_base_and_a_bar_of_its_own(tmp_path: Path) -> None:
    label = {"threshold": {"kind": "round_quantile", "quantile": 0.7}}
    decides, reports = evaluation(tmp_path, label), evaluation(tmp_path, label, fresh=True)
    for held_out in (decides, reports):
        for version in (0, 2):
            await run(held_out, version, shapes=coin)
    assert {r.prompt.id for r in decides.requests} == {r.prompt.id for r in reports.requests}
    assert not {r.seed for r in decides.requests} & {r.seed for r in reports.requests}
    for held_out in (decides, reports):
        bar = np.sort(by_hand(held_out, coin, 0).ravel())[14]
        assert held_out.summary(0).pass_rate.value == pytest.approx(0.3)
        passing = (by_hand(held_out, coin, 2) >= bar).mean()
        assert held_out.summary(2).differences["pass_rate"].value == pytest.approx(passing - 0.3)
    assert len(Round(Storage(str(tmp_path)) / "fresh_evaluations/00002", "fresh_evaluation").samples()) == 20


async def test_prompts_may_have_bars_of_their_own(tmp_path: Path) -> None:
    def easy_and_hard(sample: SampleRecord) -> float:
        return coin(sample) + 100 * int(sample.prompt.id[1:])

    label = {"threshold": {"kind": "prompt_quantile", "quantile": 0.5}}
    held_out = evaluation(tmp_path, label, generate={"images_per_prompt": 2})
    for version in (0, 2):
        await run(held_out, version, shapes=easy_and_hard)
    before, after = (by_hand(held_out, easy_and_hard, version) for version in (0, 2))
    bars = np.sort(before, axis=1)[:, 2:3]
    assert held_out.summary(0).pass_rate.value == 0.5
    assert held_out.summary(2).pass_rate.value == pytest.approx((after >= bars).mean())
    training = make_samples("round-00000", 4)
    scores = [Score(sample.id, "shapes", "1", 0.7) for sample in training]
    assert held_out.pass_rate({sample.id: sample.prompt.id for sample in training}, scores) is None


async def test_a_prompt_without_a_bar_is_left_out(tmp_path: Path) -> None:
    def alike_for_the_first(sample: SampleRecord) -> float:
        return float(sample.policy.version) if sample.prompt.id == "p0" else coin(sample)

    label = {"threshold": {"kind": "prompt_quantile", "quantile": 0.5}}
    held_out = evaluation(tmp_path, label, generate={"images_per_prompt": 2})
    for version in (0, 1):
        await run(held_out, version, shapes=alike_for_the_first)
    found = held_out.summary(1).pass_rate
    assert (found.used, found.left_out) == (16, 4)
    before, after = (by_hand(held_out, alike_for_the_first, version)[1:] for version in (0, 1))
    assert found.value == pytest.approx((after >= np.sort(before, axis=1)[:, 2:3]).mean())
    (pair,) = held_out.pairs(1, 1)
    assert (pair.final_scores, pair.final_passes) == ([1.0] * IMAGES, [None] * IMAGES)


async def test_a_base_whose_images_all_score_the_same_gives_no_bar(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"threshold": {"kind": "round_quantile"}})
    await run(held_out, 0, shapes=lambda sample: 0.25)
    await run(held_out, 1, shapes=coin)
    for version in (0, 1):
        found = held_out.summary(version)
        assert math.isnan(found.pass_rate.value)
        assert found.mean_score.value == pytest.approx(by_hand(held_out, coin, 1).mean() if version else 0.25)
    assert held_out.summary(1).win_rate is not None
    assert held_out.pass_rate({"a": "p0"}, [Score("a", "shapes", "1", 0.5)]) is None


async def test_failed_images_are_left_out_and_abstentions_do_not_pass(tmp_path: Path) -> None:
    values = [None, 0.9, 0.5, 0.1]  # failed, passes, in the dead band, does not pass

    def by_index(sample: SampleRecord) -> float | None:
        return values[sample.index]

    held_out = evaluation(tmp_path, {"threshold": {"value": 0.5, "dead_band": 0.2}, "max_failed_fraction": 1})
    await run(held_out, 0, shapes=by_index)
    found = held_out.summary(0)
    assert (found.images, found.failed) == (20, 5)
    assert found.pass_rate.value == pytest.approx(1 / 3)
    assert (found.pass_rate.used, found.pass_rate.left_out) == (15, 5)
    assert found.mean_score.value == pytest.approx(0.5)


async def test_second_opinions_are_reported_and_do_not_judge(tmp_path: Path) -> None:
    held_out = evaluation(
        tmp_path, {"scorers": {"shapes": {}, "other": {"held_out": True}, "broken": {"held_out": True}}}
    )
    await run(held_out, 0, shapes=lambda sample: 0.75, other=coin, broken=lambda sample: None)
    found = held_out.summary(0)
    assert (found.pass_rate.value, found.failed) == (1.0, 0)
    prompts = [request.prompt.id for request in held_out.requests]
    assert found.scores["other"] == mean_interval(by_hand(held_out, coin, 0).ravel(), prompts)
    assert found.scores.keys() == {"shapes", "other"}
    assert evaluation_row(found)["score/other"] == found.scores["other"].value


async def test_votes_pass_where_they_agree(tmp_path: Path) -> None:
    def other(sample: SampleRecord) -> float:
        return -coin(sample) + sample.index

    scorers = {"shapes": {"threshold": 0.25}, "other": {}}
    held_out = evaluation(tmp_path, {"scorers": scorers, "combine": "agreement", "threshold": 0.5})
    await run(held_out, 0, shapes=coin, other=other)
    passing = (by_hand(held_out, coin, 0) >= 0.25) & (by_hand(held_out, other, 0) >= 0.5)
    assert 0 < passing.mean() < 1
    assert held_out.summary(0).pass_rate.value == pytest.approx(passing.mean())


@pytest.mark.parametrize("scorers", [{}, {"shapes": {"held_out": True}}])
async def test_where_nobody_votes_nothing_is_known_of_passing(tmp_path: Path, scorers: dict[str, Any]) -> None:
    held_out = evaluation(tmp_path, {"labeler": "people:Queue", "scorers": scorers})
    for version in (0, 1):
        await run(held_out, version, **dict.fromkeys(scorers, coin))
    found = held_out.summary(1)
    assert math.isnan(found.pass_rate.value)
    assert (found.win_rate, found.images, found.failed) == (None, 20, 0)
    assert found.scores.keys() == scorers.keys()
    row = evaluation_row(found)
    differences = {f"difference/score/{name}{end}" for name in scorers for end in ("", "_low", "_high")}
    assert row.keys() == {"images", "failed", *(f"score/{name}" for name in scorers), *differences}
    assert held_out.pass_rate({"a": "p0"}, [Score("a", "shapes", "1", 0.5)]) is None
    (pair,) = held_out.pairs(1, 1)
    assert [*pair.base_scores, *pair.final_passes] == [None] * 2 * IMAGES


async def test_an_evaluation_whose_scores_all_failed_says_that_nothing_is_known(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"max_failed_fraction": 1})
    await run(held_out, 0, shapes=coin)
    await run(held_out, 1, shapes=lambda sample: None)
    found = held_out.summary(1)
    assert (found.failed, found.win_rate, found.scores, found.differences) == (20, None, {}, {})
    assert evaluation_row(found) == {"images": 20, "failed": 20}


# -- of training rounds, and pictures ---------------------------------------------------------------------------------


async def test_training_rounds_are_measured_by_the_same_bar(tmp_path: Path) -> None:
    held_out = evaluation(tmp_path, {"threshold": {"kind": "round_quantile", "quantile": 0.5}})
    await run(held_out, 0, shapes=coin)
    bar = np.sort(by_hand(held_out, coin, 0).ravel())[10]
    training = make_samples("round-00003", 7)
    values = [None, *(bar + step for step in (-0.2, -0.1, 0, 0.1, 0.2, 0.3))]
    errors = ["RuntimeError: no", *[None] * 6]
    scores = [Score(s.id, "shapes", "1", v, e) for s, v, e in zip(training, values, errors, strict=True)]
    prompts = {sample.id: sample.prompt.id for sample in training}
    assert held_out.pass_rate(prompts, scores) == pytest.approx(4 / 6)
    assert held_out.pass_rate(prompts, scores[:1]) is None


async def test_pairs_show_the_same_prompts_of_both_policies_with_their_marks(tmp_path: Path) -> None:
    def second_fails(sample: SampleRecord) -> float | None:
        return None if sample.index == 1 else coin(sample)

    held_out = evaluation(tmp_path, {"max_failed_fraction": 1})
    for version in (0, 1):
        await run(held_out, version, shapes=second_fails)
    pairs = held_out.pairs(1, 2)
    assert [pair.prompt for pair in pairs] == ["prompt 0", "prompt 4"]
    for pair, row in zip(pairs, (0, 4), strict=True):
        for version, pictures, scores, passes in (
            (0, pair.base, pair.base_scores, pair.base_passes),
            (1, pair.final, pair.final_scores, pair.final_passes),
        ):
            expected = by_hand(held_out, second_fails, version)[row]
            assert scores == [None if np.isnan(value) else value for value in expected]
            assert passes == [None if np.isnan(value) else value >= 0.5 for value in expected]
            drawn = [make_sample(request, POLICIES[version]) for request in held_out.requests[row * IMAGES :][:IMAGES]]
            np.testing.assert_array_equal(np.stack(pictures), np.stack([sample.pixels_HWC for sample in drawn]))
    assert len(held_out.pairs(1, 99)) == PROMPTS


async def test_without_pixels_there_are_no_pairs_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a rewinding to a policy whose images keep_pixels has let go of."""
    held_out = evaluation(tmp_path)
    for version in (0, 1):
        await run(held_out, version, shapes=coin)
    held_out.round(1).drop_pixels()
    assert held_out.pairs(1, 2) == []
    assert "its pixels were not kept (keep_pixels); the report shows no images" in caplog.text


def test_only_so_many_prompts_are_taken(tmp_path: Path) -> None:
    short = evaluation(tmp_path, evaluate={"max_prompts": 2, "images_per_prompt": 3})
    assert [request.prompt.id for request in short.requests] == ["p0"] * 3 + ["p1"] * 3
    first, again = (make_sample(short.requests[0]) for _ in range(2))
    assert same_sample(first, again)
