"""The queue of people: whatever happens in whatever order, nothing is lost, counted twice or changed after its seal."""

import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from kto_ray.config.people import Human
from kto_ray.people import clock
from kto_ray.people.access import secret_of
from kto_ray.people.clock import Clock
from kto_ray.people.tables import open_database
from tests.office import LEASE_S, Caller, Machine, Office, at_once, gold, new_item, refused, stage
from tests.queue_machine import QueueMachine, check_promises

pytestmark = pytest.mark.timeout(300)  # a queue that gives the same images for ever
EFFORT = settings(max_examples=30, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], str]:
    """URLs of empty databases."""
    numbers = itertools.count()
    return lambda: f"sqlite:///{tmp_path}/{next(numbers)}.sqlite"


@pytest.fixture
def effort() -> settings:
    """How hard the state machine is tried."""
    return EFFORT


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clock, "time", machine)
    return machine


@pytest.fixture
def make(fresh: Callable[[], str], machine: Machine) -> Iterator[Callable[..., Office]]:
    """Offices by what differs from the defaults of `label.human`."""
    made: list[Office] = []

    def make(max_policy_lag: int = 0, url: str | None = None, **human: Any) -> Office:
        made.append(Office(url or fresh(), machine, Human(**{"lease_s": LEASE_S, **human}), max_policy_lag))
        return made[-1]

    yield make
    for office in made:
        office.engine.dispose()


@pytest.fixture
def office(make: Callable[..., Office]) -> Office:
    return make()


def test_nothing_is_lost_or_counted_twice_whatever_happens(fresh: Callable[[], str], effort: settings) -> None:
    run_state_machine_as_test(lambda: QueueMachine(fresh), settings=effort)


# -- giving images out ------------------------------------------------------------------------------------------------


def test_what_is_shown_is_blind_and_in_an_order_that_says_nothing(make: Callable[..., Office]) -> None:
    orders = []
    for _ in range(2):
        office = make()
        office.draw(0, 20)
        (ann,) = office.admit("ann")
        offers, rows = ann.lease(20), office.facts().items
        samples = {row["id"]: sample for sample, row in rows.items()}
        assert set(vars(offers[0])) == {"item", "prompt", "expires_at"}
        assert not any(sample in offer.item or offer.item in sample for offer in offers for sample in rows)
        orders.append([samples[offer.item] for offer in offers])
    assert orders[0] == orders[1] != sorted(orders[0])
    assert sorted(orders[0]) == [new_item(0, i).sample_id for i in range(20)]


def test_an_image_is_one_persons_until_the_lease_ends_to_the_second(office: Office, machine: Machine) -> None:
    office.draw(0, 3)
    ann, bob = office.admit("ann", "bob")
    offers = ann.lease(2)
    assert ann.lease(2) == offers  # asked again: the same ones, for no longer
    assert [offer.expires_at for offer in offers] == [office.clock() + LEASE_S] * 2
    (other,) = bob.take(3)
    machine.wait(LEASE_S - 1)
    assert other not in ann.take(1)
    assert bob.take(3) == [other]
    machine.wait(1)
    assert set(bob.take(3)) == {other, *(offer.item for offer in offers)}
    assert ann.take(3) == []


def test_who_holds_images_is_given_those_first_in_the_order_in_which_they_came(office: Office) -> None:
    office.draw(0, 4)
    (ann,) = office.admit("ann")
    first = ann.take(1)
    assert ann.take(3)[:1] == first
    assert ann.take(1) == first
    assert len(ann.take(9)) == 4


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_an_image_is_with_as_many_people_as_it_needs(office: Office, needed: int) -> None:
    office.draw(0, 5, needed=needed)
    people = office.admit("ann", "bob", "cai", "dee")
    assert [len(person.take(5)) for person in people] == [5] * needed + [0] * (4 - needed)


def test_newer_rounds_and_images_that_others_have_judged_come_first(office: Office) -> None:
    ann, bob = office.admit("ann", "bob")
    office.draw(0, 4, needed=2)
    office.end_round(0)
    office.draw(1, 4, needed=2)
    office.max_policy_lag = 1
    office.crash()
    answered = ann.label(count=2)
    order = bob.take(8)
    assert set(order[:2]) == set(answered)
    rows = {row["id"]: row["number"] for row in office.facts().items.values()}
    assert [rows[item] for item in order] == [1] * 4 + [0] * 4


