"""People as a labeler: what reaches a round, when, and what becomes of the rest; with a desk of this process."""

import asyncio
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sqlalchemy import select

from kto_ray.config import Labeling, RunConfig
from kto_ray.errors import UserError
from kto_ray.parts import write_part
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.desk import Desk
from kto_ray.people.labeler import HumanLabeler, people_figures
from kto_ray.people.tables import images, items, open_database
from kto_ray.people.terms import Judged
from kto_ray.records import PolicyRef, Sample, Score, Verdict
from kto_ray.rounds import round_number
from kto_ray.samples import Samples
from kto_ray.storage import Storage
from tests.factories import make_samples

HELD_OUT = {"shapes": {"held_out": True}}


class Bench:
    """A labeler on a run folder, with somebody who answers; made anew, it is the labeler of a continued run."""

    def __init__(self, folder: Path, label: Mapping[str, Any], lag: int = 0) -> None:
        config = RunConfig(label=Labeling.model_validate({"labeler": "human", **label}), max_policy_lag=lag)
        self.storage = Storage(str(folder))
        self.labeler = HumanLabeler(config, self.storage, Console())
        self.human = config.label.human
        self.labeler.desk = Desk(database_url(self.human, self.storage), self.storage.uri, self.human, lag)
        self.badges: dict[str, str] = {}

    async def badge(self, name: str) -> str:
        if name not in self.badges:
            self.badges[name] = (await self.labeler.desk.badge_of(name)).id
        return self.badges[name]

    async def offers(self, name: str = "me") -> list[str]:
        """Items that somebody is looking at."""
        turn = await self.labeler.desk.turn(await self.badge(name), 100)
        return [offer.item for offer in turn.offers]

    async def answer(self, offered: Sequence[str], verdict: str, name: str = "me") -> None:
        for item in offered:
            await self.labeler.desk.answer(await self.badge(name), item, verdict, 2.0, 0)

    async def submit(self, samples: Sequence[Sample], values: Sequence[float | None] | None = None) -> None:
        """All at once, with scores of "shapes", and finish the round."""
        scores = [
            Score(sample.id, "shapes", "1", value, "no" if value is None else None)
            for sample, value in zip(samples, values or [0.5] * len(samples), strict=True)
        ]
        await self.labeler.submit(Samples.of(samples))
        await self.labeler.scored(samples[0].stage, scores)
        await self.labeler.finish(samples[0].stage)

    async def seal(self, stage: str = "round-00000") -> dict[str, Verdict]:
        return {verdict.sample_id: verdict for verdict in await self.labeler.seal(stage)}

    async def sample_of(self, item: str) -> str:
        """The sample behind an item, as only the database knows."""
        with self.labeler.desk.engine.begin() as connection:
            return str(connection.scalar(select(items.c.sample_id).where(items.c.id == item)))


async def is_enough(bench: Bench, stage: str = "round-00000") -> bool:
    task = asyncio.ensure_future(bench.labeler.enough(stage))
    await asyncio.wait({task}, timeout=0.2)
    task.cancel()
    return task.done() and not task.cancelled()


async def test_a_round_is_enough_when_everybody_has_judged_everything(tmp_path: Path) -> None:
    bench, samples = Bench(tmp_path, {"scorers": HELD_OUT}), make_samples("round-00000", 5)
    await bench.submit(samples)
    assert not await is_enough(bench)
    offered = await bench.offers()
    await bench.answer(offered[:2], "desirable")
    await bench.answer(offered[2:3], "unsure")
    assert not await is_enough(bench)
    await bench.answer(offered[3:], "undesirable")
    assert await is_enough(bench)
    verdicts = await bench.seal()
    labels = [verdicts[await bench.sample_of(item)].label for item in offered]
    assert labels == ["desirable", "desirable", "abstain", "undesirable", "undesirable"]
    assert verdicts.keys() == {sample.id for sample in samples}
    assert {verdict.labeler for verdict in verdicts.values()} == {"human"}
    assert verdicts[await bench.sample_of(offered[0])].rule == "majority@1(of 1): me desirable"
    figures = bench.labeler.figures("round-00000")
    assert (figures["people/judged"], figures["people/answers"], figures["people/seconds"]) == (5, 5, 2.0)
    assert (figures["people/late"], figures["people/policy_lag"], figures["people/asked"]) == (0, 0, 5)
    record = bench.storage.read_table("people/00000.parquet").to_pylist()
    assert {row["sample_id"] for row in record} == verdicts.keys()


