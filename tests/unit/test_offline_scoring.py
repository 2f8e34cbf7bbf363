"""Verdicts and filters of labelled images by scorers: which images are scored, and what becomes of their scores."""

import json
from typing import Any

import pyarrow as pa
import pytest

from kto_ray.config import RunConfig, load
from kto_ray.data.held_out import Apart
from kto_ray.errors import UserError
from kto_ray.offline import planning
from kto_ray.offline.listing import LISTED
from kto_ray.offline.planning import plan_scoring
from kto_ray.offline.scoring import UNREADABLE, judged
from kto_ray.prepared import sample_id
from kto_ray.records import Score

FILTERS = "data.filters={nsfw: {scorer: redness, at_most: 0.5}, sharp: {scorer: jpeg_size, at_least: 1}}"


def image(id_: str, **more: Any) -> dict[str, Any]:
    row = {"id": id_, "prompt": f"prompt {id_}", "desirable": None, "content": f"sha of {id_}"}
    return row | {"height": 40, "width": 40} | more


def lists(*parts: list[dict[str, Any]]) -> list[pa.Table]:
    return [pa.Table.from_pylist(rows, LISTED) for rows in parts]


def config(*overrides: str) -> RunConfig:
    return load("shapes_offline", ["data.score=missing", *overrides])


def scores_of(**values: dict[str, float | None]) -> dict[str, dict[str, Score]]:
    found = {}
    for id_, by_scorer in values.items():
        name = sample_id(f"sha of {id_}", f"prompt {id_}")
        found[name] = {
            scorer: Score(name, scorer, "1", value, None if value is not None else "no answer")
            for scorer, value in by_scorer.items()
        }
    return found


@pytest.mark.parametrize(
    ("also_with", "also_without", "expected"),
    [(False, True, ["a", "d"]), (True, False, ["b"]), (True, True, ["a", "b", "d"])],
)
def test_each_image_and_prompt_is_scored_once_where_it_is_asked_for(
    also_with: bool, also_without: bool, expected: list[str]
) -> None:
    first = [image("a"), image("b", desirable=True), image("broken", content=None, why="the file is empty")]
    second = [image("again", content="sha of a", prompt="prompt a"), image("c", prompt="Held  out"), image("d")]
    plan = plan_scoring(
        lists(first, second),
        *((32, 32), 8, "crop", Apart(["held out"])),
        also_with_verdict=also_with,
        also_without=also_without,
    )
    assert [content.removeprefix("sha of ") for content in plan["content"].to_pylist()] == expected
    assert set(plan["height"].to_pylist()) == {32}


def test_an_image_is_scored_with_each_of_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_IMAGES", 2)
    rows = [image(str(n), content="same") for n in range(3)]
    plan = plan_scoring(
        lists(rows), (32, 32), 8, "crop", Apart(), also_with_verdict=False, also_without=True
    ).to_pylist()
    assert [row["row"] for row in plan] == [0, 1, 2]
    assert plan[0]["shard"] == plan[1]["shard"] != plan[2]["shard"]


def test_verdicts_are_those_of_label_and_scores_stay() -> None:
    (rows,) = judged(
        lists([image("a"), image("b", metadata='{"likes": 3}'), image("c", desirable=False, who="ann"), image("d")]),
        scores_of(a={"shapes": 0.2}, b={"shapes": 0.5}, d={"shapes": None}),
        config(),
    )
    a, b, c, d = rows.to_pylist()
    assert (a["desirable"], b["desirable"], c["desirable"], d["desirable"]) == (False, True, False, None)
    assert (a["who"], c["who"]) == ("threshold", "ann")
    assert json.loads(b["metadata"]) == {
        "likes": 3,
        "scores": {"shapes": 0.5},
        "rule": "absolute@1(value=0.5, dead_band=0): shapes >= 0.5",
    }
    assert (a["why"], c["metadata"]) == (None, None)
    assert d["why"] == "it could not be scored: no score of shapes: no answer"


def test_all_may_be_judged_and_by_each_other() -> None:
    """A quantile is one of the whole set, as it is one of a round."""
    values = {name: {"shapes": n / 10} for n, name in enumerate("abcd")}
    rows = [image(name, desirable=n % 2 == 0) for n, name in enumerate("abcd")]
    settings = config("data.score=all", "label.threshold={kind: round_quantile, quantile: 0.5}")
    first, second = judged(lists(rows[:3], rows[3:]), scores_of(**values), settings)
    assert first["desirable"].to_pylist() + second["desirable"].to_pylist() == [False, False, True, True]


def test_filters_leave_out_what_passes_not_or_cannot_be_scored() -> None:
    values = {
        "a": {"nsfw": 0.5, "sharp": 1.0},
        "b": {"nsfw": 0.51, "sharp": 1.0},
        "c": {"nsfw": 0.1, "sharp": 0.9},
        "d": {"nsfw": None, "sharp": 1.0},
    }
    rows = [image(name, desirable=True) for name in "abcd"]
    settings = config("data.score=none", FILTERS)
    (found,) = judged(lists(rows), scores_of(**values), settings)
    assert found["why"].to_pylist() == [
        None,
        "a filter leaves it out: its score by nsfw is above 0.5",
        "a filter leaves it out: its score by sharp is below 1",
        "it could not be scored: no score of nsfw: no answer",
    ]
    assert found["desirable"].to_pylist() == [True] * 4
    assert json.loads(found["metadata"][0].as_py()) == {"scores": {"nsfw": 0.5, "sharp": 1.0}}


def test_what_is_damaged_below_its_head_says_so() -> None:
    scores = {"sha of a": {UNREADABLE: Score("sha of a", UNREADABLE, "", None, "the file is damaged: truncated")}}
    (found,) = judged(lists([image("a")]), scores, config())
    assert found["why"].to_pylist() == ["the file is damaged: truncated"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.score=some"], "data.score"),
        (["data.filters={nsfw: {}}"], "data.filters.nsfw: give at_least, at_most, or both"),
        (["data.filters={nsfw: {at_least: 2, at_most: 1}}"], r"at_least \(2\) is above at_most \(1\)"),
        (["data.filters={shapes: {at_least: 0}}"], "data.filters and label.scorers both have 'shapes'"),
        (["label.labeler=human", "label.scorers.shapes.held_out=true"], "names none that is not held_out"),
    ],
)
def test_what_cannot_be_asked_of_scorers_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(*overrides)
