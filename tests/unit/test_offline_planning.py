"""What of a source is in a set, what is left out and why, and which shards are made of it."""

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pytest

from kto_ray.data.held_out import Apart
from kto_ray.offline import planning
from kto_ray.offline.listing import LISTED
from kto_ray.offline.planning import CONTRARY, HELD_OUT, NO_VERDICT, ONCE, SetPlan, plan_set


def image(id_: str, **more: Any) -> dict[str, Any]:
    row = {
        "id": id_,
        "prompt": f"prompt {id_}",
        "desirable": True,
        "content": f"sha of {id_}",
        "height": 40,
        "width": 40,
    }
    return row | more


def plan(
    *parts: Sequence[dict[str, Any]], held_out: Collection[str] = (), encoded: Collection[str] = (), **more: Any
) -> SetPlan:
    lists = [pa.Table.from_pylist(list(rows), LISTED) for rows in parts]
    settings = {"size": (32, 32), "multiple": 8, "resize": "crop"} | more
    return plan_set(lists, held_out=Apart(held_out), encoded=set(encoded), **settings)


def left_out(planned: SetPlan) -> dict[str, str]:
    return {row["id"]: row["why"] for row in planned.left_out.to_pylist()}


def test_what_is_no_image_has_no_verdict_or_is_held_out_is_left_out_with_its_reason() -> None:
    broken = image("broken", content=None, height=None, width=None, why="the file is empty")
    planned = plan(
        [image("a"), broken, image("b", desirable=None)],
        [image("c", prompt="A  Held OUT prompt"), image("d", desirable=False)],
        held_out=["a held out prompt"],
    )
    assert left_out(planned) == {"broken": "the file is empty", "b": NO_VERDICT, "c": HELD_OUT}
    assert planned.rows["id"].to_pylist() == ["a", "d"]
    assert planned.rows["desirable"].to_pylist() == [True, False]
    assert [(row["part"], row["row"], row["content"]) for row in planned.to_encode.to_pylist()] == [
        (0, 0, "sha of a"),
        (1, 1, "sha of d"),
    ]


def test_of_equal_images_with_one_prompt_the_majority_says() -> None:
    def vote(id_: str, yes: bool, prompt: str = "one") -> dict[str, Any]:
        return image(id_, content="same", prompt=prompt, desirable=yes)

    planned = plan(
        [vote("a", False), vote("b", True), vote("c", True), vote("d", True, "two"), vote("e", False, "two")],
        [vote("f", False, "three"), vote("g", None, "three")],  # type: ignore[arg-type]
    )
    assert left_out(planned) == {"b": ONCE, "c": ONCE, "e": ONCE, "d": CONTRARY, "g": NO_VERDICT}
    assert planned.rows.select(["id", "desirable"]).to_pylist() == [
        {"id": "a", "desirable": True},
        {"id": "f", "desirable": False},
    ]
    assert planned.to_encode["content"].to_pylist() == ["same"]  # one image, whatever its prompts


def test_what_is_encoded_already_is_not_encoded_again() -> None:
    planned = plan([image("a"), image("b")], encoded=["sha of a", "sha of others"])
    assert planned.rows["id"].to_pylist() == ["a", "b"]
    assert planned.to_encode["content"].to_pylist() == ["sha of b"]


def test_shards_are_of_one_part_and_size_and_named_after_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_IMAGES", 2)
    tall = {"height": 80, "width": 40}
    parts = [image("a"), image("b", **tall), image("c"), image("d")], [image("e"), image("f", **tall)]
    planned = plan(*parts, resize="buckets")
    shards: dict[str, list[str]] = {}
    for row in planned.to_encode.to_pylist():
        shards.setdefault(row["shard"], []).append(row["content"][-1])
        assert (row["height"], row["width"]) == ((40, 24) if row["content"][-1] in "bf" else (32, 32))
    assert sorted(shards.values()) == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]
    assert plan(*parts, resize="buckets").to_encode.equals(planned.to_encode)
    cropped = plan(*parts)
    assert set(cropped.rows["height"].to_pylist()) == {32}


def test_a_source_of_nothing_has_an_empty_plan() -> None:
    planned = plan([])
    assert planned.rows.num_rows == planned.left_out.num_rows == planned.to_encode.num_rows == 0
