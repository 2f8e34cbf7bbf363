"""What the operator sees of the labeling, and every answer as a table: for `web/`, the round's record and exports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy import func, select

from kto_ray.config.people import Human
from kto_ray.people.agreement import Reliability
from kto_ray.people.people import doubt, require_operator, works
from kto_ray.people.settling import OPEN
from kto_ray.people.tables import answers, badges, in_transaction, items, labelers, leases, rounds
from kto_ray.people.tallies import Labels, Tallies

RATE_S = 600.0
"""Over so many seconds rates are taken."""

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("policy_version", pa.int32()),
        pa.field("labeler", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("seconds", pa.float64()),
        pa.field("answered_at", pa.float64(), nullable=False),
        pa.field("late", pa.bool_(), nullable=False),
        pa.field("void", pa.string()),
        pa.field("known_answer", pa.string()),
        pa.field("label", pa.string()),
        pa.field("sealed_in", pa.string()),
    ]
)
"""A row an answer. `void`: null, "undone" or "excluded"; `known_answer`: of gold; `label`: what all answers on the
sample came to, null while it is open; `sealed_in`: the stage of the round that the label went into."""


@dataclass(frozen=True)
class LabelerRow:
    """One person. Shares are in [0, 1], None where there is nothing to take them of."""

    name: str
    answers: int
    desirable: int
    undesirable: int
    unsure: int
    skipped: int
    per_minute: float
    median_seconds: float | None
    agreement: float | None
    gold_right: int
    gold_seen: int
    doubt: str | None
    """Why the answers on gold make the others doubtful."""
    excluded_why: str | None
    links: int
    looking_at: int
    last_at: float | None


@dataclass(frozen=True)
class RoundRow:
    """A round: images that people were asked about, and what they came to."""

    number: int
    asked: int
    desirable: int
    undesirable: int
    abstained: int
    open: int
    state: str
    """"drawing", "open" or "sealed"."""


@dataclass(frozen=True)
class Overview:
    """Everything on the operator's page. `waiting`: images that need answers; `leased`: that people look at now."""

    labelers: list[LabelerRow]
    rounds: list[RoundRow]
    waiting: int
    leased: int
    agreement: Reliability
    recent: dict[str, list[str]]
    """Items by label, the latest first."""


def overview(engine: sa.Engine, settings: Human, badge: str, clock: Callable[[], float], tallies: Tallies) -> Overview:
    """Everything as it is now.

    Args:
        tallies: of this database; brought up to date here.

    Raises:
        Refused: the badge is not the operator's.
    """

    def work(connection: sa.Connection) -> Overview:
        now = clock()
        require_operator(connection, badge, now)
        while tallies.follow(connection):
            pass
        found = connection.execute(select(rounds).order_by(rounds.c.number)).all()
        labels = tallies.labels(connection, {row.stage: row.sealed_at is not None for row in found})
        looked_at = select(func.count(leases.c.item.distinct())).select_from(leases.join(items))
        looked_at = looked_at.where(leases.c.expires_at > now, OPEN, items.c.stage.is_not(None))
        return Overview(
            labelers=_labeler_rows(connection, settings, tallies, now),
            rounds=[_round_row(row, labels[row.stage]) for row in reversed(found)],
            waiting=sum(images[None, False] for images in labels.values()),
            leased=connection.scalar(looked_at) or 0,
            agreement=tallies.agreement(),
            recent={label: tallies.recent(connection, label) for label in ("desirable", "undesirable", "abstain")},
        )

    return in_transaction(engine, work)


def catch_up(engine: sa.Engine, tallies: Tallies) -> bool:
    """Count some of the answers that are not counted yet; whether there were any."""
    return in_transaction(engine, tallies.follow)


def _labeler_rows(connection: sa.Connection, settings: Human, tallies: Tallies, now: float) -> list[LabelerRow]:
    def numbers(table: sa.Table, which: sa.ColumnElement[bool]) -> dict[int, int]:
        rows = select(table.c.labeler, func.count().label("number")).where(which).group_by(table.c.labeler)
        return {row.labeler: row.number for row in connection.execute(rows)}

    links, looking, rows = numbers(badges, works(now)), numbers(leases, leases.c.expires_at > now), []
    for person in connection.execute(select(labelers).where(labelers.c.role == "labeler").order_by(labelers.c.name)):
        tally = tallies.people[person.id]
        rows.append(
            LabelerRow(
                name=person.name,
                answers=tally.said.total(),
                desirable=tally.said["desirable"],
                undesirable=tally.said["undesirable"],
                unsure=tally.said["unsure"],
                skipped=tally.said["skip"],
                per_minute=tally.since(now - RATE_S) / (RATE_S / 60),
                median_seconds=tally.median_seconds,
                agreement=tally.agreement,
                gold_right=tally.known[True],
                gold_seen=tally.known.total(),
                doubt=doubt(settings, tally.known),
                excluded_why=person.excluded_why,
                links=links.get(person.id, 0),
                looking_at=looking.get(person.id, 0),
                last_at=tally.at[-1] if tally.at else None,
            )
        )
    return rows


def _round_row(round_: sa.Row[Any], labels: Labels) -> RoundRow:
    return RoundRow(
        number=round_.number,
        asked=labels.total(),
        desirable=labels["desirable", False] + labels["desirable", True],
        undesirable=labels["undesirable", False] + labels["undesirable", True],
        abstained=labels["abstain", False] + labels["abstain", True],
        open=labels[None, False] + labels[None, True],
        state="sealed" if round_.sealed_at else "open" if round_.finished_at else "drawing",
    )


def answers_table(engine: sa.Engine, sealed_in: str | None = None) -> pa.Table:
    """Every answer that was ever given, void ones included, in order; see `ANSWER_SCHEMA`.

    Args:
        sealed_in: only those on samples whose label went into the round of this stage.
    """
    columns = (
        *(items.c.sample_id, items.c.prompt_id, items.c.prompt, items.c.policy_version),
        *(labelers.c.name.label("labeler"), answers.c.answer.label("answer"), answers.c.seconds),
        *(answers.c.at.label("answered_at"), answers.c.late, answers.c.void),
        *(items.c.expected.label("known_answer"), items.c.label, items.c.sealed_in),
    )
    rows = select(*columns).select_from(answers.join(items).join(labelers)).order_by(answers.c.id)
    if sealed_in is not None:
        rows = rows.where(items.c.sealed_in == sealed_in)
    found = in_transaction(engine, lambda c: [dict(row) for row in c.execute(rows).mappings()])
    return pa.Table.from_pylist(found, ANSWER_SCHEMA)


def export(engine: sa.Engine, badge: str, clock: Callable[[], float]) -> pa.Table:
    """`answers_table`, for the operator. Raises Refused for others."""
    in_transaction(engine, lambda connection: require_operator(connection, badge, clock()))
    return answers_table(engine)
