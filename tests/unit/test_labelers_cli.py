"""`kto-ray labelers`: links that open the page, and people who come and go while the run goes on."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kto_ray.cli import main
from kto_ray.config import load, to_yaml
from kto_ray.people.access import Signer, secret_of
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.clock import Clock
from kto_ray.people.intake import Intake
from kto_ray.people.people import People, Person, Refused
from kto_ray.people.queue import Queue
from kto_ray.people.tables import open_database
from kto_ray.people.terms import NewItem
from kto_ray.people.votes import Vote, Votes
from kto_ray.relabel import saved_config
from kto_ray.storage import Storage

DAY_S = 24 * 3600
OVERRIDES = ("label.labeler=human", "label.human.public_url=https://labels.example.org", "label.human.link_days=7")


def write_run(folder: Path, *overrides: str) -> Path:
    """A run's folder that has nothing but its configuration yet."""
    config = load("shapes_demo", [f"runs_folder={folder}", "run=demo", *overrides])
    Storage(str(folder / "demo")).write("config.yaml", to_yaml(config).encode())
    return folder / "demo"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, *OVERRIDES)


class Desk:
    """The queue of a run as its actor has it, beside the command line."""

    def __init__(self, run: Path, images: int = 3) -> None:
        config, folder = saved_config(Storage(str(run))), Storage(str(run))
        human = config.label.human
        self.engine = open_database(database_url(human, folder), database_owner(human, folder))
        self.clock = Clock()
        self.intake = Intake(self.engine, human, self.clock)
        self.queue, self.people = Queue(self.engine, human, self.clock), People(self.engine, human, self.clock)
        self.signer = Signer(secret_of(self.engine))
        self.intake.add("round-00000", 0, [NewItem(f"s{i}", "p", "a red circle", b"PNG") for i in range(images)])


@pytest.fixture
def desk(run: Path) -> Desk:
    desk = Desk(run)
    yield desk
    desk.engine.dispose()


Call = Callable[..., Result]


@pytest.fixture
def call(run: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: str, run: Path = run) -> Result:
        return CliRunner().invoke(main, ["labelers", *words, "--run", str(run)])

    return call


def token_in(result: Result) -> str:
    assert result.exit_code == 0, result.output
    base, _, token = result.stdout.strip().rpartition("/enter/")
    assert re.fullmatch(r"https://labels\.example\.org/demo-[0-9a-f]{8}", base)  # of this folder, not of this name
    return token


