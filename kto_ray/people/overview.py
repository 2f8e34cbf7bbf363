"""What the operator sees of the labeling, and every answer as a table: for `web/`, the round's record and exports."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy import and_, exists, func, select

from kto_ray.config.people import Human
from kto_ray.people.agreement import Annotation, Reliability, agreement, agreement_of
from kto_ray.people.people import OPERATOR, doubt, known_answers, require_operator, works
from kto_ray.people.settling import COUNTS, OPEN, STANDS
from kto_ray.people.tables import answers, badges, in_transaction, items, labelers, leases, rounds

RATE_S = 600.0
"""Over so many seconds rates are taken."""
RECENT = 24
"""So many images of each verdict are shown."""

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


def overview(engine: sa.Engine, settings: Human, badge: str, clock: Callable[[], float]) -> Overview:
    """Raises Refused when the badge is not the operator's."""

    def work(connection: sa.Connection) -> Overview:
        now = clock()
        require_operator(connection, badge, now)
        said = _said(connection)
        open_items = and_(OPEN, items.c.stage.is_not(None))
        looked_at = exists().where(leases.c.item == items.c.id, leases.c.expires_at > now)
        return Overview(
            labelers=_labeler_rows(connection, settings, said, now),
            rounds=_round_rows(connection),
            waiting=connection.scalar(select(func.count()).where(open_items)) or 0,
            leased=connection.scalar(select(func.count()).where(open_items, looked_at)) or 0,
            agreement=agreement(said),
            recent={label: _recent(connection, label) for label in ("desirable", "undesirable", "abstain")},
        )

    return in_transaction(engine, work)


def _said(connection: sa.Connection) -> list[Annotation]:
    """Answers that count on images that are not gold."""
    rows = select(labelers.c.name, answers.c.item, answers.c.answer).select_from(answers.join(items).join(labelers))
    found = connection.execute(rows.where(COUNTS, items.c.expected.is_(None)))
    return [(name, item, answer) for name, item, answer in found]


def _labeler_rows(connection: sa.Connection, settings: Human, said: list[Annotation], now: float) -> list[LabelerRow]:
    agreed, rows = agreement_of(said), []
    for person in connection.execute(select(labelers).where(labelers.c.role != OPERATOR).order_by(labelers.c.name)):
        mine = and_(answers.c.labeler == person.id, STANDS)
        given = connection.execute(select(answers.c.answer, answers.c.seconds, answers.c.at).where(mine)).all()
        theirs = [row.answer for row in given]
        seconds = [row.seconds for row in given if row.seconds is not None]
        known = known_answers(connection, person.id)
        links = select(func.count()).where(badges.c.labeler == person.id, works(now))
        looking = select(func.count()).where(leases.c.labeler == person.id, leases.c.expires_at > now)
        rows.append(
            LabelerRow(
                name=person.name,
                answers=len(given),
                desirable=theirs.count("desirable"),
                undesirable=theirs.count("undesirable"),
                unsure=theirs.count("unsure"),
                skipped=theirs.count("skip"),
                per_minute=sum(row.at > now - RATE_S for row in given) / (RATE_S / 60),
                median_seconds=median(seconds) if seconds else None,
                agreement=agreed.get(person.name),
                gold_right=known[True],
                gold_seen=known.total(),
                doubt=doubt(settings, known),
                excluded_why=person.excluded_why,
                links=connection.scalar(links) or 0,
                looking_at=connection.scalar(looking) or 0,
                last_at=max((row.at for row in given), default=None),
            )
        )
    return rows


def _round_rows(connection: sa.Connection) -> list[RoundRow]:
    """The latest first."""
    found = []
    for round_ in connection.execute(select(rounds).order_by(rounds.c.number.desc())):
        labels = list(connection.scalars(select(items.c.label).where(items.c.stage == round_.stage)))
        found.append(
            RoundRow(
                number=round_.number,
                asked=len(labels),
                desirable=labels.count("desirable"),
                undesirable=labels.count("undesirable"),
                abstained=labels.count("abstain"),
                open=labels.count(None),
                state="sealed" if round_.sealed_at else "open" if round_.finished_at else "drawing",
            )
        )
    return found


def _recent(connection: sa.Connection, label: str) -> list[str]:
    latest = select(func.max(answers.c.id)).where(answers.c.item == items.c.id).scalar_subquery()
    return list(
        connection.scalars(select(items.c.id).where(items.c.label == label).order_by(latest.desc()).limit(RECENT))
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
