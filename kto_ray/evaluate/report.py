"""The report of a run: one self-contained HTML page, and a before/after picture for a README.

    render_report(ReportData(...)) -> str        save_png_grid(pairs, "before_after.png")

Whoever has a run folder fills `ReportData`; nothing here reads a run. Pictures and charts travel inside the page as
data URIs, so that it can be mailed, archived and opened offline. `report.html.j2` is the page, `plots.PLOTS` lists
its charts.
"""

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import matplotlib
import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

import kto_ray
from kto_ray.evaluate.albums import SIGNS, ImageStory
from kto_ray.evaluate.charts import (
    MISSING,
    Row,
    data_uri,
    draw,
    duration,
    number,
    numbers,
    percent,
    percents,
    points,
    signed,
)
from kto_ray.evaluate.hacking import with_opinions
from kto_ray.evaluate.people import PeopleSummary
from kto_ray.evaluate.plots import INK, PLOTS, opinion_plots
from kto_ray.evaluate.statistics import EvaluationSummary
from kto_ray.evaluate.timeline import Timeline

HERE = Path(__file__).parent
Picture = npt.NDArray[np.uint8]  # (H, W, 3), RGB

MAX_EDGE = 256  # pixels; larger pictures are scaled down, or a page of SD images would weigh tens of megabytes
SMALL_EDGE = 128  # pixels; smaller pictures are enlarged pixel by pixel instead of blurred
LEDGER_PARTS = ("labeled", "abstained", "failed", "pending")  # what became of the images generated


@dataclass(frozen=True)
class Pair:
    """What base and final policy drew for one prompt from the same seeds, in the same order; a failed score is None."""

    prompt: str
    base: Sequence[Picture]
    final: Sequence[Picture]
    base_scores: Sequence[float | None]
    final_scores: Sequence[float | None]
    base_passes: Sequence[bool | None]
    final_passes: Sequence[bool | None]


@dataclass(frozen=True)
class Sheet:
    """Some of the images of a round."""

    round: int
    of: int
    images: Sequence[ImageStory]
    pixels: Sequence[Picture]


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows. In `rounds` any key may be missing: the charts leave a gap there."""

    run: str
    model: str
    config_yaml: str
    finished: bool
    rounds: Sequence[Row]
    evaluations: Sequence[EvaluationSummary]
    pairs: Sequence[Pair]
    ledger: Mapping[str, int]
    seconds: Mapping[str, float]
    images: int
    scorers: Mapping[str, bool] = field(default_factory=dict)  # name -> held out
    fresh: Sequence[EvaluationSummary] = ()  # base and last policy with other seeds than those that ended the run
    doubts: Sequence[str] = ()  # why the scores may be gamed, or the policy fall apart
    hints: Sequence[str] = ()  # what health figures say of the objective's settings
    people: PeopleSummary | None = None  # None: nobody was asked
    spent: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # shares of each role's seconds
    sheet: Sheet | None = None  # None: nothing was drawn, or the pixels are gone
    timeline: Timeline | None = None  # None: no round is complete


def render_report(data: ReportData) -> str:
    """The page as HTML text; everything that comes from `data` is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    words = (percent, number, duration, percents, numbers, points, signed)
    environment.filters |= {**{word.__name__: word for word in words}, "picture": picture_uri}
    template = environment.get_template("report.html.j2")
    evaluations = sorted(data.evaluations, key=lambda evaluation: evaluation.policy_version)
    reported = sorted(data.fresh, key=lambda evaluation: evaluation.policy_version) or evaluations
    rounds = [_with_idle_time(row) for row in with_opinions(data.rounds, data.scorers)]
    plots = {**PLOTS, "opinions": opinion_plots(data.scorers)}
    return template.render(
        data=data,
        evaluations=evaluations,
        base=next((evaluation for evaluation in reported if evaluation.policy_version == 0), None),
        last=next((evaluation for evaluation in reversed(reported) if evaluation.policy_version > 0), None),
        charts={section: [c for p in plots if (c := draw(p, rounds, evaluations))] for section, plots in plots.items()},
        columns=list(dict.fromkeys(key for row in rounds for key in row if not key.startswith("processes/"))),
        rounds=rounds,
        ledger_parts=LEDGER_PARTS,
        scored=any(score is not None for pair in data.pairs for score in (*pair.base_scores, *pair.final_scores)),
        judged=not any(math.isnan(evaluation.pass_rate.value) for evaluation in evaluations),
        unaccounted=_unaccounted(data.ledger),
        small_edge=SMALL_EDGE,
        SIGNS=SIGNS,
        held_out=[name for name, is_held_out in data.scorers.items() if is_held_out],
        version=kto_ray.__version__,
        MISSING=MISSING,
    )


def _with_idle_time(row: Row) -> Row:
    """Adds what the roles leave of a round's seconds; roles that overlap may leave nothing."""
    seconds = {key: value for key, value in row.items() if key.startswith("seconds/") and value is not None}
    whole = seconds.pop("seconds/round", None)
    return row if whole is None or not seconds else {**row, "seconds/idle": max(0.0, whole - sum(seconds.values()))}


def _unaccounted(ledger: Mapping[str, int]) -> int | None:
    """What is missing from (or too much in) the balance generated = labeled + abstained + failed + pending."""
    if not {"generated", *LEDGER_PARTS} <= ledger.keys():
        return None
    return ledger["generated"] - sum(ledger[part] for part in LEDGER_PARTS)


def picture_uri(pixels_HWC: Picture) -> str:
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def save_png_grid(
    pairs: Sequence[Pair],
    target: str | os.PathLike[str] | IO[bytes],
    captions: tuple[str, str] = ("before", "after"),
    cell: int = 96,
) -> None:
    """Write one PNG for a README: a row for each prompt, base images on the left, final images on the right.

    Args:
        cell: edge of an image, in pixels; small images are enlarged pixel by pixel.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("a before/after picture needs at least one pair")
    font_file = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # knows more alphabets than Pillow's own
    font, pad, gap, label = ImageFont.truetype(str(font_file), cell // 7), cell // 16, cell // 3, 2 * cell
    step, top = cell + pad, cell // 3
    starts = (pad + label, pad + label + step * max(len(pair.base) for pair in pairs) + gap)
    width = starts[1] + step * max(len(pair.final) for pair in pairs)
    sheet = Image.new("RGB", (width, top + step * len(pairs)), "white")
    pen = ImageDraw.Draw(sheet)
    for start, caption in zip(starts, captions, strict=True):
        pen.text((start, top // 2), caption, fill=INK, font=font, anchor="lm")
    for row, pair in enumerate(pairs):
        y = top + row * step
        text = "\n".join(textwrap.wrap(pair.prompt, 24, max_lines=5, placeholder=" …"))
        pen.multiline_text((pad, y + cell // 2), text, fill=INK, font=font, anchor="lm")
        for start, pictures in zip(starts, (pair.base, pair.final), strict=True):
            for column, pixels_HWC in enumerate(pictures):
                resample = Image.Resampling.NEAREST if max(pixels_HWC.shape) < SMALL_EDGE else Image.Resampling.LANCZOS
                sheet.paste(Image.fromarray(pixels_HWC).resize((cell, cell), resample), (start + column * step, y))
    sheet.save(target, "png", optimize=True)