def rows_of(result: Result) -> list[list[str]]:
    """Cells of the table without its head."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_add_prints_a_link_that_lets_somebody_in(call: Call, run: Path) -> None:
    token = token_in(call("add", "ann"))  # before the run has started
    desk = Desk(run)
    badge = desk.signer.badge(token)
    assert desk.people.whose(badge.id) == ("ann", "labeler")
    assert len(desk.queue.lease(badge.id, 2)) == 2
    assert badge.expires_at - desk.clock() == pytest.approx(7 * DAY_S, abs=600)
    desk.engine.dispose()


def test_a_link_may_work_for_a_time_of_its_own_and_earlier_ones_go_on(call: Call, desk: Desk) -> None:
    first, second = (desk.signer.badge(token_in(call("add", "ann", *days))) for days in ((), ("--days", "90")))
    assert second.expires_at - first.expires_at == pytest.approx(83 * DAY_S, abs=600)
    assert desk.people.whose(first.id) == desk.people.whose(second.id)
    assert desk.people.everybody() == [Person("ann", "labeler", links=2, answers=0, excluded_why=None)]


def test_list_shows_everybody(call: Call, desk: Desk) -> None:
    assert rows_of(call("list")) == []
    ann = desk.people.admit("ann").id
    desk.people.admit("ann")
    desk.people.admit("[red]bob[/red]")  # is a name, not markup
    desk.people.admit("operator", "operator")
    for offer in desk.queue.lease(ann, 2):
        desk.queue.answer(ann, offer.item, "desirable")
    desk.people.revoke("[red]bob[/red]")
    desk.people.exclude("ann", "0 of 5 known answers right")
    assert rows_of(call("list")) == [
        ["[red]bob[/red]", "labeler", "0", "0", ""],
        ["ann", "labeler", "2", "0", "0 of 5 known answers right"],
        ["operator", "operator", "1", "0", ""],
    ]


def test_revoked_links_do_not_work_and_the_answers_stay(call: Call, desk: Desk) -> None:
    ann = desk.signer.badge(token_in(call("add", "ann"))).id
    (offer, other) = desk.queue.lease(ann, 2)
    desk.queue.answer(ann, offer.item, "desirable")
    result = call("revoke", "ann")
    assert (result.exit_code, result.stdout) == (0, "ann: links that no longer work: 1\n")
    with pytest.raises(Refused, match="revoked"):
        desk.queue.answer(ann, other.item, "desirable")
    assert desk.intake.standing("round-00000").judged == 1
    again = desk.signer.badge(token_in(call("add", "ann"))).id
    desk.queue.answer(again, other.item, "undesirable")  # it is still ann's
    assert desk.intake.standing("round-00000").judged == 2


def test_who_is_excluded_is_out_and_who_is_included_is_asked_again(call: Call, desk: Desk) -> None:
    bob = desk.signer.badge(token_in(call("add", "bob"))).id
    (offer,) = desk.queue.lease(bob)
    desk.queue.answer(bob, offer.item, "desirable")
    result = call("exclude", "bob")
    assert result.stdout == "bob is asked no more; the answers have left all rounds that are not sealed\n"
    assert desk.intake.standing("round-00000").judged == 0
    with pytest.raises(Refused, match="no longer asked"):
        desk.queue.lease(bob)
    assert rows_of(call("list")) == [["bob", "labeler", "1", "0", "by the operator"]]
    assert call("include", "bob").stdout == "bob is asked again\n"
    assert len(desk.queue.lease(bob, 3)) == 3
    assert desk.intake.standing("round-00000").judged == 0


@pytest.mark.parametrize("command", ["revoke", "exclude", "include"])
def test_somebody_unknown_is_said_with_those_who_are_known(call: Call, command: str) -> None:
    result = call(command, "ann")
    assert result.exit_code == 2
    assert "error: name: there is no labeler 'ann'; there are: none" in result.stderr
    call("add", "bob")
    call("add", "cai")
    assert "there is no labeler 'ann'; there are: bob, cai" in call(command, "ann").stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("operator", "'operator' is the name of whoever runs this; give labelers another"),
        ("", "must be 1 to 80 printable characters"),
        ("a\nb", "must be 1 to 80 printable characters"),
    ],
)
def test_names_that_cannot_be(call: Call, name: str, message: str) -> None:
    result = call("add", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_operator_is_not_excluded(call: Call, desk: Desk) -> None:
    desk.people.admit("operator", "operator")
    assert "there is no labeler 'operator'" in call("exclude", "operator").stderr


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf"])
def test_days_must_be_some(call: Call, days: str) -> None:
    assert call("add", "ann", "--days", days).exit_code == 2


def test_folders_without_a_run_of_people(call: Call, tmp_path: Path) -> None:
    result = call("list", run=tmp_path / "nothing")
    assert result.exit_code == 2
    assert "is not a run folder: it has no config.yaml" in result.stderr
    other = write_run(tmp_path / "scorers")
    result = call("add", "ann", run=other)
    assert result.exit_code == 2
    assert "its label.labeler is 'threshold', not 'human'" in result.stderr
    assert not (other / "people.sqlite").exists()


def test_who_votes_in_an_application_can_be_excluded_but_has_no_page(tmp_path: Path, call: Call) -> None:
    run = write_run(tmp_path / "feedback", "label.labeler=feedback")
    desk = Desk(run, images=1)
    votes = Votes(desk.engine, desk.people.settings, desk.clock)
    votes.announce({"s0": "s0-1"})
    assert votes.take([Vote("1", "s0-1", "desirable", "troll")]).counts == {"counted": 1}
    result = call("add", "ann", run=run)
    assert (result.exit_code, "has no page to judge on" in result.stderr) == (2, True)
    assert call("exclude", "troll", run=run).exit_code == 0
    assert votes.take([Vote("2", "s0-1", "desirable", "troll")]).counts == {"excluded": 1}
    assert [(person.name, person.answers, person.excluded_why) for person in desk.people.everybody()] == [
        ("troll", 0, "by the operator")
    ]
    desk.engine.dispose()


def test_a_database_that_cannot_be_used_is_said(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD_OF_ANN", "secret")
    url = "postgresql+psycopg://ann:$PASSWORD_OF_ANN@127.0.0.1:1/x"
    run = write_run(tmp_path / "other", *OVERRIDES, f"label.human.database={url}")
    result = call("list", run=run)
    assert result.exit_code == 2
    assert "label.human.database: cannot use postgresql+psycopg://ann:" in result.stderr
    assert "secret" not in result.output


def test_a_run_is_needed() -> None:
    result = CliRunner().invoke(main, ["labelers", "list"])
    assert result.exit_code == 2
    assert "--run" in result.stderr
