"""Who may label, what a link proves, how far people agree, and what the operator sees of it."""

import contextlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itsdangerous import URLSafeSerializer
from nltk.metrics.agreement import AnnotationTask
from pydantic import ValidationError

from kto_ray.config.people import Human
from kto_ray.errors import UserError
from kto_ray.people import access, clock
from kto_ray.people.access import Signer, link, secret_of
from kto_ray.people.agreement import Annotation, Reliability, agreement
from kto_ray.people.overview import ANSWER_SCHEMA, Overview, answers_table, export, overview
from kto_ray.people.people import Badge, Person, Refused
from kto_ray.people.tables import in_transaction, meta, open_database
from tests.office import LEASE_S, Machine, Office, gold, new_item, refused, stage

DAY_S = 24 * 3600


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clock, "time", machine)
    monkeypatch.setattr(access, "time", machine)
    return machine


@pytest.fixture
def make(tmp_path: Path, machine: Machine) -> Iterator[Callable[..., Office]]:
    made: list[Office] = []

    def make(**human: Any) -> Office:
        url = f"sqlite:///{tmp_path}/{len(made)}.sqlite"
        made.append(Office(url, machine, Human(**{"lease_s": LEASE_S, **human})))
        return made[-1]

    yield make
    for office in made:
        office.engine.dispose()


@pytest.fixture
def office(make: Callable[..., Office]) -> Office:
    return make()


# -- people -----------------------------------------------------------------------------------------------------------


def test_somebody_may_have_several_links_and_the_one_that_works_longest_comes_first(office: Office) -> None:
    people, now = office.people, office.clock()
    first, longest, short = (people.admit("ann", days=days) for days in (None, 90, 0.5))
    assert [badge.expires_at - now for badge in (first, longest, short)] == [30 * DAY_S, 90 * DAY_S, DAY_S / 2]
    assert people.badges_of("ann") == [longest, first, short]
    office.machine.wait(DAY_S / 2)
    assert people.badges_of("ann") == [longest, first]
    assert people.revoke("ann") == 2
    assert people.revoke("ann") == 0
    assert people.badges_of("ann") == people.badges_of("somebody unknown") == []
    again = people.admit("ann")
    assert people.whose(again.id) == ("ann", "labeler")
    assert [person.name for person in people.everybody()] == ["ann"]


def test_badges_cannot_be_guessed_from_each_other(office: Office) -> None:
    badges = {office.people.admit("ann").id for _ in range(50)}
    assert len(badges) == 50
    assert min(map(len, badges)) >= 22  # 128 bits


@pytest.mark.parametrize("name", ["", "  ", "a" * 81, "two\nlines", "\x1b[31mred"])
def test_names_must_be_shown_in_a_line(office: Office, name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"name: {name!r} must be 1 to 80 printable characters")):
        office.people.admit(name)
    assert office.people.everybody() == []


@pytest.mark.parametrize(("name", "role"), [("operator", "labeler"), ("ann", "operator")])
def test_the_operator_is_called_operator_and_nobody_else_is(office: Office, name: str, role: Any) -> None:
    with pytest.raises(UserError, match="'operator' is the name of whoever runs this"):
        office.people.admit(name, role)


def test_everybody_with_what_they_did(office: Office) -> None:
    ann, _ = office.admit("zoë", "bob")
    office.people.admit("operator", "operator")
    office.draw(0, 3)
    ann.label("desirable")
    ann.undo(ann.label("unsure")[0])
    ann.label("skip")
    office.people.exclude("bob", "by the operator")
    assert office.people.everybody() == [
        Person("bob", "labeler", links=1, answers=0, excluded_why="by the operator"),
        Person("operator", "operator", links=1, answers=0, excluded_why=None),
        Person("zoë", "labeler", links=1, answers=2, excluded_why=None),
    ]


@pytest.mark.parametrize("call", ["revoke", "include", "exclude"])
def test_who_is_not_known_is_said(office: Office, call: str) -> None:
    more = ("why",) if call == "exclude" else ()
    for known in ("none", "bob", "bob, cai"):
        with pytest.raises(UserError, match=f"^name: there is no labeler 'ann'; there are: {known}$"):
            getattr(office.people, call)("ann", *more)
        office.people.admit("bob" if known == "none" else "cai")


