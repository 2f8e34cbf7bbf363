"""What the loop decides by itself: rounds made, resumed, sealed and stopped; without a cluster."""

import asyncio
import contextlib
import io
import pickle
import re
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console

from kto_ray import loop, making, stalls
from kto_ray.config import Labeling, RunConfig, from_tree, load
from kto_ray.errors import UserError
from kto_ray.evaluate.summary import write_results
from kto_ray.label.judging import worth_training
from kto_ray.label.protocol import Labeler
from kto_ray.loop import _Loop
from kto_ray.making import Making, score_figures
from kto_ray.objectives import DiffusionKTO
from kto_ray.people.address import database_url
from kto_ray.people.desk import Desk
from kto_ray.people.labeler import HumanLabeler
from kto_ray.placement import Placement, as_configured
from kto_ray.preflight import Preflight
from kto_ray.prompts import round_requests
from kto_ray.records import Prompt, Sample, Score, Verdict
from kto_ray.rounds import Round
from kto_ray.storage import Storage
from kto_ray.telling import nothing_trained
from tests.blocking import BlockingCall
from tests.counting import Moved, counted
from tests.factories import make_sample, make_score, make_verdict, ruined
from tests.in_process import InProcess, Value

IMAGES = 6


class Patient(Labeler):
    """Answers when it is told to; remembers everything that it is given."""

    name = "patient"

    def __init__(self, fails: bool = False, enough: int | None = None) -> None:
        self.fails, self.wanted, self.said = fails, enough, asyncio.Semaphore(0)
        self.given: dict[str, list[Score]] = {}
        self.finished: list[str] = []
        self.answers: asyncio.Queue[list[Verdict]] = asyncio.Queue()

    async def submit(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.given[sample.id] = []

    async def scored(self, stage: str, scores: Sequence[Score]) -> None:
        for score in scores:
            self.given[score.sample_id].append(score)

    async def finish(self, stage: str) -> None:
        self.finished.append(stage)

    def answer(self, sample_ids: Sequence[str]) -> None:
        self.answers.put_nowait([make_verdict(sample_id, place % 2 == 0) for place, sample_id in enumerate(sample_ids)])
        for _ in sample_ids:
            self.said.release()

    async def enough(self, stage: str) -> None:
        if self.wanted is None:
            await super().enough(stage)
        for _ in range(self.wanted or 0):
            await self.said.acquire()
        await asyncio.sleep(0.1)  # until the loop has collected them

    async def seal(self, stage: str) -> Sequence[Verdict]:
        return [make_verdict("of another round")] if self.wanted else []

    async def collect(self) -> Sequence[Verdict]:
        if self.fails:
            raise UserError("label.labeler: nobody is there")
        return await self.answers.get()

    def figures(self, stage: str) -> Mapping[str, float]:
        return {"asked": float(len(self.given))}

    def memory(self) -> Mapping[str, Any]:
        return {"finished": self.finished}


def coin(sample: Sample) -> float:
    return float(sample.seed % 97) / 96


def half(sample: Sample) -> float:
    return float(sample.prompt.id in ("p0", "p2", "p4"))


Make = Callable[..., tuple[_Loop, InProcess]]


@pytest.fixture
def make_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A loop of one run folder, again and again; with generators and scorers of this process, and no training."""

    def make(
        label: Mapping[str, Any], more: Mapping[str, Any] | None = None, **values: Value
    ) -> tuple[_Loop, InProcess]:
        workers = InProcess(values)
        monkeypatch.setattr(loop, "Caretaker", lambda *_: None)
        monkeypatch.setattr(loop, "Training", lambda *_: SimpleNamespace(coordinator=None))
        for part in ("Generators", "Scorers"):
            monkeypatch.setattr(f"kto_ray.loop.{part}", lambda *_: workers)
        config = RunConfig.model_validate(
            {
                "label": label,
                **(more or {}),
                "generate": {"images_per_round": IMAGES},
                "tracking": {"tensorboard": False},
            }
        )
        prompts = [Prompt(f"p{place}", f"prompt {place}") for place in range(IMAGES)]
        preflight = Preflight(Storage(str(tmp_path)), prompts, prompts, "b" * 64, {"unet": "b" * 64})
        console = Console(file=io.StringIO(), width=1000)
        return _Loop(config, preflight, console, as_configured(config)), workers

    return make


async def make_round(loop: _Loop, index: int = 0) -> Round:
    await asyncio.wait_for(loop.making.make(index, loop.rounds.round(index), loop.policies.resolve(0)), 60)
    return loop.rounds.round(index)


def labels(round_: Round) -> dict[str, str]:
    return {verdict.sample_id: verdict.label for verdict in round_.verdicts()}


PATIENT = {"labeler": f"{__name__}:Patient"}
TWO = {"shapes": {}, "other": {"held_out": True}}


# -- making a round ---------------------------------------------------------------------------------------------------


class Closable:
    """A part of a run that writes down that it was closed, and may fail at it."""

    def __init__(self, name: str, closed: list[str], error: BaseException | None = None) -> None:
        self.name, self.closed, self.error = name, closed, error

    def close(self) -> None:
        self.closed.append(self.name)
        if self.error:
            raise self.error


class AsynchronouslyClosable(Closable):
    async def close(self) -> None:  # type: ignore[override]
        super().close()


@pytest.mark.parametrize("error", [RuntimeError("Serve is gone"), asyncio.CancelledError()])
async def test_every_part_is_closed_dearest_first_whatever_the_others_raise(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    loop, _ = make_loop({"scorers": TWO}, shapes=half, other=coin)
    closed: list[str] = []
    loop.generators = cast(Any, Closable("generators", closed, RuntimeError("Serve is gone")))
    loop.scorers = cast(Any, Closable("scorers", closed))
    loop.labeler = cast(Any, AsynchronouslyClosable("labeler", closed, error))
    loop.caretaker = cast(Any, Closable("caretaker", closed))
    loop.metrics = cast(Any, Closable("metrics", closed))

    async def start() -> None:
        raise UserError("label.scorers.mine could not be built")

    monkeypatch.setattr(loop, "_start", start)
    with pytest.raises((UserError, asyncio.CancelledError)) as raised:
        await loop.run()
    assert closed == ["generators", "scorers", "labeler", "caretaker", "metrics"]
    assert isinstance(raised.value, UserError) or isinstance(error, asyncio.CancelledError)
    assert "Closable could not be closed" in caplog.text  # the one error does not hide the other


async def test_stalls_of_a_run_are_said_where_the_environment_asks_for_it(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop, _ = make_loop({"scorers": TWO}, shapes=half, other=coin)
    for part in ("generators", "scorers", "labeler", "caretaker", "metrics"):
        setattr(loop, part, Closable(part, []))
    seen, stack_of = threading.Event(), stalls._stack_of

    def looking(thread_id: int) -> str:
        stack = stack_of(thread_id)
        if "in start\n" in stack:
            seen.set()
        return stack

    async def start() -> None:
        assert seen.wait(60)
        raise UserError("label.scorers.mine could not be built")

    monkeypatch.setattr(stalls, "_stack_of", looking)
    monkeypatch.setattr(loop, "_start", start)
    monkeypatch.setenv("KTO_RAY_STALLS", "0.05")
    with pytest.raises(UserError, match="could not be built"):
        await loop.run()
    assert re.search(r"the event loop did not get its turn for .* in start\n", caplog.text, re.DOTALL)


async def test_a_round_is_drawn_scored_judged_and_sealed(make_loop: Make) -> None:
    loop, workers = make_loop({"scorers": TWO}, shapes=half, other=coin)
    round_ = await make_round(loop)
    assert round_.sealed
    assert sorted(workers.drawn) == sorted(round_.sample_ids)
    assert sorted(workers.scored) == sorted(round_.scored)
    assert len(round_.scored) == 2 * IMAGES
    assert workers.shrunk == 1
    expected = {s.id: "desirable" if half(s) else "undesirable" for s in round_.samples()}
    assert labels(round_) == expected
    facts = round_.manifest
    assert (facts["desirable"], facts["undesirable"], facts["pending"], facts["failed"]) == (3, 3, 0, 0)
    assert facts["score/shapes"] == 0.5
    assert facts["score/other"] == pytest.approx(np.mean([coin(sample) for sample in round_.samples()]))
    assert 0 < facts["pictures/diversity"] < 1
    assert facts["threshold/sum"] == 0.5
    assert loop.making.memory() == facts["labeler"] != {}


async def test_the_labeler_is_given_all_scores_also_failed_and_held_out_ones(make_loop: Make) -> None:
    def fails_once(sample: Sample) -> float | None:
        return None if sample.prompt.id == "p1" else coin(sample)

    scorers = {"shapes": {"held_out": True}, "other": {"held_out": True}}
    loop, _ = make_loop({**PATIENT, "scorers": scorers}, shapes=fails_once, other=coin)
    labeler = cast(Patient, loop.labeler)
    making = asyncio.create_task(make_round(loop))
    while not labeler.finished:
        await asyncio.sleep(0.01)
    labeler.answer(list(labeler.given))
    round_ = await making
    assert labeler.finished == [round_.stage]
    for sample in round_.samples():
        scores = {score.scorer: score.value for score in labeler.given[sample.id]}
        assert scores == {"shapes": fails_once(sample), "other": coin(sample)}
    assert round_.manifest["asked"] == IMAGES
    assert loop.making.memory() == {"finished": [round_.stage]}


async def test_people_need_no_scorers(make_loop: Make) -> None:
    loop, workers = make_loop({**PATIENT, "scorers": {}})
    making = asyncio.create_task(make_round(loop))
    labeler = cast(Patient, loop.labeler)
    while not labeler.finished:
        await asyncio.sleep(0.01)
    labeler.answer(list(labeler.given))
    assert len(labels(await making)) == IMAGES
    assert workers.scored == []


def with_people(loop: _Loop) -> Desk:
    """A desk of this process, where people and the loop's labeler meet."""
    labeler = cast(HumanLabeler, loop.labeler)
    labeler.desk = Desk(database_url(labeler.human, loop.run_storage), loop.run_storage.uri, labeler.human, 0)
    return labeler.desk


async def offers_of_a_round(desk: Desk, badge: str) -> list[str]:
    """Waits until somebody can see all of its images."""
    while len(offers := (await desk.turn(badge, IMAGES)).offers) < IMAGES:
        await asyncio.sleep(0.01)
    return [offer.item for offer in offers]


@pytest.mark.parametrize("crash", [False, True])
async def test_people_judge_while_a_scorer_hangs(make_loop: Make, crash: bool) -> None:
    label = {"labeler": "human", "scorers": {"shapes": {}, "other": {"held_out": True}}}
    loop, workers = make_loop(label, shapes=half, other=coin)
    desk = with_people(loop)
    badge = (await desk.badge_of("ann")).id
    workers.answering.clear()
    making = asyncio.create_task(make_round(loop))
    offered = await asyncio.wait_for(offers_of_a_round(desk, badge), 60)
    for place, item in enumerate(offered):
        await desk.answer(badge, item, "desirable" if place % 2 else "undesirable", 1.0, 0)
    while (progress := (await desk.turn(badge, 0)).progress).waits_for == "images":  # until it hears that no more come
        await asyncio.sleep(0.01)
    assert (progress.judged, progress.target, progress.waits_for) == (IMAGES, IMAGES, "people")
    assert (workers.scored, making.done()) == ([], False)  # scores belong to the round, which therefore waits
    if crash:
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
        loop, workers = make_loop(label, shapes=half, other=coin)
        desk = with_people(loop)
        making = asyncio.create_task(make_round(loop))
    workers.answering.set()
    facts = (await making).manifest
    assert (facts["desirable"], facts["undesirable"], facts["people/answers"]) == (3, 3, IMAGES)
    assert {"score/shapes", "score/other"} <= facts.keys()
    assert loop.rounds.ledger().balances


@pytest.mark.parametrize("tolerated", [0.1, 0.5])
async def test_failed_scores_stop_the_run_past_the_limit(make_loop: Make, tolerated: float) -> None:
    def fails_twice(sample: Sample) -> float | None:
        return None if sample.prompt.id in ("p0", "p1") else half(sample)

    loop, _ = make_loop({"max_failed_fraction": tolerated}, shapes=fails_twice)
    if tolerated < 0.3:
        with pytest.raises(UserError, match=r"round-00000: \d of 6 .*max_failed_fraction.* shapes: RuntimeError: no"):
            await make_round(loop)
        assert not loop.rounds.round(0).sealed
    else:
        round_ = await make_round(loop)
        became = labels(round_)
        failed = {sample.id for sample in round_.samples() if fails_twice(sample) is None}
        assert {sample_id for sample_id, label in became.items() if label == "failed"} == failed
        assert (round_.manifest["failed"], round_.manifest["score_failed/shapes"]) == (2, 2)
        assert loop.rounds.ledger().failed == 2
        assert loop.rounds.ledger().balances


async def test_what_is_no_image_is_a_counted_failure_that_nobody_sees(make_loop: Make) -> None:
    loop, workers = make_loop({"scorers": TWO, "max_failed_fraction": 0.2}, shapes=half, other=coin)
    workers.ruined = {"p5"}
    round_ = await make_round(loop)
    (failed,) = (sample for sample in round_.samples() if sample.error)
    assert failed.prompt.id == "p5"
    assert np.isnan(failed.latents_CHW).all()
    assert failed.id not in {sample_id for sample_id, _ in workers.scored}
    (verdict,) = (verdict for verdict in round_.verdicts() if verdict.sample_id == failed.id)
    assert (verdict.label, verdict.labeler, verdict.rule) == ("failed", "drawing", failed.error)
    facts, ledger = round_.manifest, loop.rounds.ledger()
    assert (facts["desirable"], facts["undesirable"], facts["failed"], facts["failed_draws"]) == (3, 2, 1, 1)
    assert (ledger.generated, ledger.labeled, ledger.failed, ledger.pending) == (6, 5, 1, 0)
    assert ledger.balances
    assert failed.id not in {sample.id for sample in loop.rounds.trainable(0, 0, 0)[0]}
    # Pictures are measured on what is one.
    assert facts["pictures/brightness"] > 0.4


async def test_a_labeler_is_not_given_what_is_no_image_and_does_not_wait_for_it(make_loop: Make) -> None:
    loop, workers = make_loop({**PATIENT, "max_failed_fraction": 0.2}, shapes=coin)
    labeler = cast(Patient, loop.labeler)
    workers.ruined = {f"p{IMAGES - 1}"}
    stage = loop.rounds.stage(0)
    sound = [s.id for s in round_requests(loop.prompts, 0, stage, 0, IMAGES, 1) if s.prompt.id not in workers.ruined]
    labeler.answer(sound)  # every verdict is there before the last image fails
    round_ = await make_round(loop)
    assert labeler.given.keys() == set(sound)
    assert round_.manifest["failed"] == 1


async def test_too_many_failed_draws_stop_the_run_and_are_drawn_anew_with_another_setting(make_loop: Make) -> None:
    loop, workers = make_loop({"max_failed_fraction": 0.2}, shapes=half)
    workers.ruined = {"p1", "p4"}
    with pytest.raises(
        UserError, match=r"round-00000: 2 of 6 images have latents or pixels that are not finite.*rewind"
    ):
        await make_round(loop)
    loop, workers = make_loop({"max_failed_fraction": 0.2}, shapes=half)
    round_ = await make_round(loop)
    assert round_.manifest["failed"] == 1  # the one that was within the limit
    assert loop.rounds.ledger().balances


async def test_a_crash_between_a_failed_draw_and_its_verdict_loses_neither(make_loop: Make) -> None:
    loop, workers = make_loop({"max_failed_fraction": 0.2}, shapes=half)
    request = round_requests(loop.prompts, 0, loop.rounds.stage(0), 0, IMAGES, 1)[0]
    loop.rounds.round(0).add_samples([ruined(make_sample(request, loop.policies.resolve(0)))])
    round_ = await make_round(loop)
    assert request.id not in workers.drawn
    assert labels(round_)[request.id] == "failed"
    assert round_.manifest["failed"] == 1


async def test_what_breaks_the_labeler_ends_the_round(make_loop: Make) -> None:
    loop, _ = make_loop({**PATIENT, "labeler_args": {"fails": True}}, shapes=coin)
    with pytest.raises(UserError, match="nobody is there"):
        await make_round(loop)
    assert not loop.rounds.round(0).sealed


# -- the deadline -----------------------------------------------------------------------------------------------------


async def test_a_round_is_sealed_at_its_deadline_and_late_verdicts_join_the_next(make_loop: Make) -> None:
    loop, _ = make_loop({**PATIENT, "deadline_s": 0.2}, shapes=coin)
    labeler = cast(Patient, loop.labeler)
    making = asyncio.create_task(make_round(loop))
    while not labeler.finished:
        await asyncio.sleep(0.01)
    early, late = list(labeler.given)[:4], list(labeler.given)[4:]
    labeler.answer(early)
    first = await making
    assert labels(first).keys() == set(early)
    assert first.manifest["pending"] == 2
    assert loop.rounds.ledger().pending == 2
    labeler.answer(late)
    second = await make_round(loop, 1)
    assert labels(second).keys() == set(late)
    assert second.manifest["pending"] == IMAGES
    ledger = loop.rounds.ledger()
    assert (ledger.labeled, ledger.pending) == (IMAGES, IMAGES)
    assert ledger.balances


async def test_a_labeler_may_have_enough_before_there_is_a_verdict_on_everything(make_loop: Make) -> None:
    loop, _ = make_loop({**PATIENT, "labeler_args": {"enough": 4}}, shapes=coin)
    labeler = cast(Patient, loop.labeler)
    making = asyncio.create_task(make_round(loop))
    while not labeler.finished:
        await asyncio.sleep(0.01)
    labeler.answer(list(labeler.given)[:3])
    await asyncio.sleep(0.1)
    assert not making.done()
    labeler.answer(list(labeler.given)[3:4])
    round_ = await making
    assert labels(round_).keys() == {*list(labeler.given)[:4], "of another round"}
    assert round_.manifest["pending"] == 2


@pytest.mark.parametrize("on_deadline", ["train", "scorer"])
async def test_the_loop_waits_for_people_no_longer_than_its_deadline(make_loop: Make, on_deadline: str) -> None:
    label = {"labeler": "human", "deadline_s": 0.2, "human": {"on_deadline": on_deadline}}
    loop, _ = make_loop(label, shapes=half)
    with_people(loop)
    round_ = await make_round(loop)
    facts = round_.manifest
    assert facts["people/judged"] == facts["people/answers"] == 0
    if on_deadline == "scorer":
        assert (facts["desirable"], facts["undesirable"], facts["pending"]) == (3, 3, 0)
    else:
        assert (facts["desirable"], facts["undesirable"], facts["pending"]) == (0, 0, IMAGES)
    assert loop.rounds.ledger().balances


async def test_images_that_are_not_scored_by_the_deadline_have_failed(make_loop: Make) -> None:
    loop, workers = make_loop({"deadline_s": 0.2}, shapes=half)
    workers.answering.clear()
    round_ = await make_round(loop)
    assert round_.sealed
    assert (round_.scores(), round_.manifest["failed"], round_.manifest["pending"]) == ([], IMAGES, 0)
    assert {verdict.rule for verdict in round_.verdicts()} == {"no score of shapes: not scored"}
    workers.answering.set()
    assert (await make_round(loop, 1)).manifest["desirable"] == 3


# -- after a crash ----------------------------------------------------------------------------------------------------


async def test_what_a_crash_left_unjudged_is_judged_and_nothing_is_done_twice(make_loop: Make) -> None:
    loop, before = make_loop({"scorers": TWO}, shapes=half, other=coin)
    before.batch_size = 4
    before.answering.clear()
    making = asyncio.create_task(make_round(loop))
    while len(loop.rounds.round(0).sample_ids) < 4:
        await asyncio.sleep(0.01)
    making.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await making
    there = sorted(loop.rounds.round(0).sample_ids)
    loop.rounds.round(0).add_scores([Score(there[0], "shapes", "1", 1.0), Score(there[0], "other", "1", 0.5)])
    loop.rounds.round(0).add_scores([Score(there[1], "other", "1", 0.5)])

    loop, after = make_loop({"scorers": TWO}, shapes=half, other=coin)
    round_ = await make_round(loop)
    assert not set(after.drawn) & set(there)
    assert len(round_.sample_ids) == IMAGES
    assert {(there[0], "shapes"), (there[0], "other"), (there[1], "other")}.isdisjoint(after.scored)
    assert len(after.scored) == 2 * IMAGES - 3
    # What was known counts: nothing has failed for want of it.
    yes = {sample.id for sample in round_.samples() if half(sample) or sample.id == there[0]}
    assert labels(round_) == {id_: "desirable" if id_ in yes else "undesirable" for id_ in round_.sample_ids}
    assert loop.rounds.ledger().balances


async def test_a_crash_between_verdicts_and_seal_costs_nothing(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: object) -> None:
        raise KeyboardInterrupt

    loop, _ = make_loop({"threshold": {"kind": "round_quantile"}}, shapes=coin)
    with monkeypatch.context() as patch:
        patch.setattr(Making, "seal", die)
        with pytest.raises(KeyboardInterrupt):
            await loop.making.make(0, loop.rounds.round(0), loop.policies.resolve(0))
    before = labels(loop.rounds.round(0))
    assert len(before) == IMAGES
    loop, again = make_loop({"threshold": {"kind": "round_quantile"}}, shapes=coin)
    round_ = await make_round(loop)
    assert (again.drawn, again.scored) == ([], [])
    assert labels(round_) == before
    assert round_.sealed


# -- reward hacking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "stops", "says"), [("warn", False, 1), ("stop", True, 1), ("off", False, 0)])
def test_suspicion_is_said_aloud_and_ends_the_run_if_wanted(
    make_loop: Make, action: str, stops: bool, says: int
) -> None:
    loop, _ = make_loop({"scorers": TWO, "watch": {"rounds": 3, "action": action}})
    for index in range(5):
        loop.metrics.log("round", index, {"score/shapes": 0.1 * index, "score/other": -0.1 * max(0, index - 1)})
    assert not loop.learning._doubtful(1)  # rows of later rounds, which a continued run has, do not count
    assert cast(io.StringIO, loop.console.file).getvalue() == ""
    assert loop.learning._doubtful(4) is stops
    assert cast(io.StringIO, loop.console.file).getvalue().count("possible reward hacking: ") == says


@pytest.mark.parametrize(("watch", "stops", "says"), [("warn", False, 1), ("stop", True, 1), ("off", False, 0)])
def test_collapse_is_said_aloud_and_ends_the_run_if_wanted(make_loop: Make, watch: str, stops: bool, says: int) -> None:
    loop, _ = make_loop({}, {"train": {"watch": watch, "objective": {"beta": 75}}})
    loop.metrics.log("round", 0, {"objective/g_desirable": 0.01, "objective/g_undesirable": -0.05})
    loop.metrics.log("round", 1, {"objective/g_desirable": -0.05, "objective/g_undesirable": -0.09})
    assert not loop.learning._doubtful(0)  # rows of later rounds, which a continued run has, do not count
    assert loop.learning._doubtful(1) is stops
    said = cast(io.StringIO, loop.console.file).getvalue()
    assert said.count("possible collapse: ") == said.count("train.learning_rate") == says


# -- stopping at a pass rate ------------------------------------------------------------------------------------------


def three_then_all(sample: Sample) -> float:
    """Half of the prompts pass by policy 1, all from policy 2 on; by the base none."""
    return float(sample.policy.version > 1 or (sample.policy.version == 1 and half(sample)))


async def trained_to_the_end(
    loop: _Loop, monkeypatch: pytest.MonkeyPatch, collapses_in: int | None = None
) -> dict[str, Any]:
    """Makes and "trains" rounds until the loop has enough, and sums up."""

    async def train(_: object, index: int, round_: Round) -> None:
        weights = {"weight": torch.full((1,), float(index))}
        await asyncio.to_thread(loop.policies.publish, index + 1, weights, {})
        g = -0.05 if index == collapses_in else 0.01
        figures = {"seconds/train": 0.0, "objective/g_desirable": g, "objective/g_undesirable": g}
        await asyncio.to_thread(round_.record_training, {}, {"figures": figures})

    monkeypatch.setattr(loop.learning, "_train", train)
    making = asyncio.create_task(loop._make_rounds())
    await asyncio.wait_for(loop.learning.learn(loop), 120)
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    await loop.retention.close()
    what = loop.config, loop.run_storage, loop.metrics, loop.rounds, loop.evaluation, loop.fresh
    return await asyncio.to_thread(write_results, *what, {})


def stages_of(loop: _Loop, kind: str) -> list[int]:
    return [int(row["step"]) for row in loop.metrics.of(kind)]


@pytest.mark.parametrize(("watch", "version"), [("warn", 4), ("stop", 2)])
async def test_a_run_that_collapses_ends_if_wanted_again_and_again(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, watch: str, version: int
) -> None:
    more = {"rounds": 4, "evaluate": {"images_per_prompt": 2}, "train": {"watch": watch}}
    for _ in range(2):
        loop, _ = make_loop({}, more, shapes=three_then_all)
        summary = await trained_to_the_end(loop, monkeypatch, collapses_in=1)
        assert summary["policy_version"] == version
        (doubt,) = summary["doubts"]
        assert doubt.startswith("after round 1: possible collapse: ")
        assert "After round 1: possible collapse: " in loop.run_storage.read("report.html").decode()


@pytest.mark.parametrize("again", [False, True])
async def test_a_pass_rate_counts_once_chance_would_not_reach_it(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    goal = {"rounds": 4, "evaluate": {"every": 1, "images_per_prompt": 2, "stop_at_pass_rate": 0.4}}
    loop, workers = make_loop({}, goal, shapes=three_then_all)
    summary = await trained_to_the_end(loop, monkeypatch)
    drawn = set(workers.drawn)
    if again:  # the same command
        loop, workers = make_loop({}, goal, shapes=three_then_all)
        summary = await trained_to_the_end(loop, monkeypatch)
        assert not {request.id for request in loop.evaluation.requests + cast(Any, loop.fresh).requests} & set(
            workers.drawn
        )
    else:
        assert {request.id for request in cast(Any, loop.fresh).requests} <= drawn
    assert stages_of(loop, "evaluation") == [0, 1, 2]
    first = loop.evaluation.summary(1).pass_rate
    assert first.low < 0.4 < first.value  # 50 % would have been enough, but for the interval
    # What decided is not what is reported.
    assert stages_of(loop, "fresh_evaluation") == [0, 2]
    assert not {r.seed for r in loop.evaluation.requests} & {r.seed for r in cast(Any, loop.fresh).requests}
    assert (summary["fresh_seeds"], summary["policy_version"]) == (True, 2)
    assert (summary["base"]["pass_rate"], summary["final"]["pass_rate"]) == (0.0, 1.0)
    assert summary["difference"]["pass_rate"]["value"] == 1.0
    assert summary["evaluation_images"] == 5 * 2 * IMAGES


async def test_without_a_goal_the_evaluations_themselves_are_reported(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = make_loop({}, {"rounds": 2, "evaluate": {"images_per_prompt": 2}}, shapes=three_then_all)
    summary = await trained_to_the_end(loop, monkeypatch)
    assert stages_of(loop, "evaluation") == [0, 2]
    assert stages_of(loop, "fresh_evaluation") == []
    assert (summary["fresh_seeds"], summary["final"]["pass_rate"]) == (False, 1.0)
    assert summary["difference"].keys() == {"pass_rate", "mean_score", "score/shapes"}


# -- policies that go -------------------------------------------------------------------------------------------------


def kept_policies(loop: _Loop) -> list[int]:
    return [version for version in loop.policies.versions() if loop.policies.has_weights(version)]


@pytest.mark.parametrize("lag", [0, 1])
async def test_policies_that_nobody_needs_go_and_the_run_goes_on(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    more = {"max_policy_lag": lag, "keep_policies": 2, "evaluate": {"every": 2, "images_per_prompt": 2}}
    loop, workers = make_loop({}, {**more, "rounds": 5}, shapes=three_then_all)
    workers.policies = loop.policies
    summary = await trained_to_the_end(loop, monkeypatch)
    assert kept_policies(loop) == [0, 4, 5]
    assert summary["ledger"]["balances"]
    rows, drawn = loop.metrics.of("evaluation"), loop.rounds.ledger().generated
    digests = [loop.policies.resolve(version).digest for version in loop.policies.versions()]

    loop, workers = make_loop({}, {**more, "rounds": 7}, shapes=three_then_all)
    workers.policies = loop.policies
    summary = await trained_to_the_end(loop, monkeypatch)
    assert kept_policies(loop) == [0, 6, 7]
    # What was evaluated is known, although its policy cannot draw any more.
    assert stages_of(loop, "evaluation") == [0, 2, 4, 5, 6, 7]
    assert loop.metrics.of("evaluation")[: len(rows)] == rows
    assert summary["images"] == drawn + 2 * IMAGES
    assert [loop.policies.resolve(version).digest for version in range(len(digests))] == digests


async def test_all_policies_stay_unless_told_otherwise(make_loop: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = make_loop({}, {"rounds": 4, "evaluate": {"images_per_prompt": 2}}, shapes=three_then_all)
    await trained_to_the_end(loop, monkeypatch)
    assert kept_policies(loop) == [0, 1, 2, 3, 4]
    more = {"rounds": 5, "keep_policies": 3, "evaluate": {"images_per_prompt": 2}}
    loop, _ = make_loop({}, more, shapes=three_then_all)
    await trained_to_the_end(loop, monkeypatch)
    assert kept_policies(loop) == [0, 3, 4, 5]


async def test_a_policy_that_cannot_be_removed_stays_and_is_said(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(storage: Storage, name: str) -> None:
        raise UserError(f"runs_folder: cannot delete {storage}/{name}: Permission denied")

    more = {"rounds": 3, "keep_policies": 2, "evaluate": {"images_per_prompt": 2}}
    loop, _ = make_loop({}, more, shapes=three_then_all)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", refused)
        assert (await trained_to_the_end(loop, monkeypatch))["policy_version"] == 3
    assert "policies before 2 could not be removed: runs_folder: cannot delete" in caplog.text
    assert kept_policies(loop) == [0, 1, 2, 3]


async def test_a_round_does_not_wait_for_what_is_removed(make_loop: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"rounds": 4, "keep_policies": 2, "evaluate": {"images_per_prompt": 2}}
    loop, _ = make_loop({}, more, shapes=three_then_all)
    rounds_are_done, delete = threading.Event(), Storage.delete

    def slow(storage: Storage, name: str) -> None:
        assert rounds_are_done.wait(60)
        delete(storage, name)

    async def close() -> None:
        assert kept_policies(loop) == [0, 1, 2, 3, 4]
        rounds_are_done.set()
        await asyncio.to_thread(loop.retention._thread.shutdown)

    monkeypatch.setattr(Storage, "delete", slow)
    monkeypatch.setattr(loop.retention, "close", close)
    await trained_to_the_end(loop, monkeypatch)
    assert kept_policies(loop) == [0, 3, 4]


async def test_a_verdict_that_is_being_stored_when_the_round_has_enough_is_not_lost(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = make_loop({}, shapes=half)
    labeler = loop.making.labeler = Patient(enough=2)
    has_enough, store = threading.Event(), Round.store_verdicts
    cancel = making.cancelled

    async def cancel_and_note(tasks: Any) -> None:
        await cancel(tasks)
        has_enough.set()

    def slow(self: Round, new: Sequence[Verdict]) -> None:
        assert has_enough.wait(60)
        store(self, new)

    monkeypatch.setattr(making, "cancelled", cancel_and_note)
    monkeypatch.setattr(Round, "store_verdicts", slow)
    task = asyncio.create_task(make_round(loop))
    while len(labeler.given) < IMAGES:
        await asyncio.sleep(0.01)
    labeler.answer(sorted(labeler.given)[:2])
    round_ = await task
    assert [verdict.sample_id for verdict in round_.verdicts()][-2:] == sorted(labeler.given)[:2]


async def test_the_loop_never_waits_for_storage_or_hashes(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, calls_on_the_loop: list[BlockingCall]
) -> None:
    """Nor when it is continued, with a round that was left half made, and evaluations."""
    more = {"rounds": 2, "evaluate": {"images_per_prompt": 2}, "keep_policies": 2, "keep_pixels": 0}
    loop, _ = make_loop({}, more, shapes=three_then_all)
    calls_on_the_loop.clear()  # those of its making, before anything runs
    await trained_to_the_end(loop, monkeypatch)
    round_ = loop.rounds.round(2)
    requests = round_requests(loop.prompts, 0, round_.stage, 2, IMAGES)
    await asyncio.to_thread(round_.add_samples, [make_sample(request) for request in requests[:3]])
    loop, workers = make_loop({}, {**more, "rounds": 4}, shapes=three_then_all)
    calls_on_the_loop.clear()
    await trained_to_the_end(loop, monkeypatch)
    assert calls_on_the_loop == []
    assert not {request.id for request in requests[:3]} & set(workers.drawn)


@pytest.mark.parametrize(("keep", "rounds", "evaluations"), [(0, [], [0, 4]), (2, [2, 3], [0, 4]), ("all", None, None)])
async def test_pixels_that_nobody_needs_go(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch, keep: Any, rounds: list[int] | None, evaluations: list[int] | None
) -> None:
    more = {"rounds": 4, "keep_pixels": keep, "evaluate": {"every": 1, "images_per_prompt": 2}}
    loop, _ = make_loop({}, more, shapes=three_then_all)
    summary = await trained_to_the_end(loop, monkeypatch)
    assert summary["ledger"]["balances"]

    def kept(folder: Storage) -> list[int]:
        return [int(name) for name in folder.names() if folder.names(f"{name}/pixels")]

    assert kept(loop.rounds.storage) == (list(range(4)) if rounds is None else rounds)
    assert kept(loop.run_storage / "evaluations") == (list(range(5)) if evaluations is None else evaluations)
    for round_ in loop.rounds.rounds():
        round_.verify()
        assert len(round_.latents_of(round_.records())) == IMAGES


async def test_what_a_continued_run_reads_does_not_grow_with_its_images(
    make_loop: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rounds that are walked past nothing is read, of others no pixels."""
    read: dict[int, Moved] = {}
    for before in (2, 6):
        loop, _ = make_loop({}, {"rounds": before, "evaluate": {"images_per_prompt": 2}}, shapes=three_then_all)
        await trained_to_the_end(loop, monkeypatch)
        more = {"rounds": before + 1, "evaluate": {"images_per_prompt": 2}}
        loop, _ = make_loop({}, more, shapes=three_then_all)
        with counted() as read[before], monkeypatch.context() as patch:
            patch.setattr("tests.unit.test_loop.write_results", lambda *_: {})  # at the end all rounds are added up
            await trained_to_the_end(loop, monkeypatch)
    assert read[6].files_read == read[2].files_read


# -- figures and decisions --------------------------------------------------------------------------------------------


def test_figures_of_scores_leave_failures_out_and_count_them() -> None:
    scores = [make_score("a", 0.2), make_score("b", 0.6), make_score("c", None), Score("a", "other", "1", None, "no")]
    assert score_figures(scores) == {
        "score/shapes": pytest.approx(0.4),
        "score_std/shapes": pytest.approx(0.2),
        "score_failed/shapes": 1,
        "score_failed/other": 1,
    }
    assert score_figures([]) == {}


YES, NO = Verdict("a", "desirable", "x", "y"), Verdict("b", "undesirable", "x", "y")
ABSTAINED, FAILED = Verdict("c", "abstain", "x", "y"), Verdict("d", "failed", "x", "y")


def test_people_who_did_not_answer_are_given_more_time() -> None:
    with pytest.raises(UserError, match=r"round 3 .* one class only .* Give people more time \(label\.deadline_s\)"):
        worth_training(Labeling.model_validate({"labeler": "human"}), 3, [], DiffusionKTO())


def test_a_round_of_both_classes_is_trained_on() -> None:
    assert worth_training(Labeling(), 0, [YES, NO], DiffusionKTO())


@pytest.mark.parametrize("verdicts", [[YES], [NO], [], [YES, ABSTAINED, FAILED]])
def test_a_threshold_that_leaves_one_class_empty_stops_the_run(verdicts: list[Verdict]) -> None:
    with pytest.raises(UserError, match=r"round 3 .* one class only .* label\.threshold than .*on_one_class=skip"):
        worth_training(Labeling.model_validate({"threshold": 2}), 3, verdicts, DiffusionKTO())


def test_so_do_too_few_verdicts() -> None:
    with pytest.raises(UserError, match=r"round 3 has fewer verdicts than 3 \(1 desirable, 1 undesirable, 1 abstained"):
        worth_training(Labeling(min_verdicts=3), 3, [YES, NO, ABSTAINED], DiffusionKTO())
    assert worth_training(Labeling(min_verdicts=3), 3, [YES, NO, NO], DiffusionKTO())


@pytest.mark.parametrize("verdicts", [[YES], [NO, FAILED], [YES, NO]])
@pytest.mark.parametrize(("choice", "trained"), [("skip", False), ("train", True), ("widen", False)])
def test_or_the_configuration_says_what_to_do(choice: Any, trained: bool, verdicts: list[Verdict]) -> None:
    assert worth_training(Labeling(on_one_class=choice, min_verdicts=3), 0, verdicts, DiffusionKTO()) is trained


@pytest.mark.parametrize("choice", ["skip", "train", "widen"])
def test_nothing_is_never_trained_on(choice: Any) -> None:
    assert not worth_training(Labeling(on_one_class=choice), 0, [ABSTAINED, FAILED], DiffusionKTO())


# -- after the fact ---------------------------------------------------------------------------------------------------


async def test_a_run_that_a_dead_scorer_stopped_goes_on_when_it_is_back(make_loop: Make) -> None:
    dead, _ = make_loop({}, shapes=lambda _: None)
    with pytest.raises(UserError, match="could not be scored"):
        await make_round(dead)
    alive, workers = make_loop({}, shapes=half)
    round_ = await make_round(alive)
    assert (round_.manifest["desirable"], round_.manifest["failed"]) == (3, 0)
    assert len({sample_id for sample_id, _ in workers.scored}) == IMAGES


async def test_a_slow_held_out_scorer_does_not_cost_the_verdicts(make_loop: Make) -> None:
    loop, workers = make_loop({"scorers": TWO, "deadline_s": 0.5}, shapes=half, other=coin)
    never = asyncio.Event()

    async def score_each(samples: Sequence[Sample], known: Sequence[Score] = ()) -> AsyncGenerator[list[Score], None]:
        yield [score for score in await workers.score(samples, known) if score.scorer == "shapes"]
        await never.wait()

    workers.score_each = score_each  # type: ignore[method-assign]
    round_ = await make_round(loop)
    assert {score.scorer for score in round_.scores()} == {"shapes"}
    assert (round_.manifest["desirable"], round_.manifest["undesirable"]) == (3, 3)


def test_a_run_holds_its_folder_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("shapes_demo", [f"runs_folder={tmp_path}", "run=demo"])
    said: list[str] = []

    class Work:
        def __init__(self, config: RunConfig, preflight: Preflight, console: Console, placement: Placement) -> None:
            self.run_storage = preflight.run

        async def run(self) -> dict[str, Any]:
            with pytest.raises(UserError) as caught:
                loop.run_online_kto(config)
            said.append(str(caught.value))
            self.run_storage.write("while held", b"")
            (name,) = self.run_storage.names("lease")
            Storage(self.run_storage.uri).write("lease/99999-aaaaaaaa.json", self.run_storage.read(f"lease/{name}"))
            pickle.loads(pickle.dumps(self.run_storage)).write("after it was lost", b"")
            return {}

    monkeypatch.setattr(loop, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(loop, "placed", as_configured)
    monkeypatch.setattr(loop, "_Loop", Work)
    with pytest.raises(UserError, match="was taken over by"):
        loop.run_online_kto(config)
    assert "is in use by" in said[0]
    written = Storage(str(tmp_path / "demo")).names()
    assert "while held" in written
    assert "after it was lost" not in written


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("sft", "by sft: it has no desirable image"),
        ({"kind": "dpo"}, "no prompt has both a desirable and an undesirable image, so that there are no pairs"),
        (
            {"kind": "dpo", "pairs": "scores"},
            "no prompt has two images whose scores differ, so that there are no pairs",
        ),
    ],
)
def test_a_round_of_which_nothing_is_trained_on_says_what_it_lacks(objective: Any, words: str) -> None:
    config = from_tree({"train": {"objective": objective}, "generate": {"images_per_prompt": 4}})
    assert words in nothing_trained(3, config, {"sample": 0})
    assert "older than max_policy_lag" in nothing_trained(3, config, {})