async def test_images_that_everybody_has_skipped_hold_nobody_up(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"scorers": {}})
    await bench.submit(make_samples("round-00000", 3))
    offered = await bench.offers()
    await bench.answer(offered[:2], "desirable")
    await bench.answer(offered[2:], "skip")
    assert await is_enough(bench)
    await bench.badge("ann")  # a newcomer, who has skipped nothing
    assert not await is_enough(bench)
    await bench.answer(await bench.offers("ann"), "skip", "ann")
    assert await is_enough(bench)
    assert len(await bench.seal()) == 2


async def test_nothing_reaches_the_loop_before_the_seal(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"scorers": {}})
    await bench.submit(make_samples("round-00000", 2))
    await bench.answer(await bench.offers(), "desirable")
    collecting = asyncio.ensure_future(bench.labeler.collect())
    await asyncio.wait({collecting}, timeout=0.1)
    assert not collecting.done()
    collecting.cancel()


async def test_min_labels_seal_early_and_late_answers_join_the_next_round(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"scorers": {}, "human": {"min_labels": 2}}, lag=1)
    await bench.submit(make_samples("round-00000", 4))
    offered = await bench.offers()
    await bench.answer(offered[:2], "desirable")
    assert await is_enough(bench)
    assert len(await bench.seal()) == 2
    await bench.answer(offered[2:3], "undesirable")
    await bench.submit(make_samples("round-00001", 3, PolicyRef(1, "c" * 64)))
    await bench.answer((await bench.offers())[-1:], "desirable")
    second = await bench.seal("round-00001")
    late = await bench.sample_of(offered[2])
    assert second[late].label == "undesirable"
    assert len(second) == 2
    figures = bench.labeler.figures("round-00001")
    assert (figures["people/late"], figures["people/late_lag"], figures["people/policy_lag"]) == (1, 1, 0.5)


async def test_at_the_deadline_scorers_may_judge_what_people_did_not(tmp_path: Path) -> None:
    bench, samples = Bench(tmp_path, {"human": {"on_deadline": "scorer"}}), make_samples("round-00000", 4)
    await bench.submit(samples, [0.9, 0.1, None, 0.9])
    offered = await bench.offers()
    of_item = {await bench.sample_of(item): item for item in offered}
    await bench.answer([of_item[samples[0].id]], "undesirable")
    verdicts = await bench.seal()
    labels = [verdicts[sample.id].label for sample in samples]
    assert labels == ["undesirable", "undesirable", "failed", "desirable"]
    assert [verdicts[sample.id].labeler for sample in samples] == ["human", *["threshold"] * 3]
    assert await bench.offers() == []


async def test_at_the_deadline_the_other_images_stay_open(tmp_path: Path) -> None:
    bench, samples = Bench(tmp_path, {}, lag=1), make_samples("round-00000", 3)
    await bench.submit(samples, [0.9, 0.1, 0.9])
    offered = await bench.offers()
    await bench.answer(offered[:1], "desirable")
    assert (await bench.seal()).keys() == {await bench.sample_of(offered[0])}
    assert set(await bench.offers()) == set(offered[1:])


async def test_at_the_deadline_the_run_may_wait(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"scorers": {}, "human": {"on_deadline": "wait", "min_labels": 1}})
    await bench.submit(make_samples("round-00000", 2))
    sealing = asyncio.ensure_future(bench.labeler.seal("round-00000"))
    await asyncio.wait({sealing}, timeout=0.2)
    assert not sealing.done()
    await bench.answer((await bench.offers())[:1], "desirable")
    assert len(await asyncio.wait_for(sealing, 10)) == 1