def test_released_images_go_to_somebody_else(office: Office) -> None:
    office.draw(0, 2)
    ann, bob = office.admit("ann", "bob")
    one, two = ann.take(2)
    bob.release([one])  # not bob's to give back
    assert bob.take() == []
    ann.release([one, "no such item"])
    ann.release([one])
    assert bob.take(2) == [one]
    with refused("lease"):
        ann.answer(one, "desirable")
    assert ann.take(2) == [two]


def test_who_looks_for_longer_keeps_an_image_unless_somebody_else_has_it(office: Office, machine: Machine) -> None:
    office.draw(0, 3)
    ann, bob = office.admit("ann", "bob")
    one, two, three = ann.take(3)
    machine.wait(LEASE_S - 1)
    assert ann.extend([one, "no such item"]) == [one]
    machine.wait(1)
    assert set(bob.take(3)) == {two, three}
    bob.release([three])
    assert set(ann.extend([one, two, three])) == {one, three}  # three is ann's again
    assert bob.extend([one, three]) == []
    bob.answer(two, "desirable")
    assert ann.extend([two]) == ann.extend([]) == []
    assert {offer.expires_at for offer in ann.lease(3)} == {office.clock() + LEASE_S}


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["desirable", "undesirable", "unsure"])
def test_an_answer_judges_an_image_and_keeps_the_time_taken(office: Office, machine: Machine, verdict: str) -> None:
    office.draw(0, 1)
    (ann,) = office.admit("ann")
    (item,) = ann.take()
    machine.wait(9)
    ann.answer(item, verdict, 2.5)
    (row,) = office.facts().answers
    expected = ("ann", verdict, 2.5, office.clock(), False, None)
    assert tuple(row[name] for name in ("who", "verdict", "seconds", "at", "late", "void")) == expected
    assert list(office.labels().values()) == ["abstain" if verdict == "unsure" else verdict]
    assert (ann.take(), office.facts().leases) == ([], {})


def test_the_same_answer_again_changes_nothing_and_another_one_is_refused(office: Office, machine: Machine) -> None:
    office.draw(0, 1, needed=2)
    ann, bob = office.admit("ann", "bob")
    (item,) = ann.label("undesirable")
    before = office.facts()
    machine.wait(2 * LEASE_S)
    ann.answer(item, "undesirable", 77.0)
    with refused("answered", "you said undesirable before; take that back first"):
        ann.answer(item, "desirable")
    assert office.facts() == before
    bob.label("undesirable")
    office.end_round(0)
    sealed = office.facts()
    ann.answer(item, "undesirable")  # still no fault: the reply to the first was lost
    assert office.facts() == sealed


def test_a_late_answer_counts_if_nobody_else_has_the_image(office: Office, machine: Machine) -> None:
    office.draw(0, 2)
    ann, bob = office.admit("ann", "bob")
    one, two = ann.take(2)
    machine.wait(LEASE_S)
    ann.answer(one, "desirable")
    assert [row["late"] for row in office.facts().answers] == [True]
    assert bob.take(2) == [two]
    before = office.facts()
    with refused("taken", "you had this image for too long; somebody else has it now"):
        ann.answer(two, "desirable")
    assert office.facts() == before
    bob.answer(two, "undesirable")
    with refused("taken"):
        ann.answer(two, "desirable")
    assert sorted(filter(None, office.labels().values())) == ["desirable", "undesirable"]


def test_a_late_answer_comes_before_that_of_the_next_person_whose_lease_ended_too(
    office: Office, machine: Machine
) -> None:
    office.draw(0, 1)
    ann, bob = office.admit("ann", "bob")
    (item,) = ann.take()
    machine.wait(LEASE_S)
    bob.take()
    machine.wait(LEASE_S)
    ann.answer(item, "desirable")
    with refused("taken"):
        bob.answer(item, "undesirable")
    assert [row["who"] for row in office.facts().answers] == ["ann"]


def test_a_skipped_image_goes_to_everybody_else_once(office: Office) -> None:
    office.draw(0, 1)
    ann, bob, cai = office.admit("ann", "bob", "cai")
    (item,) = ann.label("skip")
    assert ann.take() == []
    assert bob.label("skip") == [item]
    assert cai.take() == [item]
    assert office.intake.standing(stage(0)).answers == 0
    assert list(office.labels().values()) == [None]
    with refused("taken", "somebody else has this image now"):
        ann.undo(item)
    cai.release([item])
    assert ann.undo(item).item == item
    assert cai.take() == []


