"""What is told to a cluster's monitoring, and that the dashboard asks for nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util import metrics

from kto_ray import telemetry
from kto_ray.telemetry import INSTRUMENTS, Durations, Instrument

ROOT = Path(__file__).parents[2]
BOARD = json.loads((ROOT / "deploy/grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_count", "_sum")}
"""What Prometheus sees behind a name, see tests/end_to_end/test_submit.py."""


def series(instrument: Instrument) -> set[str]:
    return {f"ray_{instrument.name}{suffix}" for suffix in SUFFIXES[instrument.kind]}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What Ray's metrics are given."""
    values: list[tuple[str, float, dict[str, str]]] = []

    def record(self: metrics.Metric, value: float, tags: dict[str, str]) -> None:
        self._validate_tags(tags)
        assert tags.keys() == set(self.info["tag_keys"])
        values.append((self.info["name"], value, tags))

    monkeypatch.setattr(metrics.Metric, "_record", record)
    monkeypatch.setattr(telemetry, "_run", "demo-1f0c93ab")
    return values


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    asked = {name for text in EXPRESSIONS for name in re.findall(r"ray_kto_ray_\w+", text)}
    assert asked <= set().union(*map(series, INSTRUMENTS))
    assert [i.name for i in INSTRUMENTS if not asked & series(i)] == []


def test_the_dashboard_asks_by_tags_that_there_are() -> None:
    known = {name: {"run", "le", *i.tags} for i in INSTRUMENTS for name in series(i)}
    for text in EXPRESSIONS:
        for name, selected in re.findall(r"(ray_kto_ray_\w+)\{([^}]*)\}", text):
            by = {tag.strip() for tags in re.findall(r"by \(([^)]*)\)", text) for tag in tags.split(",")}
            tags = set(re.findall(r"(\w+)=", selected)) | by
            assert tags <= known[name], text
            assert "run" in re.findall(r"(\w+)=", selected), text


def test_the_dashboard_can_be_imported() -> None:
    """Grafana wants panels of different ids that do not lie on each other; the rest is read by every version."""
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert {variable["name"] for variable in BOARD["templating"]["list"]} == {"datasource", "run"}


def test_every_metric_is_said_in_the_documentation() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    for instrument in INSTRUMENTS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{instrument.name}` |"))
        assert set(instrument.tags) == set(re.findall(r"`(\w+)`", row.split("|")[3]))


def test_names_are_what_prometheus_takes() -> None:
    names = [instrument.name for instrument in INSTRUMENTS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"kto_ray_[a-z]+(_[a-z]+)*", name) for name in names)
    assert all(i.name.endswith("_seconds") for i in INSTRUMENTS if isinstance(i, Durations))


def test_a_row_is_told_as_figures_and_as_seconds_spent(told: list[tuple[str, float, dict[str, str]]]) -> None:
    row: dict[str, Any] = {
        **{"kind": "round", "round": 3, "step": 3, "time": 1e9, "labeler": {"a": 1}, "lost": None, "odd": float("nan")},
        **{"pass_rate": 0.5, "objective/z": -0.1, "spent/scorers/wait": 4.0, "spent/scorers/load": 0.0},
    }
    telemetry.tell_figures("round", row)
    run = {"run": "demo-1f0c93ab"}
    assert told == [
        ("kto_ray_figure", 0.5, run | {"kind": "round", "figure": "pass_rate"}),
        ("kto_ray_figure", -0.1, run | {"kind": "round", "figure": "objective/z"}),
        ("kto_ray_spent_seconds", 4.0, run | {"role": "scorers", "doing": "wait"}),
    ]


def test_what_did_not_happen_is_not_counted(told: list[tuple[str, float, dict[str, str]]]) -> None:
    telemetry.IMAGES.add(0, stage="round", outcome="failed")
    assert told == []
    telemetry.DRAW_SECONDS.observe(0.0)
    assert [value for _, value, _ in told] == [0.0]


def test_a_process_without_ray_goes_on() -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        telemetry.tell_figures("round", {name: value})
