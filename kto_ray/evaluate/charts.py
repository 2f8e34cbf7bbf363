"""The charts of a report: columns of figures in, SVG data URIs for both colour schemes out; and figures in words.

`PLOTS` lists them, section by section; `draw` makes one. matplotlib without pyplot, so nothing global is left behind.
Each chart is drawn once, in light colours: its dark twin is the same SVG with the colours exchanged.

Shape suffix: R rounds.
"""

import base64
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kto_ray.evaluate.statistics import EvaluationSummary, Interval

Row = Mapping[str, Any]

MISSING = "\N{EN DASH}"
UNIT = "\N{NARROW NO-BREAK SPACE}%"

INK, MUTED, GRID = "#24292f", "#68707a", "#e2e5e9"
GREEN, ORANGE, BLUE, PURPLE = "#1b7f62", "#d0731f", "#1f6fb2", "#7a52b3"
RED, GRAY, PALE = "#b42318", "#98a1ab", "#ccd3da"
IN_THE_DARK = {
    **{INK: "#e3e6ea", MUTED: "#9aa4af", GRID: "#343b43"},
    **{GREEN: "#4cc39d", ORANGE: "#f0a05a", BLUE: "#6cb6f5", PURPLE: "#b79cf0"},
    **{RED: "#ff8a80", GRAY: "#7d8791", PALE: "#4a525b"},
}
STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))  # of the lines of a chart: told apart without colour, too
HATCHES = {RED: "//////", PALE: "\\\\\\"}


@dataclass(frozen=True)
class Plot:
    """A chart of some columns of `rounds`, each (key, label, colour); `note` says how to read it.

    `held_out` names the interval of the evaluations to lay over them; the y axis runs from 0 to `at_least` or higher.
    """

    title: str
    note: str
    columns: tuple[tuple[str, str, str], ...]
    x: Literal["round", "policy_version"] = "round"
    stacked: bool = False
    share: bool = False
    held_out: Literal["pass_rate", "mean_score"] | None = None
    at_least: float | None = None
    inches: tuple[float, float] = (4.0, 2.4)


@dataclass(frozen=True)
class Chart:
    """A drawn `Plot`: SVG data URIs for both colour schemes, and its figures in words."""

    title: str
    note: str
    alt: str
    light: str
    dark: str


