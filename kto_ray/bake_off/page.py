"""The bake-off as a page, a table and a picture: `summary.py`'s figures in, HTML, Markdown and PNG out."""

import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Literal

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kto_ray.bake_off.methods import METHODS, TUNING_SEEDS
from kto_ray.bake_off.summary import GOALS, Curve, within_the_best
from kto_ray.bake_off.tasks import TASKS
from kto_ray.evaluate.charts import MISSING, STYLES, data_uri, duration, number, percent
from kto_ray.evaluate.plots import BLUE, GRAY, GREEN, GRID, INK, MUTED, ORANGE, PURPLE, RED
from kto_ray.evaluate.statistics import Interval

COLORS = (GREEN, BLUE, ORANGE, PURPLE, RED, GRAY, INK)


def by_task(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """In the order of the tasks and of the methods; tasks of which nothing is known are not there."""
    found = {
        task: sorted((c for c in curves if c.task == task), key=lambda curve: list(METHODS).index(curve.method))
        for task in TASKS
    }
    return {task: those for task, those in found.items() if those}


def draw_curves(curves: Sequence[Curve], kind: Literal["svg", "png"], columns: int = 3) -> bytes:
    """Held-out pass rate over images drawn, a panel a task; the band is the 95 % interval over seeds."""
    tasks = by_task(curves)
    rows, columns = -(-len(tasks) // columns), min(columns, len(tasks))
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 3.1 * rows + 0.9), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for (task, those), axes in zip(tasks.items(), panels, strict=False):
        _draw_panel(axes, TASKS[task].title, those)
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _draw_panel(axes: Axes, title: str, curves: Sequence[Curve]) -> None:
    names = list(METHODS)
    for curve in curves:
        place = names.index(curve.method)
        color, (marker, line) = COLORS[place % len(COLORS)], STYLES[place % len(STYLES)]
        rate, low, high = np.array([(i.value, i.low, i.high) for i in curve.pass_rate]).T
        axes.fill_between(curve.images, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(curve.images, rate, marker + line, color=color, markersize=3, label=METHODS[curve.method].title)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("images drawn", fontsize=9, color=MUTED)
    # The interval of two seeds reaches beyond what a share can be.
    low, high = np.clip(axes.get_ylim(), 0, 1)
    axes.set_ylim(low - 0.02, high + 0.02)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8)


def shown(interval: Interval | None, share: bool = True) -> str:
    """A figure with half its interval, for instance "86.2 ± 1.3 %"."""
    if interval is None:
        return MISSING
    scale, unit, digits = (100, " %", 1) if share else (1, "", 3)
    half = "" if math.isnan(interval.high) else f" ± {scale * (interval.high - interval.value):.{digits}f}"
    return f"{scale * interval.value:.{digits}f}{half}{unit}"


def markdown(curves: Sequence[Curve]) -> str:
    """A table a task; bold is the best, and what lies within its interval."""
    goals = " | ".join(f"images to {goal:g}" for goal in GOALS)
    lines: list[str] = []
    for task, those in by_task(curves).items():
        watched = TASKS[task].watched
        head = (
            f"| method | held-out pass rate | {goals} | mean score | {f'{watched} lost' if watched else 'diversity'} "
        )
        lines += [f"### {TASKS[task].title}", "", f"{head}| seconds |", "|---|" + "---:|" * (len(GOALS) + 4)]
        for curve in those:
            final, title = shown(curve.final), METHODS[curve.method].title
            if within_the_best(curve, those):
                final = f"**{final}**"
            to_goal = " | ".join(MISSING if n is None else f"{n:.0f}" for n in curve.to_goal.values())
            last = shown(curve.lost, share=False) if watched else shown(curve.diversity, share=False)
            score = shown(curve.mean_score, share=False)
            lines.append(f"| {title} | {final} | {to_goal} | {score} | {last} | {curve.seconds:.0f} |")
        base, seeds = those[0].pass_rate[0], ", ".join(map(str, those[0].seeds))
        lines += ["", f"Base: {shown(base)}. {those[0].images[-1]} images; seeds {seeds}.", ""]
    return "\n".join(lines)


def render(curves: Sequence[Curve], tuning: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One self-contained HTML page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {word.__name__: word for word in (percent, number, duration, shown)}
    template = environment.from_string((resources.files("kto_ray.bake_off") / "page.html.j2").read_text("utf-8"))
    return template.render(
        tasks=by_task(curves),
        titles={name: task.title for name, task in TASKS.items()},
        watched={name: task.watched for name, task in TASKS.items()},
        methods=METHODS,
        tuning=tuning,
        tuning_seeds=TUNING_SEEDS,
        goals=[f"{goal:g}" for goal in GOALS],
        curves=data_uri("image/svg+xml", draw_curves(curves, "svg")),
        best=within_the_best,
        MISSING=MISSING,
    )
