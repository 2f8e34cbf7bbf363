"""The bake-off: equal budgets, cells that go on where they ended, figures by hand, and a page of them."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kto_ray.bake_off import page, planning
from kto_ray.bake_off.methods import METHODS, TUNING_SEEDS
from kto_ray.bake_off.plain_loop import PlainLoop
from kto_ray.bake_off.planning import Cell, Results, best_setting, cells, require_known, tuning_cells, tuning_rates
from kto_ray.bake_off.running import rows_of
from kto_ray.bake_off.summary import curve_of, images_to, over_seeds, to_json, within_the_best
from kto_ray.bake_off.tasks import TASKS
from kto_ray.config import load
from kto_ray.errors import UserError
from kto_ray.storage import to_json as as_json


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_method_has_the_same_budget(task: str) -> None:
    """Of images and of optimizer steps; and draws as the others do."""
    configs = [Cell(task, method, 3).config() for method in METHODS]
    same = ("images_per_round", "steps", "guidance_scale", "scheduler", "batch_size")
    assert len({tuple(getattr(config.generate, name) for name in same) for config in configs}) == 1
    assert len({(config.rounds, config.optimizer_steps_per_round, config.seed) for config in configs}) == 1
    assert len({(config.train.global_batch, config.train.adapter) for config in configs}) == 1
    assert {config.train.objective.kind for config in configs} >= {"diffusion_kto", "sft", "csft", "dpo", "nft"}


def test_every_method_has_the_same_number_of_tuning_runs() -> None:
    assert len({len(method.candidates()) for method in METHODS.values()}) == 1
    planned = tuning_cells(METHODS)
    runs = Counter(cell.method for cell in planned)
    assert runs == dict.fromkeys(METHODS, len(METHODS["kto"].candidates()) * len(TUNING_SEEDS))
    assert len({cell.name for cell in planned}) == len(planned)
    assert not {cell.seed for cell in planned} & set(range(100))
    for cell in planned:
        cell.config()


def test_the_best_setting_is_so_in_the_mean_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "TUNING_SEEDS", (1000, 1001))
    results, planned = Results(tmp_path), tuning_cells(["sft"])
    assert len(planned) == 4
    for cell, rate in zip(planned, (0.9, 0.7, 0.3, 0.6), strict=True):
        results.write(cell, rows(0.5, rate))
    rates = tuning_rates(results)["sft"]
    assert rates == {planned[0].setting: [0.9, 0.3], planned[1].setting: [0.7, 0.6]}
    assert best_setting(rates) == planned[1].setting


def test_what_a_method_was_tuned_to_is_one_of_its_candidates() -> None:
    for method in METHODS.values():
        assert dict(method.tuned) in method.candidates(), method.name


def test_a_cell_is_done_until_its_configuration_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, cell = Results(tmp_path), Cell("follow", "sft", 0)
    assert results.read(cell) is None
    results.write(cell, [{"round": 0}])
    found = results.read(cell)
    assert found is not None
    assert found["rows"] == [{"round": 0}]
    monkeypatch.setitem(METHODS, "sft", METHODS["sft"].__class__(**vars(METHODS["sft"]) | {"tuned": {"gamma": 0.5}}))
    assert results.read(cell) is None


def test_fields_that_came_later_make_no_cell_undone(tmp_path: Path) -> None:
    results, cell = Results(tmp_path), Cell("follow", "sft", 0)
    results.write(cell, [{"round": 0}])
    path = tmp_path / "cells" / f"{cell.name}.json"
    written = json.loads(path.read_text())

    def rewritten(change: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
        changed = json.loads(json.dumps(written))
        change(changed["config"])
        path.write_text(json.dumps(changed))
        return results.read(cell)

    assert rewritten(lambda config: config["train"].pop("noise_draw"))
    assert rewritten(lambda config: config["train"]["adapter"].pop("alpha"))
    assert rewritten(lambda config: config["train"].update(own_noise=0.5)) is None
    assert rewritten(lambda config: config["train"].update(gone=1)) is None


def test_a_cut_cell_takes_no_whole_ones_place(tmp_path: Path) -> None:
    results, whole = Results(tmp_path), Cell("follow", "sft", 0)
    results.write(whole, [{"round": 12}])
    results.write(Cell("follow", "sft", 0, rounds=1), [{"round": 1}])
    found = results.read(whole)
    assert found is not None
    assert found["rows"] == [{"round": 12}]


def test_cells_go_seed_by_seed() -> None:
    planned = cells(["follow", "red"], ["kto", "sft"], [0, 1], 2)
    assert [cell.seed for cell in planned] == [0] * 4 + [1] * 4
    assert {cell.config().rounds for cell in planned} == {2}


def test_what_is_unknown_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--tasks: there is no 'fallow'; known: follow, rare"):
        require_known("--tasks", ["fallow"], TASKS)


def test_a_cell_runs_and_says_what_came_of_each_round() -> None:
    """One round of few images, of the method that needs most: pairs."""
    few = {"images_per_round": 24, "batch_size": 24, "steps": 2, "images_per_prompt": 6}
    method = METHODS["dpo"]
    cell = Cell("few", "dpo", 0, rounds=1)
    try:
        METHODS["dpo"] = method.__class__(**vars(method) | {"generate": few})
        base, first = rows_of(cell, every=1)
    finally:
        METHODS["dpo"] = method
    assert (base["round"], base["images"], first["round"], first["images"]) == (0, 0, 1, 24)
    for row in (base, first):
        assert 0 <= row["evaluation"]["pass_rate"]["value"] <= 1
        assert row["evaluation"]["scores"].keys() == {"shapes"}
        assert row["evaluation"]["diversity"] > 0
    json.loads(as_json([base, first]))


def test_flipped_verdicts_are_flipped_by_chance_and_always_the_same() -> None:
    config = load("shapes_demo")
    loops = [PlainLoop(config, flipped=share) for share in (0.2, 0.2, 0.0)]
    ids = [f"round-00000-{number:016x}" for number in range(500)]
    flipped = [[loop._is_flipped(sample_id) for sample_id in ids] for loop in loops]
    assert flipped[0] == flipped[1]
    assert 70 <= sum(flipped[0]) <= 130
    assert not any(flipped[2])


def test_images_to_a_goal_lie_between_two_evaluations() -> None:
    assert images_to(0.8, [0, 100, 200], [0.5, 0.7, 0.9]) == pytest.approx(150)
    assert images_to(0.5, [0, 100], [0.5, 0.7]) == 0
    assert images_to(0.95, [0, 100, 200], [0.5, 0.7, 0.9]) is None


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.7, 0.8, 0.9]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = over_seeds(values)
    assert (found.value, found.low, found.high, found.used) == pytest.approx((0.8, low, high, 3))
    assert math.isnan(over_seeds([0.5]).low)


def rows(*rates: float, watched: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "round": place,
            "images": 100 * place,
            "seconds": 10.0 * place,
            "evaluation": None
            if math.isnan(rate)
            else {
                "pass_rate": {"value": rate},
                "mean_score": {"value": rate},
                "diversity": 0.4,
                "scores": {"shapes": 0.5 - watched * place, "redness": 0.1},
            },
        }
        for place, rate in enumerate(rates)
    ]


def test_seeds_that_were_evaluated_at_other_rounds_meet_where_all_were() -> None:
    curve = curve_of("follow", "kto", {0: rows(0.5, 0.6, 0.8), 1: rows(0.5, math.nan, 0.9)})
    assert curve.images == [0, 200]
    assert curve.final.value == pytest.approx(0.85)


def test_a_curve_and_its_page() -> None:
    kto = curve_of("red", "kto", {0: rows(0.5, math.nan, 0.8, watched=0.1), 1: rows(0.6, math.nan, 0.9, watched=0.2)})
    assert kto.images == [0, 200]
    assert kto.final.value == pytest.approx(0.85)
    assert kto.to_goal == {"0.75": pytest.approx(200 * 0.2 / 0.3), "0.8": pytest.approx(200 * 0.25 / 0.3)}
    assert kto.lost is not None
    assert kto.lost.value == pytest.approx(-0.3)
    assert kto.seconds == 20
    sft = curve_of("red", "sft", {0: rows(0.5, math.nan, 0.1), 1: rows(0.6, math.nan, 0.12)})
    follow = curve_of("follow", "nft", {0: rows(0.5, math.nan, 0.7)})
    assert within_the_best(kto, [kto, sft])
    assert follow.lost is None

    curves, tuning = [kto, sft, follow], {"nft": {"objective.beta=1": [0.7, 0.72]}}
    assert "No method was tuned." in page.render(curves, {})
    text = page.render(curves, tuning)
    assert "on seed 1000, not among those below" in text
    for words in ("Likes red", "85.0 ± ", "objective.beta=1", "DiffusionNFT, binary", "shapes lost"):
        assert words in text
    table = page.markdown(curves)
    assert "| Diffusion-KTO, as in the paper | **85.0 ± " in table
    assert "Base: 50.0 %. 200 images; seeds 0." in table
    assert page.draw_curves(curves, "png").startswith(b"\x89PNG")
    found = json.loads(as_json(to_json(curves, tuning)))
    assert found["curves"][0]["final"]["value"] == pytest.approx(0.85)
    assert asdict(follow)["lost"] is None