def test_nobody_waits_for_an_image_that_everybody_skips_and_it_stays_open(office: Office) -> None:
    office.draw(0, 1)
    ann, bob = office.admit("ann", "bob")
    office.intake.finish(stage(0), 0)
    for caller, passed in ((ann, 0), (bob, 1)):
        caller.label("skip")
        standing = office.intake.standing(stage(0))
        assert (standing.judged, standing.passed, standing.enough) == (0, passed, bool(passed))
    office.admit("cai")  # who might judge it
    assert not office.intake.standing(stage(0)).enough
    office.people.exclude("cai", "by the operator")
    assert office.intake.standing(stage(0)).enough
    assert office.end_round(0) == []
    assert (ann.take(), bob.take()) == ([], [])
    assert ann.progress().answers == 1


UNKNOWN = "0000000000000000"
REFUSALS: list[tuple[str, str, Callable[[Caller, str, str], Any]]] = [
    (
        "verdict",
        "'good' is no answer; say one of desirable, undesirable, unsure, skip",
        lambda a, m, _: a.answer(m, "good"),
    ),
    ("item", "there is no such image", lambda a, _, __: a.answer(UNKNOWN, "desirable")),
    ("item", "there is no such image", lambda a, _, __: a.undo(UNKNOWN)),
    ("item", "there is no such image, or it was not given to you", lambda a, _, other: a.image(other)),
    ("lease", "this image was not given to you; ask for one first", lambda a, _, other: a.answer(other, "desirable")),
    ("undo", "only your latest 10 answers can be taken back", lambda a, mine, _: a.undo(mine)),
]


@pytest.mark.parametrize(("why", "message", "call"), REFUSALS)
def test_what_cannot_be_done_is_refused_in_words_and_changes_nothing(
    office: Office, why: str, message: str, call: Callable[[Caller, str, str], Any]
) -> None:
    office.draw(0, 2)
    ann, bob = office.admit("ann", "bob")
    (mine,), (other,) = ann.take(), bob.take()
    before = office.facts()
    with refused(why, message):
        call(ann, mine, other)
    assert office.facts() == before


CALLS: list[Callable[[Caller, str], Any]] = [
    lambda who, _: who.lease(),
    lambda who, item: who.answer(item, "desirable"),
    lambda who, item: who.extend([item]),
    lambda who, item: who.release([item]),
    lambda who, item: who.undo(item),
    lambda who, _: who.progress(),
]


@pytest.mark.parametrize("call", [*CALLS, lambda who, item: who.image(item)])
def test_links_that_do_not_work_are_refused_everywhere(
    office: Office, machine: Machine, call: Callable[..., Any]
) -> None:
    office.draw(0, 1)
    ann, bob = office.admit("ann", "bob")
    (item,) = ann.take()
    assert office.people.revoke("ann") == 1
    machine.wait(30 * 24 * 3600)
    before = office.facts()
    with refused("revoked", "this link was revoked; ask the operator for a new one"):
        call(ann, item)
    with refused("expired", "this link has expired; ask the operator for a new one"):
        call(bob, item)
    with refused("badge", "this link is not known here"):
        call(Caller(office, "made up"), item)
    assert office.facts() == before


@pytest.mark.parametrize("call", CALLS)
def test_the_operator_and_who_is_excluded_do_not_label(office: Office, call: Callable[..., Any]) -> None:
    office.draw(0, 1)
    (ann,) = office.admit("ann")
    (item,) = ann.take()
    office.people.exclude("ann", "by the operator")
    before = office.facts()
    with refused("excluded", "your answers are no longer asked for; thank you"):
        call(ann, item)
    with refused("operator", "this is the operator's link; answers are given with a labeler's"):
        call(Caller(office, office.people.admit("operator", "operator").id), item)
    assert (office.facts().answers, office.facts().leases) == (before.answers, before.leases)


def test_an_image_is_shown_to_those_who_were_given_it_and_to_the_operator(office: Office, machine: Machine) -> None:
    office.draw(0, 2)
    ann, bob = office.admit("ann", "bob")
    one, two = ann.take(2)
    operator = Caller(office, office.people.admit("operator", "operator").id)
    samples = {row["id"]: sample for sample, row in office.facts().items.items()}
    ann.answer(one, "desirable")
    machine.wait(LEASE_S)  # what was given stays visible
    for item in (one, two):
        assert ann.image(item) == operator.image(item) == f"PNG of {samples[item]}".encode()
        with refused("item"):
            bob.image(item)
    with refused("item"):
        operator.image(UNKNOWN)


# -- taking back ------------------------------------------------------------------------------------------------------


