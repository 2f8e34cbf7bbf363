"""Who worked and who waited, round by round, on one clock: from the rows of rounds and evaluations alone.

    stages       when each was at work: a round is drawn and judged, trained on, and its policy evaluated
    processes    what the processes of a role spent their time on in each round, as shares: they are added up over
                 replicas, actors or workers, and when exactly each of them waited is not kept

A row says when its round ended, and how long its stages took. Where these lay follows from the loop: a round is drawn
as soon as its policy is there and the one before it is sealed. Positions are shares of the width, 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from kto_ray.config import RunConfig
from kto_ray.evaluate.charts import duration, percent
from kto_ray.evaluate.shares import ROLES, shares_of
from kto_ray.outbox import Row
from kto_ray.stopwatch import Doing

LATEST = 40
"""Rounds that are shown unless more are asked for."""
NAMES = {"generators": "Generators", "scorers": "Scorers", "train_workers": "Train workers"}
STAGES = ("generate", "label", "load", "train")
IDLE: tuple[Doing, ...] = ("wait", "sleep")
WORDS: dict[Doing, str] = {"work": "work", "load": "load weights", "wait": "wait", "sleep": "sleep"}


@dataclass(frozen=True)
class Span:
    """A rectangle: `y` and `height` are shares of the lane's height, from the top."""

    what: str
    x: float
    width: float
    y: float
    height: float
    says: str


@dataclass(frozen=True)
class Lane:
    """`idle`: share of its time; None where that says nothing."""

    name: str
    spans: Sequence[Span]
    idle: float | None


@dataclass(frozen=True)
class Timeline:
    """See the module. `edges`: where rounds end, with their numbers. `shares`: of each role, over the rounds shown."""

    stages: Sequence[Lane]
    processes: Sequence[Lane]
    edges: Sequence[tuple[float, int]]
    ticks: Sequence[tuple[float, str]]
    idle: float
    shares: dict[str, dict[str, float]]
    rounds: int
    of: int


@dataclass(frozen=True)
class _Round:
    """When things of one round began and ended, in seconds since 1970."""

    number: int
    row: Row
    drawing: float
    judging: float
    sealed: float
    loading: float
    training: float
    ended: float


def timeline_of(
    config: RunConfig, rounds: Sequence[Row], evaluations: Sequence[Row], latest: int | None = LATEST
) -> Timeline | None:
    """None where no round says when it ended.

    Args:
        rounds, evaluations: rows, in the order of their steps.
        latest: so many rounds; None: all.
    """
    timed = [row for row in rounds if "time" in row]
    if not timed:
        return None
    placed = _placed(config, timed, evaluations)
    shown = placed[-latest:] if latest else placed
    evaluated = [
        (max(one.ended for one in placed if one.number < row["step"]), float(row["time"]), int(row["step"]))
        for row in evaluations
        if "time" in row and any(one.number < row["step"] for one in placed)
    ]
    begin = min(shown[0].drawing, shown[0].loading)
    evaluated = [(began, ended, policy) for began, ended, policy in evaluated if began >= begin and ended > began]
    end = max([shown[-1].ended, *(ended for _, ended, _ in evaluated)])
    whole = max(end - begin, 1e-9)

    def span(what: str, began: float, ended: float, says: str, y: float = 0, height: float = 1) -> Span:
        return Span(what, round((began - begin) / whole, 5), round(max(0, ended - began) / whole, 5), y, height, says)

    judges = "people" if config.label.people else "judge"
    stages: dict[str, list[tuple[float, float, str, str]]] = {"Draw": [], "Judge": [], "Train": [], "Evaluate": []}
    for one in shown:
        n = f"round {one.number}"
        stages["Draw"].append((one.drawing, one.judging, "draw", f"{n}: drawn in"))
        stages["Judge"].append((one.judging, one.sealed, judges, f"{n}: judged, after the last image, in"))
        stages["Train"].append((one.loading, one.training, "load", f"{n}: images and weights loaded in"))
        stages["Train"].append((one.training, one.ended, "train", f"{n}: trained on in"))
    stages["Evaluate"] = [(b, e, "evaluate", f"policy {policy}: evaluated in") for b, e, policy in evaluated]
    busy = _covered([(b, e) for spans in stages.values() for b, e, _, _ in spans])
    lanes = [
        Lane(
            ("People" if judges == "people" else name) if name == "Judge" else name,
            [span(what, b, e, f"{says} {duration(e - b)}") for b, e, what, says in spans if e > b],
            None,
        )
        for name, spans in stages.items()
    ]
    shares = shares_of([one.row for one in shown])
    return Timeline(
        stages=[lane for lane in lanes if lane.spans],
        processes=[_role(role, shown, shares[role], span) for role in ROLES if role in shares],
        edges=[(round((one.ended - begin) / whole, 5), one.number) for one in shown],
        ticks=[(part / 4, duration(part / 4 * whole)) for part in range(5)],
        idle=max(0.0, 1 - busy / whole),
        shares=shares,
        rounds=len(shown),
        of=len(placed),
    )


def _placed(config: RunConfig, rows: Sequence[Row], evaluations: Sequence[Row]) -> list[_Round]:
    walked = {int(row["step"]): float(row["time"]) for row in rows}
    walked |= {int(row["step"]) - 1: float(row["time"]) for row in evaluations if "time" in row and row["step"]}
    placed: list[_Round] = []
    for row in rows:
        number, ended = int(row["step"]), float(row["time"])
        generate, label, load, train = (float(row.get(f"seconds/{stage}") or 0) for stage in STAGES)
        training = ended - train
        loading = training - load
        drawing = loading - label - generate
        if config.rounds_ahead and placed:  # drawn meanwhile, so that it may have lain there for a while
            ready = walked.get(number - config.rounds_ahead - 1, placed[-1].sealed)
            drawing = min(drawing, max(ready, placed[-1].sealed))
        judging = drawing + generate
        placed.append(_Round(number, row, drawing, judging, judging + label, loading, training, ended))
    return placed


def _role(role: str, shown: Sequence[_Round], shares: dict[str, float], span: Any) -> Lane:
    """Each round's shares, over the time from one report of the role to the next."""
    spans, trains = [], role == "train_workers"
    for place, one in enumerate(shown):
        ended = one.ended if trains else one.sealed
        before = shown[place - 1] if place else None
        began = min(one.drawing, one.loading) if before is None else before.ended if trains else before.sealed
        of = shares_of([one.row]).get(role, {})
        floor = 1.0
        for doing in get_args(Doing):
            share = of.get(doing, 0.0)
            if share > 0:
                floor -= share
                says = f"round {one.number}: {percent(share)} {WORDS[doing]}"
                spans.append(span(doing, began, ended, says, round(max(0.0, floor), 4), round(share, 4)))
    return Lane(NAMES[role], spans, sum(shares[doing] for doing in IDLE))


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of them lies."""
    covered, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        covered += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return covered