async def test_the_rest_is_judged_by_scorers(tmp_path: Path) -> None:
    near = {"human": {"route": {"kind": "near_threshold", "share": 0.5}}}
    bench, samples = Bench(tmp_path, near), make_samples("round-00000", 4)
    scores = [Score(s.id, "shapes", "1", v) for s, v in zip(samples, (0.9, 0.52, 0.1, 0.48), strict=True)]
    await bench.labeler.submit(Samples.of(samples[:2]))
    await bench.labeler.scored("round-00000", scores[:2])
    assert await bench.offers() == []  # whether an image is near is known when all have scores
    await bench.labeler.submit(Samples.of(samples[2:]))
    await bench.labeler.scored("round-00000", scores[2:])
    await bench.labeler.finish("round-00000")
    offered = await bench.offers()
    assert {await bench.sample_of(item) for item in offered} == {samples[1].id, samples[3].id}
    await bench.answer(offered, "desirable")
    verdicts = await bench.seal()
    assert [verdicts[sample.id].label for sample in samples] == ["desirable", "desirable", "undesirable", "desirable"]
    assert [verdicts[s.id].labeler for s in samples] == ["threshold", "human", "threshold", "human"]
    assert {"people/judged", "people/asked", "threshold/sum"} <= bench.labeler.figures("round-00000").keys()
    assert bench.labeler.memory()["fit"]


@pytest.mark.parametrize("route", ["all", {"kind": "random", "share": 0.5}, {"kind": "near_threshold", "share": 0.5}])
@pytest.mark.parametrize("stored", [False, True])
async def test_people_see_the_image_that_they_are_asked_about(tmp_path: Path, route: Any, stored: bool) -> None:
    """Whether its pixels are at hand or in storage, and whether the scores had to be waited for."""
    bench, samples = Bench(tmp_path, {"human": {"route": route}}), make_samples("round-00000", 12)
    folder, stage = bench.storage / "rounds/00000", "round-00000"
    for start in (0, 4, 8):
        batch = samples[start : start + 4]
        await bench.labeler.submit(Samples(write_part(folder, batch), folder) if stored else Samples.of(batch))
    values = [0.9, 0.52, 0.1, 0.48] * 3
    await bench.labeler.scored(stage, [Score(s.id, "shapes", "1", v) for s, v in zip(samples, values, strict=True)])
    await bench.labeler.finish(stage)
    pixels = {sample.id: sample.pixels_HWC for sample in samples}
    with bench.labeler.desk.engine.begin() as connection:
        columns = select(items.c.sample_id, items.c.prompt, images.c.png).join(images)
        asked = connection.execute(columns).all()
    assert len(asked) == 12 if route == "all" else 0 < len(asked) < 12
    for row in asked:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row.png))), pixels[row.sample_id])
        assert row.prompt == next(sample.prompt.text for sample in samples if sample.id == row.sample_id)


async def test_a_round_of_which_nothing_goes_to_people_waits_for_nobody(tmp_path: Path) -> None:
    votes = {"shapes": {"threshold": 0.5}, "other": {"threshold": 0.5}}
    label = {"scorers": votes, "combine": "agreement", "human": {"route": "disagreement"}}
    bench, samples = Bench(tmp_path, label), make_samples("round-00000", 2)
    scores = [Score(s.id, name, "1", 1.0) for s in samples for name in votes]
    await bench.labeler.submit(Samples.of(samples))
    await bench.labeler.scored("round-00000", scores)
    await bench.labeler.finish("round-00000")
    assert await is_enough(bench)
    assert {verdict.labeler for verdict in (await bench.seal()).values()} == {"threshold"}