def test_an_answer_taken_back_is_void_and_the_image_is_ones_own_again(office: Office, machine: Machine) -> None:
    office.draw(0, 1)
    ann, bob = office.admit("ann", "bob")
    (item,) = ann.label("desirable")
    machine.wait(2 * LEASE_S)
    for _ in range(2):  # asked for again, as when the reply is lost
        offer = ann.undo(item)
        assert (offer.item, offer.expires_at) == (item, office.clock() + LEASE_S)
    assert list(office.labels().values()) == [None]
    assert bob.take() == []
    ann.answer(item, "undesirable")
    assert list(office.labels().values()) == ["undesirable"]
    rows = office.facts().answers
    assert [(row["verdict"], row["void"]) for row in rows] == [("desirable", "undone"), ("undesirable", None)]


def test_the_latest_ten_answers_can_be_taken_back(office: Office) -> None:
    office.draw(0, 11)
    (ann,) = office.admit("ann")
    done = [ann.label()[0] for _ in range(11)]
    assert ann.progress().undoable == tuple(done[:0:-1])
    with refused("undo"):
        ann.undo(done[0])
    for item in done[:0:-1]:
        ann.undo(item)
    with refused("undo"):
        ann.undo(done[0])
    assert ann.progress().undoable == ()
    assert Counter(office.labels().values()) == {"desirable": 1, None: 10}


def test_what_was_taken_back_and_went_to_somebody_else_is_theirs(office: Office, machine: Machine) -> None:
    office.draw(0, 1)
    ann, bob = office.admit("ann", "bob")
    (item,) = ann.label()
    ann.undo(item)
    machine.wait(LEASE_S)
    assert bob.take() == [item]
    before = office.facts()
    for _ in range(2):
        with refused("taken", "somebody else has this image now"):
            ann.undo(item)
        assert office.facts() == before
        if not before.answers[1:]:
            bob.answer(item, "undesirable")
            before = office.facts()


# -- several people on one image, known answers, exclusion ------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "majority", "unanimous"),
    [
        ("y", "desirable", "desirable"),
        ("n", "undesirable", "undesirable"),
        ("?", "abstain", "abstain"),
        ("yy", "desirable", "desirable"),
        ("yn", "abstain", "abstain"),
        ("y?", "desirable", "abstain"),
        ("??", "abstain", "abstain"),
        ("yyn", "desirable", "abstain"),
        ("nny", "undesirable", "abstain"),
        ("nnn", "undesirable", "undesirable"),
        ("yn?", "abstain", "abstain"),
        ("n??", "undesirable", "abstain"),
    ],
)
def test_several_answers_become_one_label(
    make: Callable[..., Office], said: str, majority: str, unanimous: str
) -> None:
    words = [{"y": "desirable", "n": "undesirable", "?": "unsure"}[letter] for letter in said]
    for name, label in (("majority", majority), ("unanimous", unanimous)):
        office = make(overlap={"rule": name})
        office.draw(0, 1, needed=len(said))
        for number, verdict in enumerate(words):
            assert list(office.labels().values()) == [None]
            office.admit(f"person {number}")[0].label(verdict)
        office.intake.finish(stage(0), 0)
        (judged,) = office.intake.seal(stage(0))
        assert judged.label == label
        who_said = ", ".join(f"person {number} {verdict}" for number, verdict in enumerate(words))
        assert judged.rule == f"{name}@1(of {len(said)}): {who_said}"


GOLD_FILE = {"file": "gold.jsonl", "share": 0.3}


def test_gold_is_mixed_in_unseen_as_often_as_asked_for_and_never_twice(make: Callable[..., Office]) -> None:
    office = make(gold=GOLD_FILE)
    office.intake.add_gold(gold(200))
    office.intake.add_gold(gold(200))  # again is once
    office.draw(0, 300)
    (ann,) = office.admit("ann")
    known = {row["id"] for row in office.facts().items.values() if row["expected"]}
    shown: list[str] = []
    while taken := ann.label(count=7):
        shown += taken
    assert len(known) == 200
    assert len(shown) == len(set(shown))
    places = [place for place, item in enumerate(shown) if item in known]
    assert 0.2 < len(places) / len(shown) < 0.4
    assert len({later - earlier for earlier, later in itertools.pairwise(places)}) > 2  # not every third
    assert len(set(shown) - known) == 300


def test_gold_is_not_shown_alone_and_is_part_of_no_round(make: Callable[..., Office]) -> None:
    office = make(gold={**GOLD_FILE, "share": 0.9})
    office.intake.add_gold(gold(30))
    ann, bob = office.admit("ann", "bob")
    assert ann.take(5) == []
    office.draw(0, 3)
    known = {row["id"]: sample for sample, row in office.facts().items.items() if row["expected"]}
    first, second = ann.take(3), bob.take(3)
    assert set(first) & set(second) & known.keys()  # it is for everybody
    for item in first:
        ann.answer(item, "desirable")
    assert len(ann.undo(first[0]).item) == len(second[0])
    standing = office.intake.standing(stage(0))
    assert (standing.asked, standing.judged + (first[0] not in known)) == (3, sum(item not in known for item in first))
    assert not set(office.end_round(0)) & set(known.values())


