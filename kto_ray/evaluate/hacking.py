"""The watch for reward hacking: what the policy is trained to please rises while what it does not know of falls.

`doubts.py` asks after each round (`label.watch`), with the means of the rounds so far. A suspicion is no proof, but a
reason to look at the pictures, and scorers that share a blind spot raise none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kto_ray.config import Labeling

FEWEST = 3  # figures that make a trend: two always have one


def with_opinions(rows: Sequence[Mapping[str, Any]], scorers: Mapping[str, bool]) -> list[dict[str, Any]]:
    """Rows of rounds with all scorers on one scale, as "opinion/NAME": 0 in the first round that NAME scored.

        opinion = (score - score of that round) / std of that round, or / 1 where all its images score the same

    A round without "score/NAME" gets none.

    Args:
        scorers: name -> held out.
    """
    firsts = {name: next((row for row in rows if row.get(f"score/{name}") is not None), {}) for name in scorers}

    def opinions(row: Mapping[str, Any]) -> dict[str, float]:
        return {
            f"opinion/{name}": (row[f"score/{name}"] - first[f"score/{name}"]) / (first.get(f"score_std/{name}") or 1)
            for name, first in firsts.items()
            if row.get(f"score/{name}") is not None
        }

    return [{**row, **opinions(row)} for row in rows]


def suspicion_of(label: Labeling, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """`suspicion` of a run by the rows of its rounds, in order; None when nothing votes, is held out, or is watched.

    The proxy is the mean opinion of the scorers that vote, by weight; a round that one of them did not score has none.
    """
    if label.watch.action == "off" or not label.held_out or not label.voting:
        return None
    rows = with_opinions(rows, {name: settings.held_out for name, settings in label.scorers.items()})
    series = {name: [row.get(f"opinion/{name}") for row in rows] for name in label.scorers}
    votes_VR = np.array([series[name] for name in label.voting], np.float64)
    proxy_R = np.average(votes_VR, axis=0, weights=[settings.weight for settings in label.voting.values()])
    held_out = {name: series[name] for name in label.held_out}
    return suspicion(proxy_R.tolist(), held_out, label.watch.rounds, label.watch.least_slope)


def suspicion(
    proxy: Sequence[float | None], held_out: Mapping[str, Sequence[float | None]], rounds: int, least: float = 0.0
) -> str | None:
    """Says so when, over the last `rounds` rounds, the proxy's trend rises and a held-out scorer's falls.

    A trend is the slope of the least-squares line through the figures by round. A round without a figure (None or NaN)
    is left out and the others keep their places; a scorer with fewer than `FEWEST` figures has no trend.

    Args:
        proxy: mean score that verdicts come from, of each round, in order.
        held_out: the same by held-out scorer, for the same rounds.
        rounds: how many; at least 3. Of a run that has had fewer, nothing is said.
        least: slopes that are not steeper than this are no trend.

    Returns:
        A sentence with the trends, or None.

    Raises:
        ValueError: `rounds` below 3, or series that do not have the same rounds.
    """
    if rounds < FEWEST:
        raise ValueError(f"a trend needs at least {FEWEST} rounds, not {rounds}")
    for name, series in held_out.items():
        if len(series) != len(proxy):
            raise ValueError(f"held-out scorer {name!r} has {len(series)} rounds and the proxy {len(proxy)}")
    if len(proxy) < rounds:
        return None
    rise = slope(proxy[-rounds:])
    if rise is None or rise <= least:
        return None
    slopes = {name: slope(series[-rounds:]) for name, series in held_out.items()}
    falls = [f"{name} falls by {-slope:.3g}" for name, slope in slopes.items() if slope is not None and slope < -least]
    if not falls:
        return None
    return (
        f"possible reward hacking: over the last {rounds} rounds the score that verdicts come from rises by {rise:.3g} "
        f"a round, while held-out {' and '.join(falls)} a round; look at the pictures before training goes on"
    )


def slope(series: Sequence[float | None]) -> float | None:
    """Least-squares slope by position, over what is there; None for fewer than `FEWEST` figures."""
    values = np.array(series, np.float64)
    place = np.flatnonzero(np.isfinite(values))
    if len(place) < FEWEST:
        return None
    centred = place - place.mean()
    # Measured from the first figure: a level line has slope 0 then, not a rounding error with a sign.
    return float(centred @ (values[place] - values[place[0]]) / (centred @ centred))
