"""What a run is at, how it stands, and how healthy its learning is: in words.

The doubts and hints are those that the run itself says (`evaluate/doubts.py`, `evaluate/hints.py`), made anew from the
same rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kto_ray.config import RunConfig
from kto_ray.evaluate.albums import Album
from kto_ray.evaluate.collapse import figure
from kto_ray.evaluate.doubts import doubts_of
from kto_ray.evaluate.hints import hints_of
from kto_ray.outbox import Row
from kto_ray.watch.reading import Now, WatchedRun

State = Literal["runs", "silent", "stopped", "finished"]
SILENT_FACTOR = 2
"""A driver whose claim was not renewed for so many times as long as it takes to be taken over is said to be silent."""
LATEST = 5
"""Rounds that the time left is estimated by."""


@dataclass(frozen=True)
class StageProgress:
    """One thing that images of a round go through, and how far it is."""

    what: str
    done: int
    of: int


@dataclass(frozen=True)
class RunStanding:
    """See the module. `doing` is a sentence without a full stop; `left_s`: None where nobody can tell; `took_s`: all
    that a run that has ended took, or its last start."""

    state: State
    doing: str
    progress: Sequence[StageProgress]
    rounds: int
    trained: int
    images: int
    left_s: float | None
    took_s: float | None


@dataclass(frozen=True)
class HealthNote:
    """One sentence on a run's health."""

    kind: Literal["doubt", "hint", "fine", "figures"]
    text: str


def standing_of(run: WatchedRun) -> RunStanding:
    """How a run stands now."""
    now, config = run.now(), run.config
    rows, keys = now.rows["round"], now.keys["round"]
    newest = run.album(keys[-1]) if keys else None
    state = _state(now, config)
    doing, progress = _doing(run, now, newest) if state == "runs" else (_ended(now, state), ())
    # Those of rounds without a row are counted; the others' rows say how many there were.
    written = {int(row["step"]) for row in rows}
    counted = sum(len(run.album(key).images) for key in keys if key.number not in written)
    labels = ("desirable", "undesirable", "abstained", "failed", "pending")
    return RunStanding(
        state=state,
        doing=doing,
        progress=progress,
        rounds=config.rounds,
        trained=len(rows),
        images=counted + sum(int(row.get(label) or 0) for row in rows for label in labels),
        left_s=_left_s(rows, config.rounds) if state == "runs" else None,
        took_s=now.summary.get("seconds", {}).get("total") if now.summary and state == "finished" else None,
    )


def _state(now: Now, config: RunConfig) -> State:
    if now.summary is not None and len(now.rows["round"]) >= min(config.rounds, now.summary.get("rounds", 0)):
        return "finished"
    if now.claim is None or now.claim.released or now.claim.process_gone:
        return "stopped"
    return "silent" if now.claim.silent_s > SILENT_FACTOR * now.claim.stale_s else "runs"


def _ended(now: Now, state: State) -> str:
    if state == "finished":
        return "the run has ended"
    if state == "silent" and now.claim:
        return (
            f"nothing was heard of the driver ({now.claim}) for {now.claim.silent_s / 60:.0f} min; if it is gone, the "
            "same command goes on with the run"
        )
    return "no driver works on it; the same command goes on with it"


def _doing(run: WatchedRun, now: Now, newest: Album | None) -> tuple[str, Sequence[StageProgress]]:
    for kind in ("evaluation", "fresh_evaluation"):
        if now.keys[kind] and not (album := run.album(now.keys[kind][-1])).sealed:
            base = now.rows[kind][0].get("images") if now.rows[kind] else None
            of = int(base) if base else len(album.images)
            scored = sum(bool(image.scores) for image in album.images)
            bars = [StageProgress("drawn", len(album.images), of), StageProgress("scored", scored, of)]
            return f"policy {album.key.number} is being evaluated", bars
    if newest is None:
        return "it is starting", ()
    number = newest.key.number
    if not newest.sealed:
        images, of = newest.images, run.config.generate.images_per_round
        scored, judged = sum(bool(image.scores) for image in images), sum(image.verdict is not None for image in images)
        bars = [
            StageProgress("drawn", len(images), of),
            StageProgress("scored", scored, of),
            StageProgress("judged", judged, of),
        ]
        whom = "drawn and scored"
        if len(images) >= of:
            whom = "judged by people" if run.config.label.people else "judged"
        return f"round {number} is being {whom}", bars
    if number not in {int(row["step"]) for row in now.rows["round"]}:
        return f"the model learns from round {number}", ()
    return f"round {number} is done, the next one begins", ()


def _left_s(rows: Sequence[Row], rounds: int) -> float | None:
    """By how far apart the last rounds ended."""
    ends = [float(row["time"]) for row in rows[-LATEST - 1 :] if "time" in row]
    if len(ends) < 2:
        return None
    return (ends[-1] - ends[0]) / (len(ends) - 1) * max(0, rounds - len(rows))


# -- health -----------------------------------------------------------------------------------------------------------


def health_of(config: RunConfig, rows: Sequence[Row]) -> list[HealthNote]:
    """What the rows of the rounds so far, in order, say: doubts first, then hints, and the last round's figures."""
    if not rows:
        return [HealthNote("fine", "No round has been trained on yet, so there is nothing to say.")]
    found = [HealthNote("doubt", _sentence(doubt.text)) for doubt in doubts_of(config, rows)]
    found += [HealthNote("hint", _sentence(hint)) for hint in hints_of(config, rows).values()]
    if not found:
        found.append(HealthNote("fine", f"Nothing gives reason to doubt after round {rows[-1]['step']}."))
    if text := _figures(rows[-1]):
        found.append(HealthNote("figures", f"Round {rows[-1]['step']}: {text}."))
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _figures(row: Mapping[str, Any]) -> str:
    """In words, without those that the round does not have."""
    texts = []
    yes, no = figure(row, "desirable"), figure(row, "undesirable")
    if yes + no > 0:
        texts.append(f"{yes / (yes + no):.0%} of the verdicts say yes")
    accuracy, saturated = figure(row, "objective/accuracy"), figure(row, "objective/saturated")
    if not math.isnan(accuracy):
        texts.append(
            f"in {accuracy:.0%} of the draws the model has moved towards what was liked, or away from what was not "
            "(half would be chance)"
        )
    if not math.isnan(saturated):
        texts.append(f"{saturated:.0%} of the draws lie where the utility is flat and teach next to nothing")
    good, bad = figure(row, "objective/g_desirable"), figure(row, "objective/g_undesirable")
    if not math.isnan(good + bad):
        side = "as they should" if good > bad else "the wrong way round"
        texts.append(f"implicit rewards of yes and no lie {good - bad:+.3g} apart, {side}")
    return "; ".join(texts)
