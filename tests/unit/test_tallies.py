"""The tallies behind the operator's page: whatever happens, whoever does it, they are what a recount gives."""

import itertools
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from kto_ray.config.people import Human
from kto_ray.people import clock, tallies
from kto_ray.people.overview import Overview, catch_up
from kto_ray.people.people import Refused
from kto_ray.people.rewinding import take_back
from kto_ray.people.tables import voids
from kto_ray.people.terms import ANSWERS
from tests.office import LEASE_S, Caller, Machine, Office, gold, new_item, stage
from tests.recount import recount

NAMES = ("ann", "bob", "cai", "dee")


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], str]:
    """URLs of empty databases."""
    numbers = itertools.count()
    return lambda: f"sqlite:///{tmp_path}/{next(numbers)}.sqlite"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clock, "time", machine)
    return machine


class Life:
    """What may happen to a run's people, in an order that the seed gives.

    Two offices are at work on one database: what the one does, the other's tallies learn from there.
    """

    def __init__(self, url: str, machine: Machine, seed: int) -> None:
        self.rng, self.machine = random.Random(seed), machine
        known = {"file": "gold.jsonl", "share": 0.2, "least": 2, "action": self.rng.choice(["show", "exclude"])}
        human = Human(overlap={"labels": 3}, gold=known, lease_s=LEASE_S)  # type: ignore[arg-type]
        lag = self.rng.randrange(3)
        self.offices = [Office(url, machine, human, max_policy_lag=lag) for _ in range(2)]
        self.badges = {name: self.office.people.admit(name).id for name in NAMES}
        self.office.intake.add_gold(gold(4) + gold(4, "undesirable"))
        self.round, self.drawn = 0, 0
        self.seen: Counter[str] = Counter()

    @property
    def office(self) -> Office:
        return self.rng.choice(self.offices)

    def close(self) -> None:
        for office in self.offices:
            office.engine.dispose()

    def step(self) -> None:
        happenings = {
            self.answer: 20,
            self.undo: 6,
            self.draw: 3,
            self.end_round: 1,
            self.exclude: 1,
            self.include: 1,
            self.wait: 2,
            self.revoke: 1,
            self.crash: 1,
            self.rewind: 0.3,
        }
        (what,) = self.rng.choices([*happenings], [*happenings.values()])
        with suppress(Refused):
            what()
            self.seen[what.__name__] += 1

    def caller(self) -> Caller:
        return Caller(self.office, self.badges[self.rng.choice(NAMES)])

    def answer(self) -> None:
        caller = self.caller()
        for item in caller.take(self.rng.randint(1, 4)):
            if self.rng.random() < 0.8:
                verdict = self.rng.choices(ANSWERS, [6, 6, 2, 2])[0]
                caller.answer(item, verdict, self.rng.choice([None, self.rng.uniform(0, 9)]))
            self.machine.wait(self.rng.choice([0, 0.5, LEASE_S / 3]))

    def undo(self) -> None:
        caller = self.caller()
        if items := caller.progress().undoable:
            caller.undo(self.rng.choice(items))

    def draw(self) -> None:
        new = [
            new_item(self.round, self.drawn + i, needed=self.rng.randint(1, 3), policy_version=self.round)
            for i in range(self.rng.randint(1, 6))
        ]
        self.office.intake.add(stage(self.round), self.round, new)
        self.drawn += len(new)

    def end_round(self) -> None:
        office = self.office
        office.intake.finish(stage(self.round), self.round)
        office.intake.seal(stage(self.round), withdraw=self.rng.random() < 0.3)
        if self.rng.random() < 0.7:  # else there was a crash in between
            office.drop_images()
        self.round, self.drawn = self.round + 1, 0

    def exclude(self) -> None:
        self.office.people.exclude(self.rng.choice(NAMES), "by the operator")

    def include(self) -> None:
        for name in NAMES:
            self.office.people.include(name)

    def wait(self) -> None:
        self.machine.wait(self.rng.choice([1, LEASE_S, 700]))

    def revoke(self) -> None:
        name = self.rng.choice(NAMES)
        self.office.people.revoke(name)
        self.badges[name] = self.office.people.admit(name).id

    def crash(self) -> None:
        self.office.crash()

    def rewind(self) -> None:
        to = max(0, self.round - self.rng.randint(0, 2))
        take_back(self.office.engine, [stage(number) for number in range(to, self.round + 1)])
        self.round, self.drawn = to, 0