def test_without_a_file_earlier_gold_is_not_shown(office: Office) -> None:
    office.intake.add_gold(gold(30))
    office.draw(0, 30)
    (ann,) = office.admit("ann")
    known = {row["id"] for row in office.facts().items.values() if row["expected"]}
    assert not set(ann.take(60)) & known


def careless(make: Callable[..., Office], action: str) -> tuple[Office, Caller]:
    """Somebody who says yes to everything; known answers are no."""
    office = make(gold={**GOLD_FILE, "share": 0.5, "least": 3, "limit": 0.7, "action": action})
    office.intake.add_gold(gold(20, "undesirable"))
    office.draw(0, 40)
    return office, office.admit("ann")[0]


def known_so_far(office: Office) -> int:
    return sum(office.facts().items[row["sample"]]["expected"] is not None for row in office.facts().answers)


def test_who_fails_on_gold_is_excluded_with_the_answer_that_shows_it(make: Callable[..., Office]) -> None:
    office, ann = careless(make, "exclude")
    while known_so_far(office) < 3:
        assert office.facts().labelers["ann"]["excluded_at"] is None
        assert ann.label()
    assert office.facts().labelers["ann"]["excluded_why"] == "0 of 3 known answers right"
    assert set(office.labels().values()) == {None}
    voids = {row["void"] for row in office.facts().answers if not row["sample"].startswith("gold")}
    assert voids == {"excluded"}
    with refused("excluded"):
        ann.take()


def test_who_fails_on_gold_may_also_only_be_shown(make: Callable[..., Office]) -> None:
    office, ann = careless(make, "show")
    while ann.label():
        pass
    assert known_so_far(office) >= 3
    assert office.facts().labelers["ann"]["excluded_at"] is None
    assert Counter(filter(None, office.labels().values())) == {"desirable": 40}


def test_unsure_and_skipped_gold(make: Callable[..., Office]) -> None:
    """To be unsure of what is known is not right; a skip says nothing."""
    for verdict, excluded in (("unsure", True), ("skip", False)):
        office, ann = careless(make, "exclude")
        while known_so_far(office) < 3:
            assert ann.label(verdict)
        assert (office.facts().labelers["ann"]["excluded_at"] is not None) == excluded


def test_the_answers_of_who_is_excluded_leave_open_rounds_only(office: Office) -> None:
    ann, bob, cai = office.admit("ann", "bob", "cai")
    office.draw(0, 1)
    ann.label("desirable")
    sealed = office.end_round(0)
    office.draw(1, 3, needed=2)
    (one, two), three = ann.label("desirable", 2), ann.take()
    bob.label("undesirable", 1)
    assert Counter(row["void"] for row in office.facts().answers) == {None: 4}
    office.people.exclude("ann", "by the operator")
    rows = office.facts()
    assert [row["void"] for row in rows.answers] == [None, "excluded", "excluded", None]
    assert rows.leases == {}
    assert rows.items[sealed[0]]["label"] == "desirable"
    assert set(office.labels()) - set(sealed) == {s for s, label in office.labels().items() if label is None}
    assert {*bob.take(9), *cai.take(9)} == {one, two, *three}
    office.people.include("ann")
    assert [row["void"] for row in office.facts().answers] == [None, "excluded", "excluded", None]
    with refused("undo"):
        ann.undo(one)  # it is out for good ...
    cai.release([one])
    bob.release([one])
    assert one in ann.take(9)  # ... but may be answered anew


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_images_are_added_once_however_often_they_come(office: Office) -> None:
    office.draw(0, 2)
    before = office.facts()
    office.draw(0, 2, needed=3, version=7)
    assert office.facts() == before
    office.intake.add(stage(0), 0, [new_item(0, 2), new_item(0, 2), new_item(0, 0)])
    assert list(office.labels()) != list(before.items)
    assert len(office.labels()) == 3
    office.intake.add(stage(0), 0, [])
    office.intake.add_gold([])
    assert len(office.labels()) == 3


