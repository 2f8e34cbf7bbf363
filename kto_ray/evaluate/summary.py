"""What a run leaves to read: `summary.json` for programs, `report.html` and `before_after.png` for people.

Made by the loop at its end, from the metrics rows, the ledger and the stored evaluations alone.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kto_ray.config import RunConfig, to_yaml
from kto_ray.evaluate.albums import Key, read_round, spread
from kto_ray.evaluate.doubts import doubts_in_all
from kto_ray.evaluate.evaluation import FRESH_STAGE, PICTURED_PROMPTS, STAGE, Evaluation
from kto_ray.evaluate.hacking import suspicion_of
from kto_ray.evaluate.hints import hints_in_all
from kto_ray.evaluate.people import people_summary
from kto_ray.evaluate.report import Pair, ReportData, Sheet, render_report, save_png_grid
from kto_ray.evaluate.shares import shares_of
from kto_ray.evaluate.statistics import EvaluationSummary, Interval
from kto_ray.evaluate.timeline import timeline_of
from kto_ray.outbox import Row
from kto_ray.rounds import Round, RoundStore
from kto_ray.storage import Storage
from kto_ray.tracking import Metrics

PICTURED_IMAGES = 32
"""Of the last round."""


def evaluation_row(summary: EvaluationSummary) -> dict[str, Any]:
    """An evaluation as a flat row: `pass_rate`, `pass_rate_low`, `pass_rate_high`, ...; without what is not known."""
    row: dict[str, Any] = {"images": summary.images, "failed": summary.failed}
    intervals: dict[str, Interval | None] = {
        **{name: getattr(summary, name) for name in ("pass_rate", "mean_score", "win_rate")},
        **{f"difference/{name}": interval for name, interval in summary.differences.items()},
    }
    for name, interval in intervals.items():
        if interval is not None:
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    row |= {f"score/{name}": interval.value for name, interval in summary.scores.items()}
    return {name: value for name, value in row.items() if not math.isnan(value)}


def _bounds(interval: Interval) -> dict[str, float]:
    """Without what is not known."""
    bounds = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: value for name, value in bounds.items() if not math.isnan(value)}


def sheet_of(run: Storage, config: RunConfig, rounds: Sequence[int]) -> Sheet | None:
    """Images of the last sealed round, with what became of them; None where there are none, or no pixels any more.

    Args:
        rounds: numbers of all rounds.
    """
    for number in reversed(rounds):
        album = read_round(run, config, Key("round", number), rounds[-1])
        if album.sealed:
            images = spread([image for image in album.images if image.record.error is None], PICTURED_IMAGES)
            if not images or not album.kept:
                return None
            pixels_BHWC = Round(run / album.key.folder, album.key.stage).pixels_of([image.record for image in images])
            return Sheet(number, len(album.images), images, list(pixels_BHWC))
    return None


@dataclass(frozen=True)
class Outcome:
    """What is known of a run: `summary.json`, `report.html`, and the pairs of `before_after.png`."""

    summary: dict[str, Any]
    report: str
    pairs: Sequence[Pair]


def write_results(
    config: RunConfig,
    run: Storage,
    metrics: Metrics,
    rounds: RoundStore,
    evaluation: Evaluation,
    fresh: Evaluation | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Write summary and report of a run that has ended; returns the summary."""
    results = results_of(config, run, metrics.of, rounds, evaluation, fresh, seconds)
    run.write_json("summary.json", results.summary)
    run.write("report.html", results.report.encode())
    if results.pairs:
        picture = io.BytesIO()
        save_png_grid(results.pairs, picture)
        run.write("before_after.png", picture.getvalue())
    return results.summary


def results_of(
    config: RunConfig,
    run: Storage,
    rows_of: Callable[[str], Sequence[Row]],
    rounds: RoundStore,
    evaluation: Evaluation,
    fresh: Evaluation | None,
    seconds: Mapping[str, float],
    finished: bool = True,
) -> Outcome:
    """Base and last policy are reported by their `fresh` evaluation, if there is one.

    Args:
        rows_of: of `metrics.jsonl`, by kind, in the order of their steps; one evaluation at least.
        seconds: of the whole run; the roles' seconds are added up from the rounds, whoever ran them.
    """
    round_rows, evaluation_rows, fresh_rows = (rows_of(kind) for kind in ("round", STAGE, FRESH_STAGE))
    reported, rows = (fresh, fresh_rows) if fresh else (evaluation, evaluation_rows)
    last = int(evaluation_rows[-1]["step"])
    evaluations = [evaluation.summary(int(row["step"])) for row in evaluation_rows]
    fresh_evaluations = [fresh.summary(version) for version in (0, last)] if fresh else []
    differences = (fresh_evaluations or evaluations)[-1].differences
    ledger = rounds.ledger()
    roles = {
        name: sum(row.get(key) or 0.0 for row in round_rows)
        for name, key in {
            "generate": "seconds/generate",
            "label": "seconds/label",
            "train": "seconds/train",
            "generators_busy": "busy/generate",
            "scorers_busy": "busy/label",
        }.items()
    }
    all_seconds = {**roles, **seconds}
    spent = shares_of(round_rows)

    def figures(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in ("kind", "step", "time")}

    doubts, hints = doubts_in_all(config, round_rows), hints_in_all(config, round_rows)
    people = people_summary(round_rows, rows)
    summary = {
        "run": config.run,
        "model": config.model.name,
        "rounds": len(round_rows),
        "policy_version": last,
        "base": figures(rows[0]),
        "final": figures(rows[-1]),
        "difference": {name: _bounds(interval) for name, interval in differences.items()},
        "fresh_seeds": fresh is not None,
        "images": ledger.generated,
        "evaluation_images": sum(int(row["images"]) for row in (*evaluation_rows, *fresh_rows)),
        "seconds": all_seconds,
        "spent": spent,
        "ledger": asdict(ledger) | {"balances": ledger.balances},
        "suspicion": suspicion_of(config.label, round_rows),
        "doubts": doubts,
        "hints": hints,
        "people": asdict(people) if people else None,
    }
    pairs = reported.pairs(last, PICTURED_PROMPTS)
    report = render_report(
        ReportData(
            run=config.run,
            model=config.model.name,
            config_yaml=to_yaml(config),
            finished=finished,
            rounds=round_rows,
            evaluations=evaluations,
            fresh=fresh_evaluations,
            pairs=pairs,
            ledger=asdict(ledger),
            seconds=all_seconds,
            spent=spent,
            images=ledger.generated,
            scorers={name: settings.held_out for name, settings in config.label.scorers.items()},
            doubts=doubts,
            hints=hints,
            people=people,
            sheet=sheet_of(run, config, rounds.indices()),
            timeline=timeline_of(config, round_rows, evaluation_rows),
        )
    )
    return Outcome(summary, report, pairs)
