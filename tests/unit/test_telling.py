"""What a terminal shows while a run goes, and that there is nothing of it elsewhere."""

import io

import pytest
from rich.console import Console

from kto_ray.stage import Role
from kto_ray.telling import LiveView, who_waits


class Stand:
    """A run at a moment of one's choice."""

    def __init__(self, terminal: bool = True, rounds: int = 10) -> None:
        self.now, self.roles, self.file = 0.0, frozenset[Role](), io.StringIO()
        console = Console(file=self.file, force_terminal=terminal, width=120, soft_wrap=True)
        self.view = LiveView(console, rounds, lambda: self.roles, lambda: self.now)

    def shown(self) -> str:
        paper = Console(file=io.StringIO(), width=120, record=True)
        paper.print(self.view.get_renderable())
        return paper.export_text()


def test_it_says_where_the_run_stands_and_what_is_under_way() -> None:
    stand = Stand()
    assert "at its beginning" in stand.shown()
    stand.view.walked(3)
    stand.roles = frozenset({"making"})
    bar = stand.view.add_task("round 3: images", total=48)
    for done in (6, 12, 18):
        stand.now += 2.0
        stand.view.update(bar, completed=done)
    headline, row = stand.shown().splitlines()
    assert headline.strip() == ("policy 3 of 10; generators draw and scorers score, train workers wait for the round")
    assert "round 3: images" in row
    assert "18/48" in row
    assert "3/s" in row


def test_the_time_left_follows_the_last_rounds() -> None:
    stand = Stand()
    stand.view.walked(0)
    assert stand.view.left_s is None
    stand.now = 1000.0  # the first one waits for everything to be built
    stand.view.walked(1)
    assert stand.view.left_s == 9000
    for version in range(2, 8):
        stand.now += 60
        stand.view.walked(version)
    assert stand.view.left_s == 3 * 60
    stand.now += 15
    assert "policy 7 of 10, about 2 min 45 s left" in stand.view.headline()
    stand.now += 1000
    assert stand.view.left_s == 0


def test_a_continued_run_tells_the_time_from_its_own_rounds() -> None:
    stand = Stand()
    stand.view.walked(8)
    stand.now = 30.0
    stand.view.walked(9)
    assert stand.view.left_s == 30


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({"making"}, "generators draw and scorers score, train workers wait for the round"),
        ({"judging"}, "verdicts are given, train workers wait for the round"),
        ({"training"}, "train workers learn, generators wait for the policy"),
        ({"making", "training"}, "generators draw and scorers score while train workers learn"),
        ({"evaluating"}, "held-out images are drawn and scored"),
        (set(), "all wait for the next turn"),
    ],
)
def test_who_waits_for_whom(roles: set[Role], said: str) -> None:
    assert who_waits(frozenset(roles)) == said


def test_a_file_has_nothing_of_it_and_a_terminal_nothing_that_stays() -> None:
    for terminal in (False, True):
        stand = Stand(terminal)
        with stand.view:
            bar = stand.view.add_task("round 0: images", total=2)
            stand.view.update(bar, completed=1)
            stand.view.console.print("round 0: 3 yes")
            stand.view.refresh()
            stand.view.remove_task(bar)
        said = stand.file.getvalue()
        if not terminal:
            assert said == "round 0: 3 yes\n"
        else:
            assert "round 0: images" in said
            assert said.endswith("\x1b[2K")  # the last thing is to wipe its own lines