def test_a_round_is_enough_once_all_of_it_or_min_labels_are_judged(make: Callable[..., Office]) -> None:
    for min_labels, enough_at in ((None, 3), (2, 2), (9, 3)):
        office = make(min_labels=min_labels)
        (ann,) = office.admit("ann")
        office.draw(0, 3)
        seen = []
        for _ in range(4):
            assert not office.intake.standing(stage(0)).enough  # not before all are drawn
            seen.append(office.intake.standing(stage(0)).judged)
            ann.label()
        office.draw(1, 3)
        office.intake.finish(stage(1), 1)
        while not office.intake.standing(stage(1)).enough:
            assert ann.label()
        standing = office.intake.standing(stage(1))
        assert (seen, standing.judged, standing.answers) == ([0, 1, 2, 3], enough_at, enough_at)
        assert ann.progress().target == enough_at


def test_a_round_of_which_nothing_went_to_people_is_enough(office: Office) -> None:
    assert not office.intake.standing(stage(0)).enough  # nobody has said that no more will come
    office.intake.finish(stage(0), 0)
    assert office.intake.standing(stage(0)).enough
    assert office.end_round(0) == []
    assert office.intake.standing(stage(0)).enough


def test_standing_counts_the_people_who_can_answer(office: Office, machine: Machine) -> None:
    office.draw(0, 1)
    office.people.admit("operator", "operator")
    office.people.admit("ann", days=1)
    office.admit("bob", "cai", "dee")
    office.people.exclude("bob", "by the operator")
    office.people.revoke("cai")
    assert office.intake.standing(stage(0)).labelers == 2
    machine.wait(24 * 3600)
    assert office.intake.standing(stage(0)).labelers == 1
    office.people.admit("ann")
    office.people.admit("ann")
    assert office.intake.standing(stage(0)).labelers == 2


def test_nothing_changes_after_the_seal_and_what_was_not_judged_joins_the_next_round(office: Office) -> None:
    ann, _ = office.admit("ann", "bob")
    office.draw(0, 3)
    (done,) = ann.label("desirable")
    late, _ = ann.take(2)
    office.intake.finish(stage(0), 0)
    first = office.intake.seal(stage(0))
    assert [judged.label for judged in first] == ["desirable"]
    sealed = office.facts()
    with refused("sealed", "this image's round is sealed; nothing in it changes any more"):
        ann.undo(done)
    office.draw(0, 3, needed=2)
    assert office.facts() == sealed
    ann.answer(late, "undesirable")
    office.people.exclude("bob", "by the operator")
    assert office.intake.seal(stage(0)) == first  # asked again, after a crash for instance
    office.draw(1, 1)
    office.crash()
    second = {office.facts().items[sample]["id"] for sample in office.end_round(1)}
    assert second == {late}
    assert office.intake.seal(stage(0)) == first


def test_images_that_are_withdrawn_with_a_round_take_no_answers_any_more(office: Office) -> None:
    ann, bob = office.admit("ann", "bob")
    office.draw(0, 3, needed=2)
    (half,) = ann.label()
    looked_at, _ = ann.take(2)
    office.intake.finish(stage(0), 0)
    assert office.intake.seal(stage(0), withdraw=True) == []
    assert (ann.take(3), bob.take(3), ann.extend([looked_at])) == ([], [], [])
    with refused("sealed"):
        ann.answer(looked_at, "desirable")
    with refused("sealed"):
        ann.undo(half)
    assert office.intake.seal(stage(0), withdraw=True) == []
    assert office.end_round(1) == []


def test_until_the_seal_people_may_change_their_minds(office: Office) -> None:
    office.draw(0, 1)
    (ann,) = office.admit("ann")
    (item,) = ann.label("desirable")
    for verdict in ("undesirable", "unsure", "undesirable"):
        ann.undo(item)
        ann.answer(item, verdict)
    office.intake.finish(stage(0), 0)
    assert [judged.label for judged in office.intake.seal(stage(0))] == ["undesirable"]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_images_that_could_not_be_trained_on_any_more_are_not_offered(make: Callable[..., Office], lag: int) -> None:
    office = make(max_policy_lag=lag)
    ann, bob = office.admit("ann", "bob")
    office.draw(0, 4)
    held = ann.take(2)
    for upcoming in (1, 2, 3):
        office.end_round(upcoming - 1)
        offered = bob.take(9)
        bob.release(offered)
        assert len(offered) == (2 if upcoming <= lag else 0)
    ann.answer(held[0], "desirable")  # what was given may still be answered
    assert [office.facts().items[sample]["id"] for sample in office.end_round(3)] == [held[0]]