@pytest.mark.parametrize("sealed_before", [False, True])
async def test_a_crash_loses_no_answer_and_a_seal_is_repeated(tmp_path: Path, sealed_before: bool) -> None:
    label = {"human": {"route": {"kind": "random", "share": 0.5}, "overlap": {"labels": 2, "share": 0.5}}}
    bench, samples = Bench(tmp_path, label), make_samples("round-00000", 12)
    values = [place / 11 for place in range(12)]
    await bench.submit(samples, values)
    for name in ("ann", "bob"):
        offered = await bench.offers(name)
        await bench.answer(offered[::2], "desirable", name)
        await bench.answer(offered[1::2], "undesirable", name)
    before = await bench.seal() if sealed_before else None

    again = Bench(tmp_path, label)  # the driver died, before or after the answers were fixed
    await again.submit(samples, values)
    assert await is_enough(again)
    after = await again.seal()
    assert after.keys() == {sample.id for sample in samples}
    assert before is None or after == before
    assert {verdict.labeler for verdict in after.values()} == {"human", "threshold"}


async def test_an_excluded_labelers_answers_leave_the_open_round(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"scorers": {}})
    await bench.submit(make_samples("round-00000", 3))
    offered = await bench.offers("bob")
    await bench.answer(offered, "undesirable", "bob")
    operator = await bench.labeler.desk.badge_of("operator", "operator")
    await bench.labeler.desk.exclude(operator.id, "bob")
    assert not await is_enough(bench)
    await bench.answer(await bench.offers(), "desirable")
    assert [verdict.rule for verdict in (await bench.seal()).values()] == ["majority@1(of 1): me desirable"] * 3


async def test_it_says_what_it_waits_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"scorers": {}})
    assert bench.labeler.status("round-00000") == "people's verdicts"
    await bench.submit(make_samples("round-00000", 3))
    assert not await is_enough(bench)
    assert "nobody can give any" in bench.labeler.status("round-00000")
    assert f"kto-ray labelers add NAME --run {bench.storage}" in bench.labeler.status("round-00000")
    await bench.answer((await bench.offers())[:1], "desirable")
    assert not await is_enough(bench)
    assert bench.labeler.status("round-00000") == "people's verdicts: 1 of 3 images judged"


def test_figures_of_a_round_that_nobody_answered(tmp_path: Path) -> None:
    desk = Desk(f"sqlite:///{tmp_path}/people.sqlite", "run", Labeling().human, 0)
    table = asyncio.run(desk.answers("round-00000"))
    assert people_figures(3, [], table) == {
        "people/judged": 0,
        "people/answers": 0,
        "people/labelers": 0,
        "people/late": 0,
    }


def test_lags_are_those_of_the_policy_that_drew(tmp_path: Path) -> None:
    desk = Desk(f"sqlite:///{tmp_path}/people.sqlite", "run", Labeling().human, 0)
    table = asyncio.run(desk.answers("round-00003"))
    judged = [Judged("round-00003-a", "desirable", "", 2), Judged("round-00001-b", "desirable", "", 1)]
    figures = people_figures(round_number("round-00003"), judged, table)
    assert (figures["people/policy_lag"], figures["people/late"], figures["people/late_lag"]) == (1.5, 1, 2)


@pytest.mark.parametrize("name", ["plain", "a folder", "what? 100% #1", "ümläut"])
def test_the_database_lies_in_the_runs_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    run = Storage(str(tmp_path / name))
    human = Labeling().human
    open_database(database_url(human, run), database_owner(human, run)).dispose()
    assert [file.name for file in (tmp_path / name).iterdir()] == ["people.sqlite"]
    moved = (tmp_path / name).rename(tmp_path / "moved")
    run = Storage(str(moved))
    open_database(database_url(human, run), database_owner(human, run)).dispose()


def test_answers_to_a_run_in_an_object_store_need_a_database_of_their_own() -> None:
    with pytest.raises(UserError, match=r"label\.human\.database: memory://runs/x is not a local folder"):
        database_url(Labeling().human, Storage("memory://runs/x"))