SMALL = (3.2, 2.1)
PLOTS: dict[str, tuple[Plot, ...]] = {
    "progress": (
        Plot(
            "Share that passes",
            "By the policy that drew the images; the band is the 95 % interval.",
            (("pass_rate", "trained prompts", ORANGE),),
            x="policy_version",
            share=True,
            held_out="pass_rate",
        ),
        Plot(
            "Mean score",
            "The same images, before the threshold.",
            (("score_mean", "trained prompts", ORANGE),),
            x="policy_version",
            held_out="mean_score",
        ),
    ),
    "feedback": (
        Plot(
            "Verdicts",
            "The images of each round, by what became of them.",
            (
                ("desirable", "desirable", GREEN),
                ("undesirable", "undesirable", ORANGE),
                ("abstained", "abstained", GRAY),
                ("failed", "failed", RED),
                ("pending", "pending", PALE),
            ),
            stacked=True,
        ),
        Plot(
            "Policy lag",
            "Version trained minus version that drew the images, mean; 0 is strictly on-policy.",
            (("policy_lag_mean", "policy lag", BLUE),),
            at_least=1,
        ),
    ),
    "people": (
        Plot(
            "Verdicts of people",
            "Images judged in each round; late ones were drawn for an earlier one.",
            (("people/judged", "judged", BLUE), ("people/late", "of these late", ORANGE)),
            inches=SMALL,
        ),
        Plot(
            "Agreement",
            "Of people on the same images: share, and Krippendorff's alpha, which is 0 for what chance gives.",
            (("people/agreement", "agree", GREEN), ("people/alpha", "alpha", PURPLE)),
            inches=SMALL,
        ),
        Plot("Seconds an answer", "Median.", (("people/seconds", "seconds", BLUE),), inches=SMALL),
    ),
    "objective": (
        Plot(
            "Implicit reward g",
            "Above 0, the policy explains an image better than the reference does. Both classes far below 0: collapse.",
            (
                ("objective/g_desirable", "desirable", GREEN),
                ("objective/g_undesirable", "undesirable", ORANGE),
                ("objective/z", "z", MUTED),
            ),
            inches=SMALL,
        ),
        Plot(
            "g by noise level",
            "By quarters of the noise range.",
            (
                ("objective/g_noise_0", "cleanest", BLUE),
                ("objective/g_noise_1", "2", GREEN),
                ("objective/g_noise_2", "3", ORANGE),
                ("objective/g_noise_3", "noisiest", RED),
            ),
            inches=SMALL,
        ),
        Plot(
            "What sets the classes apart, by noise level",
            "g of desirable minus g of undesirable images, by quarters of the noise range.",
            tuple(
                (f"objective/gap_noise_{part}", label, color)
                for part, (label, color) in enumerate(
                    (("cleanest", BLUE), ("2", GREEN), ("3", ORANGE), ("noisiest", RED))
                )
            ),
            inches=SMALL,
        ),
        Plot(
            "Agreement and saturation",
            "Samples whose g - z has the sign of their verdict; samples with |β (g - z)| > 4, which are mute.",
            (("objective/accuracy", "agree", GREEN), ("objective/saturated", "saturated", RED)),
            share=True,
            inches=SMALL,
        ),
        Plot("Margin", "Mean |β (g - z)|; 0.5 to 2 is healthy.", (("objective/margin", "margin", BLUE),), inches=SMALL),
        Plot("Loss", "Mean over the samples.", (("objective/loss", "loss", BLUE),), inches=SMALL),
        Plot("Gradient norm", "Mean over the steps.", (("objective/gradient_norm", "norm", BLUE),), inches=SMALL),
    ),
    "seconds": (
        Plot(
            "Seconds of each round",
            "Idle is what the roles leave of the round's wall clock; roles that overlap reach beyond it.",
            (
                ("seconds/generate", "generate", BLUE),
                ("seconds/label", "label", ORANGE),
                ("seconds/train", "train", GREEN),
                ("seconds/publish", "publish", PURPLE),
                ("seconds/evaluate", "evaluate", GRAY),
                ("seconds/idle", "idle", PALE),
            ),
            stacked=True,
        ),
    ),
}


def opinion_plots(scorers: Mapping[str, bool]) -> tuple[Plot, ...]:
    """Second opinions: every scorer on one scale (name -> held out), and figures of the pictures themselves."""
    colors = (ORANGE, BLUE, GREEN, PURPLE, RED, INK)
    voting_first = sorted(scorers, key=lambda name: scorers[name])
    return (
        Plot(
            "Proxy and held-out scores",
            "Mean score of each round, as change since the first in its standard deviations. "
            "Up for those that vote and down for those held out: reward hacking.",
            tuple(
                (f"opinion/{name}", f"{name} (held out)" if scorers[name] else name, color)
                for name, color in zip(voting_first, itertools.cycle(colors), strict=False)
            ),
            inches=(4.0, 2.8),
        ),
        Plot(
            "Diversity",
            "Mean distance between any two images of a round, as 8x8 thumbnails; it falls when all look alike.",
            (("pictures/diversity", "diversity", BLUE),),
            inches=SMALL,
        ),
        Plot(
            "Brightness and saturation",
            "Means over the pixels.",
            (("pictures/brightness", "brightness", ORANGE), ("pictures/saturation", "saturation", BLUE)),
            share=True,
            inches=SMALL,
        ),
        Plot(
            "Edges",
            "Share of pixels on an edge.",
            (("pictures/edge_density", "edge density", BLUE),),
            inches=SMALL,
        ),
        Plot(
            "Colour entropy",
            "Bits, of the colours of an image.",
            (("pictures/color_entropy", "colour entropy", BLUE),),
            inches=SMALL,
        ),
        Plot(
            "Flipped verdicts",
            "Share that the last round's threshold would have judged otherwise.",
            (("flip_rate", "flipped", BLUE),),
            share=True,
            inches=SMALL,
        ),
    )


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