def test_only_the_operator_is_the_operator(office: Office) -> None:
    operator, ann = office.people.admit("operator", "operator"), office.people.admit("ann")
    office.people.require_operator(operator.id)
    with refused("operator", "this is for the operator only"):
        office.people.require_operator(ann.id)
    with refused("badge"):
        office.people.require_operator("made up")
    with refused("operator"):
        overview(office.engine, office.human, ann.id, office.clock, office.tallies)
    with refused("operator"):
        export(office.engine, ann.id, office.clock)
    with pytest.raises(UserError, match="there is no labeler 'operator'"):
        office.people.exclude("operator", "why not")
    office.people.revoke("operator")
    with refused("revoked"):
        office.people.require_operator(operator.id)


# -- links ------------------------------------------------------------------------------------------------------------


def test_a_link_leads_back_to_its_badge(office: Office) -> None:
    signer, badge = Signer(secret_of(office.engine)), office.people.admit("ann")
    url = link("https://labels.example.org/demo", signer.token(badge))
    token = url.removeprefix("https://labels.example.org/demo/enter/")
    assert re.fullmatch(r"[\w.-]+", token)
    assert Signer(secret_of(office.engine)).badge(token) == badge
    office.crash()
    assert Signer(secret_of(office.engine)).badge(token) == badge  # also after the run was started again


def test_every_database_has_a_secret_of_its_own(make: Callable[..., Office]) -> None:
    secrets = [secret_of(make().engine) for _ in range(2)]
    assert secrets[0] != secrets[1]
    assert min(map(len, secrets)) == 64


def test_a_link_expires_to_the_second(machine: Machine) -> None:
    signer, badge = Signer("secret"), Badge("id", machine.wall + 60)
    token = signer.token(badge)
    machine.wait(59)
    assert signer.badge(token) == badge
    machine.wait(1)
    with refused("expired", "this link has expired; ask the operator for a new one"):
        signer.badge(token)


def forgeries(machine: Machine) -> dict[str, str]:
    badge = Badge("id", machine.wall + 60)
    token = Signer("secret").token(badge)
    payload, _, signature = token.rpartition(".")

    def signed(value: Any, salt: str = "badge") -> str:
        return str(URLSafeSerializer("secret", salt=salt).dumps(value))

    return {
        "another secret": Signer("secre").token(badge),
        "another purpose": signed(["id", badge.expires_at], "form"),
        "a form's": Signer("secret").form_token(badge),
        "longer": URLSafeSerializer("x", salt="badge").dumps(["id", badge.expires_at + 99]).split(".")[0]
        + "."
        + signature,
        "without signature": payload,
        "empty signature": payload + ".",
        "cut": token[:-1],
        "changed": ("A" if token[0] != "A" else "B") + token[1:],
        "nothing": "",
        "noise": "\x00é.%%%",
        "a number": signed(5),
        "too many": signed(["id", badge.expires_at, 1]),
    }


def test_forged_links_are_refused(machine: Machine) -> None:
    signer = Signer("secret")
    for name, token in forgeries(machine).items():
        with pytest.raises(Refused, match="this link is not known here") as caught:
            signer.badge(token)
        assert caught.value.why == "badge", name


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_letter_of_a_link_can_be_changed(data: st.DataObject) -> None:
    signer = Signer("secret")
    badge = Badge("id", time.time() + 1e6)
    token = signer.token(badge)
    place = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.characters(codec="ascii", categories=("L", "N", "P")).filter(lambda c: c != token[place]))
    with contextlib.suppress(Refused):  # but for bits that base64 does not use at the end
        assert signer.badge(token[:place] + letter + token[place + 1 :]) == Badge("id", int(badge.expires_at))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://[::1]:8123/my run", "http://[::1]:8123/my%20run/enter/t"),
        ("https://me@a.org:1/x%20y/Läufe #1?", "https://me@a.org:1/x%20y/L%C3%A4ufe%20%231%3F/enter/t"),
    ],
)
def test_a_link_can_be_pasted_whatever_the_run_is_called(base: str, expected: str) -> None:
    assert link(base, "t") == expected


def test_a_form_is_of_one_badge_and_no_link(machine: Machine) -> None:
    signer, ann, bob = Signer("secret"), Badge("ann", machine.wall + 60), Badge("bob", machine.wall + 60)
    form = signer.form_token(ann)
    assert signer.is_form_of(ann, form)
    assert not signer.is_form_of(bob, form)
    assert not Signer("other").is_form_of(ann, form)
    for token in (signer.token(ann), "", "noise", form[:-1]):
        assert not signer.is_form_of(ann, token)


# -- agreement --------------------------------------------------------------------------------------------------------

