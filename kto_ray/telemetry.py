"""What a cluster's own monitoring sees of a run: counters, gauges and histograms on Ray's metrics endpoints.

    replicas: images, seconds of a batch            \\
    driver: scores, verdicts, who waits for whom,    --> Ray's agent on each node --> Prometheus --> deploy/grafana.json
            the figures of rounds and evaluations   /
    train workers: seconds of a step               /

Each of these processes calls `of_run` once, and says afterwards what happens where it happens. Ray puts `ray_` before
the names, and `_total` after those of counters. Where a process has no Ray, nothing is kept. docs/metrics.md is the
list for users.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

PREFIX = "kto_ray_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper ends of the buckets of histograms."""

_run = ""


def of_run(name: str) -> None:
    """Whose process this is: the `run` tag of all that it says from now on."""
    global _run
    _run = name


class Instrument:
    """One metric. It is made in Ray when there is something to say.

    Args:
        name: without the prefix.
        about: what it counts or measures, with its unit.
        tags: besides `run`.
    """

    kind = ""
    """As Ray's class is called."""
    arguments: tuple[Sequence[float], ...] = ()
    """What that class is given between name, description and tags."""

    def __init__(self, name: str, about: str, *tags: str) -> None:
        self.name, self.about, self.tags = PREFIX + name, about, tags

    @cached_property
    def _made(self) -> Any:
        from ray.util import metrics

        return getattr(metrics, self.kind)(self.name, self.about, *self.arguments, tag_keys=("run", *self.tags))

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {"run": _run, **tags}


class Count(Instrument):
    """What only grows."""

    kind = "Counter"

    def add(self, amount: float = 1, **tags: str) -> None:
        """Ray refuses 0, which says nothing."""
        if amount:
            self._made.inc(amount, self._tags(tags))


class Level(Instrument):
    """What is so and so large now."""

    kind = "Gauge"

    def set(self, value: float, **tags: str) -> None:
        self._made.set(value, self._tags(tags))


class Durations(Instrument):
    """How long something takes, time and again, in seconds."""

    kind = "Histogram"
    arguments = (SECONDS,)

    def observe(self, seconds: float, **tags: str) -> None:
        self._made.observe(seconds, self._tags(tags))


IMAGES = Count("images", "Images that replicas have drawn", "stage", "outcome")
"""stage: round or evaluation; outcome: drawn, or failed (not finite)."""
DRAW_SECONDS = Durations("draw_seconds", "Seconds in which a replica draws one batch")
SCORES = Count("scores", "Scores that were asked for", "scorer", "outcome")
"""outcome: scored or failed."""
SCORE_SECONDS = Durations("score_seconds", "Seconds in which an actor scores one batch", "scorer")
VERDICTS = Count("verdicts", "Verdicts", "label")
WAITING = Level("waiting_images", "Images of the round in the making that are not there yet, or wait", "lacks")
"""lacks: image (not drawn), score, or verdict."""
STEP_SECONDS = Durations("step_seconds", "Seconds of one optimizer step, on the first train worker")
SPENT = Count("spent_seconds", "Seconds that a role's processes have spent", "role", "doing")
"""role: generators, scorers, train_workers; doing: work, wait, sleep, load. It grows once a round."""
POLICY = Level("policy_version", "Version of the newest policy that was trained")
FIGURE = Level("figure", "A figure of the last round or evaluation, as in metrics.jsonl", "kind", "figure")
"""kind: round, evaluation or fresh_evaluation."""

INSTRUMENTS: tuple[Instrument, ...] = (
    *(IMAGES, DRAW_SECONDS, SCORES, SCORE_SECONDS, VERDICTS, WAITING, STEP_SECONDS, SPENT, POLICY, FIGURE),
)


def tell_figures(kind: str, figures: Mapping[str, Any]) -> None:
    """The row of a round or an evaluation: "spent/ROLE/DOING" are seconds, all other numbers figures."""
    for name, value in figures.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        head, *rest = name.split("/")
        if head == "spent" and len(rest) == 2:
            SPENT.add(max(0.0, value), role=rest[0], doing=rest[1])
        elif name not in ("round", "step", "time"):
            FIGURE.set(value, kind=kind, figure=name)