def test_what_people_wait_for(office: Office) -> None:
    (ann,) = office.admit("ann")

    def waits() -> tuple[int | None, str]:
        progress = ann.progress()
        return progress.round, progress.waits_for

    assert waits() == (None, "images")
    office.draw(0, 2)
    assert waits() == (0, "images")
    assert ann.progress().target is None
    office.intake.finish(stage(0), 0)
    assert waits() == (0, "people")
    ann.label()
    progress = ann.progress()
    assert (progress.asked, progress.judged, progress.target, progress.answers) == (2, 1, 2, 1)
    office.end_round(0)
    assert waits() == (0, "training")
    office.draw(1, 1)
    assert waits() == (1, "images")
    for _ in range(2):
        office.intake.end()
        assert waits() == (1, "nothing")
    office.intake.end(False)
    office.intake.end(False)
    assert waits() == (1, "images")


# -- crashes and clocks -----------------------------------------------------------------------------------------------


class Cut(BaseException):
    """The power went."""


@contextmanager
def power_cut(engine: sa.Engine, after: int) -> Iterator[None]:
    """Before statement `after` + 1, or before the commit if that comes first."""
    left = itertools.count(after, -1)

    def strike(*_: Any) -> None:
        if next(left) == 0:
            raise Cut

    listeners = [(engine, "before_cursor_execute", strike), (engine, "commit", strike)]
    for listener in listeners:
        sa.event.listen(*listener)
    try:
        yield
    finally:
        for listener in listeners:
            sa.event.remove(*listener)