KRIPPENDORFF_2011 = {
    "A": "1 2 3 3 2 1 4 1 2 . . .",
    "B": "1 2 3 3 2 2 4 1 2 5 . 3",
    "C": ". 3 3 3 2 3 4 2 2 5 1 .",
    "D": "1 2 3 3 2 4 4 1 2 5 1 .",
}
"""Four observers, twelve units, with gaps: Computing Krippendorff's Alpha-Reliability, example C."""


def published() -> list[Annotation]:
    rows = (
        (who, unit, value) for who, values in KRIPPENDORFF_2011.items() for unit, value in enumerate(values.split())
    )
    return [(who, str(unit), value) for who, unit, value in rows if value != "."]


def alpha_of(said: Sequence[Annotation]) -> float:
    """As nltk has it."""
    return float(AnnotationTask(data=list(said)).alpha())


def test_agreement_is_as_published() -> None:
    found = agreement(published())
    assert found.alpha == pytest.approx(0.743, abs=0.0005)
    assert alpha_of(published()) == pytest.approx(0.743, abs=0.0005)
    assert found.percent == pytest.approx(43 / 55)  # so many pairs of answers are alike


def test_agreement_does_not_hang_on_the_order_of_answers() -> None:
    said = published()
    assert agreement(said[::-1]).alpha == pytest.approx(agreement(said).alpha)
    assert agreement(sorted(said, key=lambda answer: answer[1])).alpha == pytest.approx(agreement(said).alpha)


said_ = st.dictionaries(
    st.tuples(st.sampled_from("ABCD"), st.sampled_from("123456")), st.sampled_from(["yes", "no", "unsure"]), max_size=24
).map(lambda table: [(who, item, value) for (who, item), value in table.items()])


@settings(max_examples=100, deadline=None)
@given(said_)
def test_agreement_is_what_its_definitions_say(said: list[Annotation]) -> None:
    found = agreement(said)
    pairs = [(a, b) for a, b in itertools.combinations(said, 2) if a[1] == b[1]]
    assert found.percent == (pytest.approx(sum(a[2] == b[2] for a, b in pairs) / len(pairs)) if pairs else None)
    shared = [answer for answer in said if any(answer in pair for pair in pairs)]
    if len({value for _, _, value in shared}) < 2:
        assert found.alpha is None
    else:
        assert found.alpha == pytest.approx(alpha_of(shared))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], Reliability(None, None)),
        ([("A", "1", "yes"), ("B", "2", "yes")], Reliability(None, None)),  # no image in common
        ([("A", "1", "yes"), ("B", "1", "yes"), ("B", "2", "no")], Reliability(1, None)),  # chance would agree, too
        ([("A", "1", "yes"), ("B", "1", "yes"), ("A", "2", "no"), ("B", "2", "no")], Reliability(1, 1)),
        ([("A", "1", "yes"), ("B", "1", "no")], Reliability(0, 0)),
    ],
)
def test_agreement_where_little_is_known(said: list[Annotation], expected: Reliability) -> None:
    assert agreement(said) == expected


# -- what the operator sees -------------------------------------------------------------------------------------------


@pytest.fixture
def busy(make: Callable[..., Office]) -> Office:
    """Two rounds, three people, gold; ann and bob judge three images together, and agree on two of them."""
    office = make(overlap={"labels": 2}, gold={"file": "gold.jsonl", "share": 0.01, "limit": 0.9, "least": 1})
    ann, bob = office.admit("ann", "bob")
    office.people.admit("cai", days=1)
    office.draw(0, 3, needed=2)
    for offer in ann.lease(3):
        ann.answer(offer.item, "desirable", 1.0)
    office.machine.wait(60)
    for offer, verdict in zip(bob.lease(3), ["desirable", "desirable", "undesirable"], strict=True):
        bob.answer(offer.item, verdict, 3.0)
    office.end_round(0)
    office.intake.add_gold(gold(1, "undesirable"))
    office.draw(1, 4)
    office.intake.finish(stage(1), 1)
    return office


