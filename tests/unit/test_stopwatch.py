"""On what a process spends its seconds."""

import time

import pytest

from kto_ray.evaluate.shares import shares_of
from kto_ray.stopwatch import Seconds, Spent, added, as_figures


def test_every_second_is_spent_on_one_thing() -> None:
    began = time.monotonic()
    spent = Spent()
    time.sleep(0.02)
    spent.turn_to("wait")
    with spent.on("work"):
        time.sleep(0.02)
    before = spent.so_far()
    spent.turn_to("sleep")
    time.sleep(0.02)
    seconds = spent.so_far()
    whole = time.monotonic() - began
    assert whole - 0.01 < sum(seconds.values()) <= whole
    assert all(seconds[doing] >= 0.02 for doing in ("load", "work", "sleep"))
    figures = as_figures("generators", {"1": seconds}, {"1": before})
    assert figures["spent/generators/load"] == 0
    assert figures["spent/generators/sleep"] == pytest.approx(seconds["sleep"], abs=1e-3)
    assert figures["processes/generators"]["1"].keys() == {"sleep"}


def test_a_round_tells_processes_apart() -> None:
    before: dict[str, Seconds] = {"1": {"work": 5.0, "wait": 1.0}, "2": {"work": 4.0}}
    now: dict[str, Seconds] = {"1": {"work": 7.0, "wait": 1.5}, "2": {"work": 4.0}, "3": {"load": 2.0}}
    assert as_figures("scorers", now, before) == {
        **{"spent/scorers/work": 2.0, "spent/scorers/wait": 0.5, "spent/scorers/sleep": 0.0, "spent/scorers/load": 2.0},
        "processes/scorers": {"1": {"work": 2.0, "wait": 0.5}, "3": {"load": 2.0}},  # the second is gone
    }


def test_a_run_s_shares_are_those_of_its_rounds() -> None:
    one, other = {"work": 1.0, "wait": 2.0, "load": 1.0}, {"work": 1.0}
    assert added([one, other]) == {"work": 2.0, "wait": 2.0, "sleep": 0.0, "load": 1.0}  # type: ignore[list-item]
    rows = [{f"spent/scorers/{doing}": seconds for doing, seconds in spent.items()} for spent in (one, other)]
    shares = {"work": 0.4, "wait": 0.4, "sleep": 0.0, "load": 0.2}
    assert shares_of(rows) == {"scorers": shares}
    assert shares_of([{"loss": 1.0}]) == {}  # a run of an earlier version
