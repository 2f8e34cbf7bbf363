"""Who worked and who waited, round by round, on one clock: from the rows of rounds and evaluations alone.

    stages       when each was at work: a round is drawn and judged, trained on, and its policy evaluated; what is
                 written at the end of a round's making, and of its training
    processes    what the processes of a role spent their time on in each round, as shares: all together, and where
                 there are several, each of them; when exactly each of them waited is not kept

A row says when its round ended, and how long its stages took. Where these lay follows from the loop: a round is drawn
as soon as its policy is there and the one before it is sealed. Positions are shares of the width, 0 to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from kto_ray.config import RunConfig
from kto_ray.evaluate.charts import duration, percent
from kto_ray.evaluate.shares import ROLES, as_shares, processes_in, spent_in
from kto_ray.outbox import Row
from kto_ray.stopwatch import Doing

LATEST = 40
"""Rounds that are shown unless more are asked for."""
NAMES = {"generators": "Generators", "scorers": "Scorers", "train_workers": "Train workers"}
ONE = {"generators": "replica ", "scorers": "", "train_workers": "rank "}
"""Before what a process of the role is called."""
STAGES = ("generate", "label", "seal", "load", "train", "publish")
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
    """Of processes, `shares` say what all of their time was spent on, and `single` whether it is one of several."""

    name: str
    spans: Sequence[Span]
    shares: Mapping[str, float] = field(default_factory=dict)
    single: bool = False

    @property
    def idle(self) -> float | None:
        """Share of its time; None where that says nothing."""
        return sum(self.shares[doing] for doing in IDLE) if self.shares else None


@dataclass(frozen=True)
class Timeline:
    """See the module. `edges`: where rounds end, with their numbers."""

    stages: Sequence[Lane]
    processes: Sequence[Lane]
    edges: Sequence[tuple[float, int]]
    ticks: Sequence[tuple[float, str]]
    idle: float
    rounds: int
    of: int


@dataclass(frozen=True)
class _Round:
    """When things of one round began and ended, in seconds since 1970."""

    number: int
    row: Row
    drawing: float
    judging: float
    judged: float
    sealed: float
    loading: float
    training: float
    trained: float
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
    stages: dict[str, list[tuple[float, float, str, str]]] = {}
    for name in ("Draw", "Judge", "Train", "Store", "Evaluate"):
        stages[name] = []
    for one in shown:
        n = f"round {one.number}"
        stages["Draw"].append((one.drawing, one.judging, "draw", f"{n}: drawn in"))
        stages["Judge"].append((one.judging, one.judged, judges, f"{n}: judged, after the last image, in"))
        stages["Train"].append((one.loading, one.training, "load", f"{n}: images and weights loaded in"))
        stages["Train"].append((one.training, one.trained, "train", f"{n}: trained on in"))
        stages["Store"].append((one.judged, one.sealed, "store", f"{n}: sealed in"))
        stages["Store"].append((one.trained, one.ended, "store", f"{n}: checkpoint and policy stored in"))
    stages["Evaluate"] = [(b, e, "evaluate", f"policy {policy}: evaluated in") for b, e, policy in evaluated]
    busy = _covered([(b, e) for spans in stages.values() for b, e, _, _ in spans])
    lanes = [
        Lane(
            ("People" if judges == "people" else name) if name == "Judge" else name,
            [span(what, b, e, f"{says} {duration(e - b)}") for b, e, what, says in spans if e > b],
        )
        for name, spans in stages.items()
    ]
    return Timeline(
        stages=[lane for lane in lanes if lane.spans],
        processes=[lane for role in ROLES for lane in _of_role(role, shown, span)],
        edges=[(round((one.ended - begin) / whole, 5), one.number) for one in shown],
        ticks=[(part / 4, duration(part / 4 * whole)) for part in range(5)],
        idle=max(0.0, 1 - busy / whole),
        rounds=len(shown),
        of=len(placed),
    )


def _placed(config: RunConfig, rows: Sequence[Row], evaluations: Sequence[Row]) -> list[_Round]:
    walked = {int(row["step"]): float(row["time"]) for row in rows}
    walked |= {int(row["step"]) - 1: float(row["time"]) for row in evaluations if "time" in row and row["step"]}
    placed: list[_Round] = []
    for row in rows:
        number, ended = int(row["step"]), float(row["time"])
        generate, label, seal, load, train, publish = (float(row.get(f"seconds/{stage}") or 0) for stage in STAGES)
        trained = ended - publish
        training = trained - train
        loading = training - load
        drawing = loading - seal - label - generate
        if config.rounds_ahead and placed:  # drawn meanwhile, so that it may have lain there for a while
            ready = walked.get(number - config.rounds_ahead - 1, placed[-1].sealed)
            drawing = min(drawing, max(ready, placed[-1].sealed))
        judging = drawing + generate
        judged = judging + label
        placed.append(_Round(number, row, drawing, judging, judged, judged + seal, loading, training, trained, ended))
    return placed


def _of_role(role: str, shown: Sequence[_Round], span: Any) -> list[Lane]:
    """Of all its processes together and, where there are several, of each."""
    names = processes_in([one.row for one in shown], role)
    lanes = [_of_processes(role, name, shown, span) for name in (None, *(names if len(names) > 1 else ()))]
    return [lane for lane in lanes if lane.shares]


def _of_processes(role: str, process: str | None, shown: Sequence[_Round], span: Any) -> Lane:
    """Each round's shares, over the time from one report of the role to the next.

    Args:
        process: one of the role's; None: all together.
    """
    spans, trains = [], role == "train_workers"
    for place, one in enumerate(shown):
        ended = one.ended if trains else one.sealed
        before = shown[place - 1] if place else None
        began = min(one.drawing, one.loading) if before is None else before.ended if trains else before.sealed
        of = as_shares([spent_in(one.row, role, process)])
        floor = 1.0
        for doing in get_args(Doing):
            share = of.get(doing, 0.0)
            if share > 0:
                floor -= share
                says = f"round {one.number}: {percent(share)} {WORDS[doing]}"
                spans.append(span(doing, began, ended, says, round(max(0.0, floor), 4), round(share, 4)))
    shares = as_shares(spent_in(one.row, role, process) for one in shown)
    name = NAMES[role] if process is None else f"{ONE[role]}{process}"
    return Lane(name, spans, shares, single=process is not None)


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of them lies."""
    covered, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        covered += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return covered
