"""The charts of a report: columns of figures in, SVG data URIs for both colour schemes out; and figures in words.

`plots.py` lists them, section by section; `draw` makes one. matplotlib without pyplot, so nothing global is left
behind. Each chart is drawn once, in light colours: its dark twin is the same SVG with the colours exchanged.

Shape suffix: R rounds.
"""

import base64
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kto_ray.evaluate.plots import BLUE, GRAY, GREEN, GRID, INK, MUTED, ORANGE, PALE, PURPLE, RED, Plot
from kto_ray.evaluate.statistics import EvaluationSummary, Interval

Row = Mapping[str, Any]

MISSING = "\N{EN DASH}"
UNIT = "\N{NARROW NO-BREAK SPACE}%"

IN_THE_DARK = {
    **{INK: "#e3e6ea", MUTED: "#9aa4af", GRID: "#343b43"},
    **{GREEN: "#4cc39d", ORANGE: "#f0a05a", BLUE: "#6cb6f5", PURPLE: "#b79cf0"},
    **{RED: "#ff8a80", GRAY: "#7d8791", PALE: "#4a525b"},
}
STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))  # of the lines of a chart: told apart without colour, too
HATCHES = {RED: "//////", PALE: "\\\\\\"}


@dataclass(frozen=True)
class Chart:
    """A drawn `Plot`: SVG data URIs for both colour schemes, and its figures in words."""

    title: str
    note: str
    alt: str
    light: str
    dark: str


def draw(plot: Plot, rounds: Sequence[Row], evaluations: Sequence[EvaluationSummary]) -> Chart | None:
    """None when no round (and no evaluation, if the plot shows them) has any of the plot's figures."""
    figure = Figure(figsize=plot.inches, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    x_R, bottom_R = _column(rounds, plot.x), np.zeros(len(rounds))
    said = []

    def say(label: str, values: npt.NDArray[np.float64]) -> None:
        known = values[np.isfinite(values)]
        if not len(known):
            return
        show = percent if plot.share else number
        said.append(f"{label} {show(float(known[0]))}" + (f" to {show(float(known[-1]))}" if len(known) > 1 else ""))

    if plot.held_out and evaluations:
        versions = np.array([evaluation.policy_version for evaluation in evaluations])
        intervals: list[Interval] = [getattr(evaluation, plot.held_out) for evaluation in evaluations]
        value, low, high = np.array([(i.value, i.low, i.high) for i in intervals]).T
        axes.fill_between(versions, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.vlines(versions, low, high, color=BLUE, linewidth=1)
        axes.plot(versions, value, "D-", color=BLUE, markersize=4.5, linewidth=1.8, label="held-out prompts")
        say("held-out prompts", value)
    for (key, label, color), (marker, line) in zip(plot.columns, itertools.cycle(STYLES), strict=False):
        y_R = _column(rounds, key)
        if not np.isfinite(x_R + y_R).any() or (plot.stacked and not np.nansum(y_R)):
            continue
        if plot.stacked:
            axes.bar(x_R, np.nan_to_num(y_R), bottom=bottom_R, color=color, label=label, edgecolor=MUTED, linewidth=0,
                     hatch=HATCHES.get(color))  # fmt: skip
            bottom_R += np.nan_to_num(y_R)
        else:
            axes.plot(x_R, y_R, marker + line, color=color, markersize=3.5, linewidth=1.6, label=label)
        say(label, y_R)
    if not said:
        return None
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel("round" if plot.x == "round" else "policy version (0 is the base)", color=MUTED, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if plot.share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    elif plot.at_least is not None:
        axes.set_ylim(-0.05 * plot.at_least, max(1.05 * plot.at_least, axes.get_ylim()[1]))
    if len(said) > 1:
        columns = _columns_that_fit(axes, plot)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), ncols=columns, frameon=False, fontsize=8.5,
                    labelcolor=INK, handlelength=1.7, handletextpad=0.5, columnspacing=1.1)  # fmt: skip
    buffer = io.StringIO()
    # The same run gives the same page, on whatever machine and with whatever fonts it is opened.
    with matplotlib.rc_context({"svg.hashsalt": "kto-ray", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    light = buffer.getvalue()
    dark = re.sub("#[0-9a-f]{6}", lambda found: IN_THE_DARK.get(found[0], found[0]), light)
    svg = "image/svg+xml"
    return Chart(plot.title, plot.note, "; ".join(said), data_uri(svg, light.encode()), data_uri(svg, dark.encode()))


def _columns_that_fit(axes: Axes, plot: Plot) -> int:
    """Columns of a legend above the axes; each is as wide as its longest label, and 5 letters more for the line."""
    lengths, room = [len(label) for label in axes.get_legend_handles_labels()[1]], 13 * plot.inches[0]

    def width(columns: int) -> int:
        return sum(5 + int(column.max()) for column in np.array_split(lengths, columns))

    return next((columns for columns in range(len(lengths), 1, -1) if width(columns) <= room), 1)


def _column(rounds: Sequence[Row], key: str) -> npt.NDArray[np.float64]:
    return np.array([row.get(key) for row in rounds], dtype=np.float64)  # None becomes NaN, which is drawn as a gap


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def percent(share: float) -> str:
    """For instance "86 %"; one decimal close to 0 and 1, where rounding would claim none or all."""
    if math.isnan(share):
        return MISSING
    decimals = 1 if 0 < min(share, 1 - share) < 0.01 else 0
    return f"{share * 100:.{decimals}f}{UNIT}"


def number(value: Any) -> str:
    """Three significant digits of a float; a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percents(interval: Interval) -> str:
    """The bounds of an interval of shares, with the unit once."""
    if math.isnan(interval.low):
        return "no interval"
    low, high = percent(interval.low), percent(interval.high)
    return f"{low.split(UNIT)[0]}\N{EN DASH}{high}"


def numbers(interval: Interval) -> str:
    return "no interval" if math.isnan(interval.low) else f"{number(interval.low)} to {number(interval.high)}"


def points(interval: Interval | None) -> str:
    """A difference of shares in percentage points, with its bounds."""
    if interval is None:
        return MISSING
    bounds = "no interval" if math.isnan(interval.low) else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
    return f"{100 * interval.value:+.1f} ({bounds})"


def signed(value: float) -> str:
    return f"{value:+.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
