"""Images leave people's database once nobody will be shown them; whoever may be shown one is."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from kto_ray.config.people import Human
from kto_ray.people import tallies
from kto_ray.people.desk import Desk
from kto_ray.people.keeping import lacking, put_back
from kto_ray.people.people import Refused
from kto_ray.people.rewinding import take_back
from kto_ray.people.terms import NewItem
from tests.office import LEASE_S, Machine, Office, gold, refused, stage
from tests.unit.test_tallies import NAMES, Life, fresh, machine  # noqa: F401  fixtures


@pytest.fixture
def office(tmp_path: Path, machine: Machine) -> Iterator[Office]:  # noqa: F811
    office = Office(f"sqlite:///{tmp_path}/people.sqlite", machine, Human(lease_s=LEASE_S), max_policy_lag=1)
    yield office
    office.engine.dispose()


def kept(office: Office) -> set[str]:
    """Samples whose images the database has."""
    return {*office.facts().images}


def samples(office: Office, items: list[str]) -> set[str]:
    return {sample for sample, row in office.facts().items.items() if row["id"] in items}


@pytest.mark.parametrize("seed", range(4))
def test_whoever_may_be_shown_an_image_is(
    fresh: Callable[[], str],  # noqa: F811
    machine: Machine,  # noqa: F811
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tallies, "RECENT", 3)
    life = Life(fresh(), machine, seed)
    for _ in range(150):
        life.step()
        office, facts = life.office, life.office.facts()
        latest = {row["sample"]: row["id"] for row in facts.answers}
        for label, recent in office.view().recent.items():
            labelled = [sample for sample, row in facts.items.items() if row["label"] == label]
            wanted = sorted(labelled, key=latest.__getitem__, reverse=True)[:3]
            if not life.seen["rewind"]:
                assert recent == [facts.items[sample]["id"] for sample in wanted]
            operator = office.people.badges_of("operator")[0].id
            assert all(office.queue.image(operator, item) for item in recent)
        for name in NAMES:
            with suppress(Refused):
                offered = [offer.item for offer in office.queue.lease(life.badges[name], 3)]
                for item in (*offered, *office.queue.progress(life.badges[name]).undoable):
                    assert office.queue.image(life.badges[name], item)
    assert life.seen["end_round"] > 2
    life.close()


def test_the_latest_of_each_label_and_gold_stay(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "RECENT", 2)
    (ann,) = office.admit("ann")
    office.intake.add_gold(known := gold(2))
    stay = {piece.sample_id for piece in known}
    office.draw(0, 8)
    said = {verdict: ann.label(verdict, 4) for verdict in ("desirable", "undesirable")}
    office.end_round(0)
    assert len(kept(office)) == 10  # also where a crash came before they were dropped
    office.drop_images()
    assert kept(office) == stay | samples(office, [*said["desirable"][2:], *said["undesirable"][2:]])
    office.draw(1, 3)
    last = ann.label("desirable", 3)
    office.end_round(1)
    for _ in range(2):
        office.drop_images()
        assert kept(office) == stay | samples(office, [*last[1:], *said["undesirable"][2:]])
    assert office.view().recent["desirable"] == last[:0:-1]


def test_images_that_may_still_be_judged_or_taken_back_stay(office: Office, machine: Machine) -> None:  # noqa: F811
    ann, bob = office.admit("ann", "bob")
    office.draw(0, 4, needed=2)
    skipped, started, looked_at, fresh = ann.take(4)  # noqa: F811
    ann.answer(skipped, "skip")
    ann.answer(started, "desirable")
    ann.release([fresh])
    office.end_round(0)
    office.drop_images()
    assert len(kept(office)) == 4  # a policy lag of one is allowed
    office.end_round(1)
    machine.wait(LEASE_S - 1)
    office.drop_images()
    assert kept(office) == samples(office, [looked_at])
    assert bob.take(4) == []
    assert ann.progress().undoable == ()
    with refused("undo", "this image is too old to be judged again"):
        ann.undo(started)
    ann.answer(looked_at, "desirable")  # late, and kept


def test_after_a_rewinding_images_are_lacking_until_they_are_put_back(office: Office) -> None:
    ann, bob = office.admit("ann", "bob")
    office.draw(0, 3)
    office.end_round(0)
    judged = ann.label("desirable", 2)
    before = office.facts().images
    office.end_round(1)  # with answers that came late
    office.draw(2, 1)
    office.end_round(2)
    with office.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM images"))  # by the seals of many more rounds
    assert lacking(office.engine, 1) == {stage(2): {f"{stage(2)}-000"}}
    take_back(office.engine, [stage(1), stage(2)])
    assert lacking(office.engine, 1) == {stage(0): {*before}}
    with refused("undo"):
        ann.undo(judged[0])
    assert bob.take(9) == []
    for _ in range(2):
        put_back(office.engine, before)
        assert office.facts().images == before
    assert lacking(office.engine, 1) == {}
    ann.undo(judged[0])
    ann.release([judged[0]])
    assert samples(office, bob.take(9)) == {*before} - samples(office, judged[1:])


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr(tallies, "RECENT", 2)
    desk = Desk(f"sqlite:///{tmp_path}/people.sqlite", "run", Human(), max_policy_lag=0)
    yield desk
    desk.engine.dispose()


async def test_the_database_does_not_grow_by_the_images_of_sealed_rounds(desk: Desk) -> None:
    ann, sizes = (await desk.badge_of("ann")).id, []
    rng = random.Random(0)
    for number in range(8):
        new = [NewItem(f"{stage(number)}-{i}", f"p{i}", "", rng.randbytes(30_000), number) for i in range(20)]
        await desk.add(stage(number), number, new)
        for offer in desk.queue.lease(ann, 20):
            desk.queue.answer(ann, offer.item, "desirable")
        await desk.finish(stage(number), number)
        await desk.seal(stage(number))
        with desk.engine.begin() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM images")) == 2
            sizes.append(connection.scalar(sa.text("PRAGMA page_count")))
    assert sizes[-1] < sizes[0] * 1.2  # what was freed is used again


async def test_what_older_versions_left_goes_with_the_next_seal(desk: Desk) -> None:
    ann = (await desk.badge_of("ann")).id
    for number in range(6):
        new = [NewItem(f"{stage(number)}-{i:03}", f"p{i}", "", b"PNG", number) for i in range(30)]
        await desk.add(stage(number), number, new)
        for offer in desk.queue.lease(ann, 30):
            desk.queue.answer(ann, offer.item, "undesirable")
        await desk.finish(stage(number), number)
        judged = desk.intake.seal(stage(number))  # and nothing else
    for _ in range(2):  # a seal that is repeated after a crash
        assert await desk.seal(stage(5)) == judged
        with desk.engine.begin() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM images")) == 2