def test_the_overview_of_people(busy: Office) -> None:
    now = busy.clock()
    ann, bob, cai = busy.view().labelers  # the operator is not among them
    assert (ann.name, ann.answers, ann.desirable, ann.undesirable, ann.unsure, ann.skipped) == ("ann", 3, 3, 0, 0, 0)
    assert (bob.name, bob.answers, bob.desirable, bob.undesirable, bob.median_seconds) == ("bob", 3, 2, 1, 3.0)
    assert (ann.last_at, bob.last_at, cai.last_at) == (now - 60, now, None)
    assert (ann.per_minute, ann.median_seconds, ann.links, ann.looking_at) == (pytest.approx(0.3), 1.0, 1, 0)
    assert ann.agreement == bob.agreement == pytest.approx(2 / 3)
    nothing = (cai.answers, cai.per_minute, cai.median_seconds, cai.agreement, cai.doubt, cai.excluded_why)
    assert nothing == (0, 0, None, None, None, None)
    busy.machine.wait(DAY_S)
    ann, _, cai = busy.view().labelers
    assert (ann.per_minute, cai.links) == (0, 0)  # long ago; expired


def test_the_overview_of_answers_that_do_not_judge(busy: Office) -> None:
    (cai,) = busy.admit("cai")
    cai.label("skip")
    (one, two) = (cai.label("unsure")[0] for _ in range(2))
    cai.undo(one)
    row = busy.view().labelers[2]
    assert (row.answers, row.skipped, row.unsure, row.median_seconds) == (2, 1, 1, None)
    assert (row.links, row.looking_at) == (2, 1)
    busy.people.exclude("cai", "by the operator")
    row = busy.view().labelers[2]
    assert (row.answers, row.excluded_why, row.looking_at) == (0, "by the operator", 0)
    assert two not in busy.view().recent["abstain"]


def test_the_overview_of_rounds_and_what_is_waiting(busy: Office) -> None:
    ann, bob = busy.admit("ann", "bob")
    ann.label("undesirable")
    ann.take(2)
    seen = busy.view()
    assert [
        (row.number, row.asked, row.desirable, row.undesirable, row.abstained, row.open, row.state)
        for row in seen.rounds
    ] == [
        (1, 4, 0, 1, 0, 3, "open"),
        (0, 3, 2, 0, 1, 0, "sealed"),
    ]
    assert (seen.waiting, seen.leased) == (3, 2)
    busy.machine.wait(LEASE_S)
    assert busy.view().leased == 0
    busy.draw(2, 1)
    assert [row.state for row in busy.view().rounds] == ["drawing", "open", "sealed"]
    assert bob.label("desirable", 2)


def test_the_overview_shows_the_latest_images_of_each_label(busy: Office) -> None:
    (ann,) = busy.admit("ann")
    order = [ann.label("desirable")[0] for _ in range(3)]
    recent = busy.view().recent
    assert recent["desirable"][:3] == order[::-1]
    assert [len(recent[label]) for label in ("desirable", "undesirable", "abstain")] == [5, 0, 1]


def test_the_overview_of_gold_and_agreement(make: Callable[..., Office]) -> None:
    office = make(gold={"file": "gold.jsonl", "share": 0.9, "limit": 0.7, "least": 2})
    office.intake.add_gold(gold(8, "undesirable"))
    office.draw(0, 10)
    ann, bob = office.admit("ann", "bob")
    ann.label("desirable", 5)
    bob.label("undesirable", 5)
    known = {row["id"] for row in office.facts().items.values() if row["expected"]}
    answered = Counter(row["who"] for row in office.facts().answers if row["item"] in known)
    assert min(answered["ann"], answered["bob"]) >= 2
    seen = office.view()
    one, other = seen.labelers
    assert (one.gold_right, one.gold_seen, one.doubt) == (
        0,
        answered["ann"],
        f"0 of {answered['ann']} known answers right",
    )
    assert (other.gold_right, other.gold_seen, other.doubt) == (answered["bob"], answered["bob"], None)
    assert seen.agreement == Reliability(None, None)  # gold in common is no agreement
    assert one.agreement is None


def test_nothing_to_see_yet(office: Office) -> None:
    assert office.view() == Overview(
        labelers=[],
        rounds=[],
        waiting=0,
        leased=0,
        agreement=Reliability(None, None),
        recent={"desirable": [], "undesirable": [], "abstain": []},
    )


