"""Curves as SVG: the report's charts (`evaluate/plots.py`), laid out for a template instead of drawn.

A page that asks every few seconds must cost little, and its colours are the style sheet's, in light and dark. So this
gives positions, and classes for colours; `templates/curves.html.j2` writes the elements.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from kto_ray.evaluate.charts import number, percent
from kto_ray.evaluate.plots import BLUE, GRAY, GREEN, INK, MUTED, ORANGE, PALE, PURPLE, RED, Plot

Row = Mapping[str, Any]
Show = Callable[[float], str]
At = Callable[[float], float]
"""Where a value lies."""

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26
CLASSES = {
    **{GREEN: "green", ORANGE: "orange", BLUE: "blue", PURPLE: "purple", RED: "red", GRAY: "gray", PALE: "pale"},
    **{INK: "ink", MUTED: "gray"},
}
RUNS = ("blue", "orange", "green", "purple", "red", "gray")
"""Colours of several runs; a seventh begins anew."""


@dataclass(frozen=True)
class Series:
    """Points of one line, in order; y is None where there is a gap. `low` and `high` make a band around it."""

    label: str
    color: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Dot:
    """`says` is what a pointer that rests on it reads."""

    x: float
    y: float
    says: str


@dataclass(frozen=True)
class Line:
    """`path` and `band` are SVG paths, empty where there is none; `last`: its last figure, in words."""

    label: str
    color: str
    path: str
    band: str
    dots: Sequence[Dot]
    last: str


@dataclass(frozen=True)
class Bar:
    """A part of a stacked column."""

    color: str
    x: float
    y: float
    width: float
    height: float
    says: str


@dataclass(frozen=True)
class SvgChart:
    """A chart, in units of a box of WIDTH x HEIGHT; ticks are (position, text)."""

    title: str
    note: str
    x_label: str
    lines: Sequence[Line]
    bars: Sequence[Bar]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    alt: str


def curves_of(plots: Iterable[Plot], rounds: Sequence[Row], evaluations: Sequence[Row]) -> list[SvgChart]:
    """One for each plot of which there is something to show."""
    return [curve for plot in plots if (curve := _of_plot(plot, rounds, evaluations))]


def _of_plot(plot: Plot, rounds: Sequence[Row], evaluations: Sequence[Row]) -> SvgChart | None:
    series = [of_rows(rounds, key, label, CLASSES[color], plot.x) for key, label, color in plot.columns]
    if plot.held_out:
        series.insert(0, held_out(evaluations, plot.held_out, "held-out prompts", "blue"))
    x_label = "round" if plot.x == "round" else "policy (0 is the base)"
    return laid_out(plot.title, plot.note, x_label, series, plot.share, plot.stacked, plot.at_least or 0)


def of_rows(rounds: Sequence[Row], key: str, label: str, color: str, x: str = "step") -> Series:
    """A figure of rounds."""
    return Series(label, color, [(float(row[x]), _value(row, key)) for row in rounds if row.get(x) is not None])


def held_out(evaluations: Sequence[Row], name: str, label: str, color: str) -> Series:
    """A figure of evaluations with its interval, by the policy."""
    known = [row for row in evaluations if row.get(f"{name}_low") is not None and row.get(f"{name}_high") is not None]
    return Series(
        label,
        color,
        [(float(row["step"]), _value(row, name)) for row in evaluations],
        [(float(row["step"]), float(row[f"{name}_low"]), float(row[f"{name}_high"])) for row in known],
    )


def _value(row: Row, key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def laid_out(
    title: str,
    note: str,
    x_label: str,
    series: Sequence[Series],
    share: bool = False,
    stacked: bool = False,
    at_least: float = 0,
) -> SvgChart | None:
    """None when no series has a figure."""
    series = [one for one in series if any(y is not None for _, y in one.points)]
    if stacked:
        series = [one for one in series if any(y for _, y in one.points)]
    if not series:
        return None
    xs = [x for one in series for x, y in one.points if y is not None]
    if stacked:
        totals: dict[float, float] = {}
        for one in series:
            for x, y in one.points:
                totals[x] = totals.get(x, 0) + (y or 0)
        ys = [0.0, *totals.values()]
    else:
        ys = [y for one in series for _, y in one.points if y is not None]
        ys += [edge for one in series for _, low, high in one.band for edge in (low, high)]
    low, high = (0.0, 1.0) if share else (min(ys), max(ys, default=0.0))
    if at_least:
        low, high = min(0.0, low), max(at_least, high)
    if high - low < 1e-12:
        low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    y_values = [0.0, 0.5, 1.0] if share else [float(y) for y in MaxNLocator(4).tick_values(low, high)]
    if not share:
        low, high = min(low, *y_values[1:-1]), max(high, *y_values[1:-1])
    first, last = min(xs), max(xs)
    room = 0.5 if stacked else 0.0
    span = max(last - first + 2 * room, 1e-9 if stacked else 1.0)

    def at_x(x: float) -> float:
        return round(LEFT + (x - first + room) / span * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    show = percent if share else number
    steps = [int(x) for x in MaxNLocator(6, integer=True).tick_values(first, last) if first <= x <= last]
    return SvgChart(
        title=title,
        note=note,
        x_label=x_label,
        lines=[_line(one, at_x, at_y, show, x_label, stacked) for one in series],
        bars=_bars(series, at_x, at_y) if stacked else (),
        x_ticks=[(at_x(x), str(x)) for x in steps],
        y_ticks=[(at_y(y), percent(y) if share else f"{y:.4g}") for y in y_values if low <= y <= high],
        alt="; ".join(f"{one.label} {_said(one, show)}" for one in series),
    )


def _said(series: Series, show: Show) -> str:
    known = [y for _, y in series.points if y is not None]
    return show(known[0]) + (f" to {show(known[-1])}" if len(known) > 1 else "")


def _line(series: Series, at_x: At, at_y: At, show: Show, x_label: str, stacked: bool) -> Line:
    known = [(x, y) for x, y in series.points if y is not None]
    path, pen = [], "M"
    for x, y in () if stacked else series.points:
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{at_x(x)} {at_y(y)}")
        pen = "L"
    word = x_label.partition(" ")[0]
    dots = [Dot(at_x(x), at_y(y), f"{series.label}, {word} {x:g}: {show(y)}") for x, y in known]
    edge = [(x, high) for x, _, high in series.band] + [(x, low) for x, low, _ in reversed(series.band)]
    band = "M" + "L".join(f"{at_x(x)} {at_y(y)}" for x, y in edge) + "Z" if len(series.band) > 1 else ""
    return Line(series.label, series.color, "".join(path), band, () if stacked else dots, show(known[-1][1]))


def _bars(series: Sequence[Series], at_x: At, at_y: At) -> list[Bar]:
    floors: dict[float, float] = {}
    bars = []
    for one in series:
        for x, y in one.points:
            if not y:
                continue
            floor = floors.get(x, 0.0)
            floors[x] = floor + y
            left, right = at_x(x - 0.4), at_x(x + 0.4)
            top, bottom = at_y(floor + y), at_y(floor)
            says = f"round {x:g}: {y:.3g} {one.label}"
            bars.append(Bar(one.color, left, top, max(0.5, round(right - left, 1)), round(bottom - top, 1), says))
    return bars