def comparable(seen: Overview) -> Overview:
    """Krippendorff's alpha is rounded in many ways."""
    alpha = seen.agreement.alpha
    return replace(seen, agreement=replace(seen.agreement, alpha=None if alpha is None else round(alpha, 9)))


@pytest.fixture(params=range(6))
def seed(request: pytest.FixtureRequest) -> int:
    """Of a life."""
    number: int = request.param
    return number


def test_the_page_shows_what_a_recount_of_all_rows_gives(
    fresh: Callable[[], str], machine: Machine, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tallies, "STEP", 7)  # the loop of steps, too
    monkeypatch.setattr(tallies, "RECENT", 24 if seed % 2 else 3)
    life = Life(fresh(), machine, seed)
    for _ in range(150):
        for _ in range(life.rng.randint(1, 5)):
            life.step()
        office = life.office
        if life.rng.random() < 0.3:
            catch_up(office.engine, office.tallies)  # one step, and no look
            continue
        expected = recount(office)
        shown = {label: known[: tallies.RECENT] for label, known in expected.recent.items()}
        assert comparable(office.view()) == comparable(replace(expected, recent=shown))
    assert min(life.seen.values()) > 0
    assert len(life.seen) == 10
    life.close()


def test_many_answers_that_are_taken_out_bring_older_images_back(
    fresh: Callable[[], str], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tallies, "RECENT", 3)
    office = Office(fresh(), machine, Human(lease_s=LEASE_S))
    ann, bob = office.admit("ann", "bob")
    office.draw(0, 60)
    first = ann.label("desirable", 30)
    assert office.view().recent["desirable"] == first[:-4:-1]
    second = bob.label("desirable", 30)
    assert office.view().recent["desirable"] == second[:-4:-1]
    office.people.exclude("bob", "by the operator")
    assert office.view().recent["desirable"] == first[:-4:-1]
    office.engine.dispose()


def test_answers_of_a_database_from_before_tallies_were_kept(fresh: Callable[[], str], machine: Machine) -> None:
    office = Office(fresh(), machine, Human(lease_s=LEASE_S))
    (ann,) = office.admit("ann")
    office.draw(0, 3)
    items = ann.label("desirable", 3)
    ann.undo(items[0])
    with office.engine.begin() as connection:
        voids.drop(connection)
    office.crash()
    assert office.view() == recount(office)
    ann.undo(items[1])
    assert office.view() == recount(office)
    office.engine.dispose()


def test_a_look_reads_no_answers_that_were_counted_before(fresh: Callable[[], str], machine: Machine) -> None:
    office = Office(fresh(), machine, Human(lease_s=LEASE_S))
    (ann,) = office.admit("ann")
    office.view()
    work = Counter[str]()  # in instructions of SQLite's, by the hundred

    def tell(database: sqlite3.Connection, _: object) -> None:
        database.set_progress_handler(lambda: work.update(["instructions"]), 100)

    office.engine.dispose()
    sa.event.listen(office.engine, "connect", tell)
    looks = []
    for number in range(40):
        office.draw(number, 20)
        ann.label("desirable", 20)
        office.end_round(number)
        work.clear()
        office.view()
        looks.append(work.total())
    assert office.view().labelers[0].answers == 800
    assert looks[-1] < 2 * looks[2]
    office.engine.dispose()