CHANGES: dict[str, Callable[[Office, Caller, str, str], Any]] = {
    "add": lambda office, *_: office.draw(0, 2, first=10),
    "lease": lambda _, ann, *__: ann.lease(3),
    "answer": lambda _, ann, held, __: ann.answer(held, "desirable"),
    "undo": lambda _, ann, __, done: ann.undo(done),
    "seal": lambda office, *_: office.intake.seal(stage(0)),
    "exclude": lambda office, *_: office.people.exclude("ann", "by the operator"),
    "revoke": lambda office, *_: office.people.revoke("ann"),
    "admit": lambda office, *_: office.people.admit("dee"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_any_statement_leaves_the_state_before(office: Office, change: str) -> None:
    office.draw(0, 6, needed=2)
    ann, bob = office.admit("ann", "bob")
    (done,) = ann.label()
    held = ann.take(1)[0]
    bob.label("undesirable", 6)
    before = office.facts()
    for after in itertools.count():
        try:
            with power_cut(office.engine, after):
                CHANGES[change](office, ann, held, done)
            break
        except Cut:
            office.crash()
            assert office.facts() == before
    assert after > 1
    assert office.facts() != before


def test_time_does_not_go_back_or_jump_with_the_machines_clock(machine: Machine) -> None:
    clock = Clock()
    began = clock()
    assert began == machine.wall
    machine.wall -= 10**6
    assert clock() == began
    machine.wall += 10**9
    machine.up += 5
    assert clock() == began + 5
    machine.wall = began - 50
    assert Clock(last=began + 5)() == began + 5
    assert Clock(last=began - 99)() == began - 50


def test_a_crash_does_not_take_time_back_behind_what_people_did(office: Office, machine: Machine) -> None:
    office.draw(0, 1)
    (ann,) = office.admit("ann")
    (item,) = ann.take()
    for method, arguments in (("extend", [[item]]), ("answer", [item, "desirable"]), ("undo", [item])):
        machine.wait(10)
        getattr(ann, method)(*arguments)
        now = office.clock()
        office.crash(back=10**6)
        assert office.clock() == now


@pytest.mark.parametrize("lease_s", [LEASE_S, 100 * LEASE_S, LEASE_S / 100])
def test_two_people_do_not_get_one_image_because_the_clock_went_back(
    office: Office, machine: Machine, lease_s: float
) -> None:
    """Also if people are given more, or less, time than before the machine started again."""
    office.draw(0, 1)
    ann, bob = office.admit("ann", "bob")
    (item,) = ann.take()
    machine.wait(LEASE_S)
    assert bob.take() == [item]
    now = office.clock()
    office.human = office.human.model_copy(update={"lease_s": lease_s})
    office.crash(back=LEASE_S)
    assert office.clock() == now
    with refused("taken"):
        ann.answer(item, "desirable")
    bob.answer(item, "undesirable")
    assert list(office.labels().values()) == ["undesirable"]


def test_leases_and_links_outlive_a_crash(office: Office, machine: Machine) -> None:
    office.draw(0, 2)
    ann, bob = office.admit("ann", "bob")
    offers = ann.lease(1)
    for _ in range(3):
        office.crash()
        machine.wait(5)
        assert ann.lease(1) == offers
        assert len(bob.take(2)) == 1


ANSWER_ON = """
import sys
from kto_ray.people.clock import clock_of
from kto_ray.people.queue import Queue
from kto_ray.config.people import Human
from kto_ray.people.tables import open_database

engine = open_database(sys.argv[1], "run")
queue = Queue(engine, Human(), clock_of(engine))
while offers := queue.lease(sys.argv[2]):
    queue.answer(sys.argv[2], offers[0].item, "desirable")
    print(offers[0].item, flush=True)
"""


def test_a_killed_process_leaves_every_answer_that_it_took(fresh: Callable[[], str]) -> None:
    office = Office(fresh(), Machine(), Human())
    office.draw(0, 2000)
    (ann,) = office.admit("ann")
    office.engine.dispose()
    words = [sys.executable, "-c", ANSWER_ON, office.url, ann.badge]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        told = [process.stdout.readline().strip() for _ in range(20)]
        process.kill()
        told += process.stdout.read().split()
    office.open()
    stored = [row["item"] for row in office.facts().answers]
    assert stored[: len(told)] == told
    assert len(told) <= len(stored) <= len(told) + 1 < 2000
    check_promises(office.facts(), "majority", office.clock())
    assert ann.label()[0] not in stored
    office.engine.dispose()


# -- several at once --------------------------------------------------------------------------------------------------


@pytest.fixture
def offices(make: Callable[..., Office]) -> list[Office]:
    """Over one database, as a desk that was started anew, one that is not gone yet, and the command line are."""
    first = make(overlap={"rule": "majority"})
    return [first, *(make(url=first.url, overlap={"rule": "majority"}) for _ in range(2))]


def test_a_database_is_made_once_by_whoever_comes_first(fresh: Callable[[], str]) -> None:
    for _ in range(5):
        url = fresh()
        engines = at_once(*[lambda url=url: open_database(url, "run")] * 4)
        assert len(set(at_once(*(partial(secret_of, engine) for engine in engines)))) == 1
        for engine in engines:
            engine.dispose()


def test_several_desks_give_and_take_every_image_once(offices: list[Office]) -> None:
    offices[0].draw(0, 30)
    names = ("ann", "bob", "cai")

    def work(caller: Caller) -> list[str]:
        return list(itertools.chain.from_iterable(iter(partial(caller.label, "desirable", 2), [])))

    callers = [Caller(office, office.people.admit(name).id) for office, name in zip(offices, names, strict=True)]
    done = at_once(*(partial(work, caller) for caller in callers))
    assert len(set().union(*done)) == sum(map(len, done)) == 30
    facts = offices[0].facts()
    check_promises(facts, "majority", offices[0].clock())
    assert len(facts.answers) == 30


def test_somebody_new_is_admitted_once(offices: list[Office]) -> None:
    for name in ("ann", "bob", "cai", "dee"):
        at_once(*(partial(office.people.admit, name) for office in offices))
    assert {person.name: person.links for person in offices[0].people.everybody()} == dict.fromkeys(
        ("ann", "bob", "cai", "dee"), 3
    )


RACES = {
    "exclude and answer": ("exclude", "answer"),
    "exclude and lease": ("exclude", "lease"),
    "exclude and undo": ("exclude", "undo"),
    "seal and answer": ("seal", "answer"),
    "seal and undo": ("seal", "undo"),
    "seal and exclude": ("seal", "exclude"),
}


@pytest.mark.parametrize("race", RACES)
def test_what_happens_at_once_comes_out_as_if_one_had_followed_the_other(offices: list[Office], race: str) -> None:
    desk, _, operator = offices
    one, other = RACES[race]
    ann = Caller(desk, desk.people.admit("ann").id)
    for number in range(8):
        desk.draw(number, 4)
        (done,), (held,) = ann.label(), ann.take()
        desk.intake.finish(stage(number), number)
        calls = {
            "exclude": lambda: operator.people.exclude("ann", "by the operator"),
            "seal": lambda number=number: operator.intake.seal(stage(number)),
            "answer": lambda held=held: ann.answer(held, "undesirable"),
            "lease": lambda: ann.take(3),
            "undo": lambda done=done: ann.undo(done),
        }
        at_once(calls[one], calls[other])
        facts = desk.facts()
        check_promises(facts, "majority", desk.clock())
        excluded = facts.labelers["ann"]["excluded_at"] is not None
        assert excluded == ("exclude" in (one, other))
        sealed = {sample for sample, row in facts.items.items() if row["sealed_in"]}
        standing = {row["sample"] for row in facts.answers if row["void"] is None}
        assert sealed <= standing
        assert not excluded or (facts.leases == {} and standing == sealed)
        desk.intake.seal(stage(number))
        desk.people.include("ann")