def test_every_answer_is_in_the_table(busy: Office) -> None:
    (ann,) = busy.admit("ann")
    (item,) = ann.label("desirable")
    ann.undo(item)
    ann.answer(item, "unsure")
    table = answers_table(busy.engine)
    assert table.schema == ANSWER_SCHEMA
    rows = table.to_pylist()
    assert [row["labeler"] for row in rows] == ["ann"] * 3 + ["bob"] * 3 + ["ann"] * 2
    assert [row["answered_at"] for row in rows] == sorted(row["answered_at"] for row in rows)
    undone, unsure = rows[-2:]
    assert (undone["answer"], undone["void"], undone["label"], undone["sealed_in"]) == (
        "desirable",
        "undone",
        "abstain",
        None,
    )
    assert (unsure["answer"], unsure["void"], unsure["seconds"], unsure["late"]) == ("unsure", None, None, False)
    sealed = answers_table(busy.engine, stage(0)).to_pylist()
    assert sealed == rows[:6]
    by_sample = {row["sample_id"]: row["label"] for row in sealed}
    assert sorted(by_sample) == [new_item(0, i).sample_id for i in range(3)]
    assert Counter(by_sample.values()) == {"desirable": 2, "abstain": 1}
    assert (rows[0]["prompt"], rows[0]["policy_version"], rows[0]["known_answer"]) == (
        f"prompt {rows[0]['prompt_id'][1:]}",
        0,
        None,
    )
    operator = busy.people.admit("operator", "operator")
    assert export(busy.engine, operator.id, busy.clock) == table
    assert answers_table(busy.engine, "round-00009").num_rows == 0


# -- databases and settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "messages"),
    [
        ("nonsense", ["'nonsense' is not a database URL; write for instance postgresql+psycopg://user@host/name"]),
        ("postgresql+psycopg://host:port/name", ["host:port/name' is not a database URL"]),
        ("mysql+nosuch://host/name", ["no driver for mysql+nosuch://host/name", "install kto-ray[postgres]"]),
        ("postgresql+asyncpg://host/name", ["no driver for", "asyncpg", "write postgresql+psycopg://"]),
        ("postgresql+psycopg://ann:secret@127.0.0.1:1/name", ["cannot use postgresql+psycopg://ann:***@", "refused"]),
        ("sqlite:////proc/people.sqlite", ["cannot use sqlite:////proc/people.sqlite: unable to open database file"]),
        ("sqlite:///{file}/people.sqlite", ["cannot use sqlite", "unable to open database file"]),
        ("sqlite:///{file}", ["cannot use sqlite", "file is not a database"]),
        ("sqlite:///{folder}", ["cannot use sqlite", "unable to open database file"]),
    ],
)
def test_databases_that_cannot_be_used_are_said(tmp_path: Path, url: str, messages: list[str]) -> None:
    (file := tmp_path / "file").write_text("A text, longer than a hundred bytes, which no database begins with. " * 2)
    with pytest.raises(UserError, match=r"^label\.human\.database: ") as caught:
        open_database(url.format(file=file, folder=tmp_path), "run")
    assert [message for message in messages if message not in str(caught.value)] == []
    assert "secret" not in str(caught.value)


def test_the_database_of_another_run_or_version_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/people.sqlite"
    engine = open_database(url, "runs/one")
    open_database(url, "runs/one").dispose()
    with pytest.raises(UserError, match="belongs to run 'runs/one', not 'runs/two'; give each run a database"):
        open_database(url, "runs/two")
    in_transaction(engine, lambda c: c.execute(meta.update().where(meta.c.key == "layout").values(value="0")))
    with pytest.raises(UserError, match="belongs to layout '0', not '1'"):
        open_database(url, "runs/one")
    engine.dispose()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labelers": ["ann", "bob", "ann"]}, r"labelers \['ann', 'bob', 'ann'\] must differ from each other"),
        ({"labelers": ["operator"]}, "'operator' is the name of whoever runs this; choose another"),
        ({"lease_s": 0}, "greater than 0"),
        ({"port": 70000}, "less than or equal to 65535"),
        ({"min_labels": 0}, "greater than or equal to 1"),
        ({"overlap": {"rule": "most"}}, "'majority', 'unanimous', 'share' or 'latest'"),
        ({"overlap": {"share": 1.5}}, "less than or equal to 1"),
        ({"gold": {"share": 1}}, "less than 1"),
        ({"gold": {"action": "scold"}}, "'show' or 'exclude'"),
        ({"on_deadline": "stop"}, "'train', 'scorer' or 'wait'"),
        ({"route": "some"}, "'all', 'random', 'near_threshold', 'disagreement'"),
        ({"route": {"kind": "random", "share": 0}}, "greater than 0"),
        ({"lables": 3}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Human(**fields)


def test_a_word_is_a_route_with_its_defaults() -> None:
    assert Human(route="near_threshold") == Human(route={"kind": "near_threshold", "share": 0.25})  # type: ignore[arg-type]
    assert Human().route.kind == "all"
