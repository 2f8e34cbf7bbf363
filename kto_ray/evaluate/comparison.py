"""Several runs side by side, held-out figures over images drawn: rows of `metrics.jsonl` in, table, chart and page out.

`cli_compare.py` reads the runs and shows it. Figures are comparable where runs have the same held-out prompts and bar;
whether they do is for whoever compares to know.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kto_ray.evaluate.charts import MISSING, STYLES, Row, data_uri, number, numbers, percent, percents
from kto_ray.evaluate.plots import BLUE, GRAY, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, RED
from kto_ray.evaluate.statistics import Interval

COLORS = (GREEN, ORANGE, BLUE, PURPLE, RED, GRAY)
DRAWN = ("desirable", "undesirable", "abstained", "failed", "pending")
"""Columns of a round's row that add up to its images."""
FIGURES: dict[str, tuple[str, bool]] = {
    "pass_rate": ("pass rate", True),
    "win_rate": ("win rate vs base", True),
    "mean_score": ("mean score", False),
}
"""Title, and whether it is a share."""


@dataclass(frozen=True)
class Point:
    """One evaluation of one run.

    Args:
        images: that were drawn to train the policy, and all before it.
        figures: by name, as `FIGURES` has them, and "score/NAME" of each scorer.
    """

    run: str
    policy: int
    images: int
    figures: Mapping[str, Interval]

    def as_row(self) -> dict[str, Any]:
        """Flat, for programs: each figure with its low and high end, where these are known."""
        row: dict[str, Any] = {"run": self.run, "policy": self.policy, "images": self.images}
        for name, interval in self.figures.items():
            row[name] = interval.value
            if not math.isnan(interval.low):
                row |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        return row


def points_of(run: str, rounds: Sequence[Row], evaluations: Sequence[Row]) -> list[Point]:
    """One an evaluation, in the order of the policies."""
    images = [0, *itertools.accumulate(sum(row.get(name) or 0 for name in DRAWN) for row in rounds)]
    return [
        Point(run, int(row["step"]), images[min(int(row["step"]), len(rounds))], _figures(row))
        for row in sorted(evaluations, key=lambda row: int(row["step"]))
    ]


def _figures(row: Row) -> dict[str, Interval]:
    def end(name: str) -> float:
        return math.nan if row.get(name) is None else float(row[name])

    names = [name for name in row if name in FIGURES or name.startswith("score/")]
    return {
        name: Interval(float(row[name]), end(f"{name}_low"), end(f"{name}_high"))
        for name in names
        if row[name] is not None
    }


def figure_names(points: Sequence[Point]) -> list[str]:
    """Of all figures that any point has; those of `FIGURES` come first."""
    there = {name for point in points for name in point.figures}
    return [*(name for name in FIGURES if name in there), *sorted(there - FIGURES.keys())]


def shown(point: Point, name: str) -> str:
    """A figure in words, with its interval, where that is known."""
    interval = point.figures.get(name)
    if interval is None:
        return MISSING
    share = name in FIGURES and FIGURES[name][1]
    value = percent(interval.value) if share else number(interval.value)
    if math.isnan(interval.low):
        return value
    return f"{value} ({percents(interval) if share else numbers(interval)})"


def chart(points: Sequence[Point], kind: Literal["svg", "png"]) -> bytes:
    """A panel a figure of `FIGURES` that is known, over images drawn; the band is the 95 % interval."""
    names = [name for name in figure_names(points) if name in FIGURES] or figure_names(points)[:1]
    figure = Figure(figsize=(4.6 * max(1, len(names)), 3.4), layout="constrained")
    runs = list(dict.fromkeys(point.run for point in points))
    for name, axes in zip(names, figure.subplots(1, max(1, len(names)), squeeze=False).flat, strict=False):
        title, share = FIGURES.get(name, (name, False))
        for place, run in enumerate(runs):
            known = [(p.images, p.figures[name]) for p in points if p.run == run and name in p.figures]
            if not known:
                continue
            images = [at for at, _ in known]
            color, (marker, line) = COLORS[place % len(COLORS)], STYLES[place % len(STYLES)]
            value, low, high = np.array([(i.value, i.low, i.high) for _, i in known]).T
            axes.fill_between(images, low, high, color=color, alpha=0.12, linewidth=0)
            axes.plot(images, value, marker + line, color=color, markersize=4, label=run)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("images drawn", fontsize=9, color=MUTED)
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def page(points: Sequence[Point]) -> str:
    """One self-contained HTML page: the chart and the table."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("kto_ray.evaluate") / "compare.html.j2").read_text("utf-8"))
    names = figure_names(points)
    return template.render(
        chart=data_uri("image/svg+xml", chart(points, "svg")),
        titles=[FIGURES.get(name, (name, False))[0] for name in names],
        rows=[(point, [shown(point, name) for name in names]) for point in points],
    )
