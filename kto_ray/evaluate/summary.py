"""What a run leaves to read: `summary.json` for programs, `report.html` and `before_after.png` for people.

Made by the loop at its end, from the metrics rows, the ledger and the stored evaluations alone.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kto_ray.config import RunConfig, to_yaml
from kto_ray.evaluate.doubts import doubts_in_all
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.evaluate.hacking import suspicion_of
from kto_ray.evaluate.people import people_summary
from kto_ray.evaluate.report import ReportData, render_report, save_png_grid
from kto_ray.evaluate.statistics import EvaluationSummary, Interval
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.tracking import Metrics

PICTURED_PROMPTS = 12


def evaluation_row(summary: EvaluationSummary) -> dict[str, Any]:
    """An evaluation as a flat row: `pass_rate`, `pass_rate_low`, `pass_rate_high`, ...; without what is not known."""
    row: dict[str, Any] = {"images": summary.images, "failed": summary.failed}
    for name in ("pass_rate", "mean_score", "win_rate"):
        interval: Interval | None = getattr(summary, name)
        if interval is not None:
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    row |= {f"score/{name}": interval.value for name, interval in summary.scores.items()}
    return {name: value for name, value in row.items() if not math.isnan(value)}


def write_results(
    config: RunConfig,
    run: Storage,
    metrics: Metrics,
    rounds: RoundStore,
    evaluation: Evaluation,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Write summary and report; returns the summary.

    `seconds` are this process's; the roles' seconds are added up from the rounds, whoever ran them.
    """
    round_rows, evaluation_rows = metrics.of("round"), metrics.of("evaluation")
    last = int(evaluation_rows[-1]["step"])
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

    def figures(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in ("kind", "step", "time")}

    doubts = doubts_in_all(config, round_rows)
    people = people_summary(round_rows, evaluation_rows)
    summary = {
        "run": config.run,
        "model": config.model.name,
        "rounds": len(round_rows),
        "policy_version": last,
        "base": figures(evaluation_rows[0]),
        "final": figures(evaluation_rows[-1]),
        "images": ledger.generated,
        "evaluation_images": sum(int(row["images"]) for row in evaluation_rows),
        "seconds": all_seconds,
        "ledger": asdict(ledger) | {"balances": ledger.balances},
        "suspicion": suspicion_of(config.label, round_rows),
        "doubts": doubts,
        "people": asdict(people) if people else None,
    }
    run.write_json("summary.json", summary)
    pairs = evaluation.pairs(last, PICTURED_PROMPTS)
    report = render_report(
        ReportData(
            run=config.run,
            model=config.model.name,
            config_yaml=to_yaml(config),
            finished=True,
            rounds=round_rows,
            evaluations=[evaluation.summary(int(row["step"])) for row in evaluation_rows],
            pairs=pairs,
            ledger=asdict(ledger),
            seconds=all_seconds,
            images=ledger.generated,
            scorers={name: settings.held_out for name, settings in config.label.scorers.items()},
            doubts=doubts,
            people=people,
        )
    )
    run.write("report.html", report.encode())
    picture = io.BytesIO()
    save_png_grid(pairs, picture)
    run.write("before_after.png", picture.getvalue())
    return summary
