"""An office where people label: a queue and its people over one database, on a machine whose clock is set by hand."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa

from kto_ray.config.people import Human
from kto_ray.people import keeping
from kto_ray.people.clock import clock_of
from kto_ray.people.intake import Intake
from kto_ray.people.overview import Overview, overview
from kto_ray.people.people import People, Refused
from kto_ray.people.queue import Queue
from kto_ray.people.tables import open_database
from kto_ray.people.tallies import Tallies
from kto_ray.people.terms import NewItem

LEASE_S = 100


class Machine:
    """A computer's clocks, set by hand."""

    def __init__(self) -> None:
        self.wall, self.up = 1_800_000_000.0, 7.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.up

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.up += seconds


class Caller:
    """Somebody with a link: the queue's methods, called with its badge."""

    def __init__(self, office: "Office", badge: str) -> None:
        self.office, self.badge = office, badge

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(getattr(self.office.queue, method), self.badge)

    def take(self, count: int = 1) -> list[str]:
        return [offer.item for offer in self.lease(count)]

    def label(self, verdict: str = "desirable", count: int = 1) -> list[str]:
        """Take images and say the same of them all."""
        taken = self.take(count)
        for item in taken:
            self.answer(item, verdict)
        return taken


class Office:
    """A queue and its people over one database; `crash` throws them away and opens it anew."""

    def __init__(self, url: str, machine: Machine, human: Human, max_policy_lag: int = 0) -> None:
        self.url, self.machine, self.human, self.max_policy_lag = url, machine, human, max_policy_lag
        self.open()

    def open(self) -> None:
        self.engine = open_database(self.url, "run")
        if self.engine.name == "sqlite":
            self.engine.dispose()
            sa.event.listen(
                self.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = OFF")
            )  # no test needs it
        self.clock = clock_of(self.engine)
        self.intake = Intake(self.engine, self.human, self.clock)
        self.queue = Queue(self.engine, self.human, self.clock, self.max_policy_lag)
        self.people = People(self.engine, self.human, self.clock)
        self.tallies = Tallies()

    def crash(self, back: float = 0, up: float = 3) -> None:
        """The computer starts again; its clock may have gone back."""
        self.engine.dispose()
        self.machine.wall -= back
        self.machine.up = up
        self.open()

    def admit(self, *names: str) -> list[Caller]:
        return [Caller(self, self.people.admit(name).id) for name in names]

    def draw(self, number: int, count: int, needed: int = 1, version: int | None = None, first: int = 0) -> None:
        """Images of a round, made by the policy of its number."""
        version = number if version is None else version
        new = [new_item(number, i, needed=needed, policy_version=version) for i in range(first, first + count)]
        self.intake.add(stage(number), number, new)

    def end_round(self, number: int) -> list[str]:
        """Seal a round; the samples that went into it."""
        self.intake.finish(stage(number), number)
        return [judged.sample_id for judged in self.intake.seal(stage(number))]

    def view(self) -> Overview:
        """What the operator sees."""
        if not self.people.badges_of("operator"):
            self.people.admit("operator", "operator")
        badge = self.people.badges_of("operator")[0].id
        return overview(self.engine, self.human, badge, self.clock, self.tallies)

    def drop_images(self) -> None:
        """Those that nobody will be shown any more."""
        keeping.drop(self.engine, keeping.spare(self.engine, self.max_policy_lag, self.clock()))

    def facts(self) -> "Facts":
        return Facts.read(self.engine)

    def labels(self) -> dict[str, str | None]:
        return {sample: row["label"] for sample, row in self.facts().items.items()}


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give, made by as many threads at the same moment; of a refused one, the refusal."""
    barrier = Barrier(len(calls))

    def make(call: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return call()
        except Refused as refusal:
            return refusal

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(make, calls))


def stage(number: int) -> str:
    return f"round-{number:05}"


def new_item(number: int, index: int, **more: Any) -> NewItem:
    name = f"{stage(number)}-{index:03}"
    return NewItem(name, f"p{index}", f"prompt {index}", f"PNG of {name}".encode(), **more)


def gold(count: int, answer: str = "desirable") -> list[NewItem]:
    return [
        NewItem(f"gold-{answer}-{i:03}", f"g{i}", f"known {i}", b"PNG", expected=answer)  # type: ignore[arg-type]
        for i in range(count)
    ]


Row = dict[str, Any]


@dataclass
class Facts:
    """What the database holds, row by row; items by sample, people by name, leases by both."""

    items: dict[str, Row]
    answers: list[Row]
    leases: dict[tuple[str, str], Row]
    labelers: dict[str, Row]
    rounds: list[Row]
    badges: list[Row]
    images: dict[str, bytes]

    @classmethod
    def read(cls, engine: sa.Engine) -> "Facts":
        with engine.begin() as connection:

            def rows(table: str, order: str = "id") -> list[Row]:
                return [
                    dict(row)
                    for row in connection.execute(sa.text(f"SELECT * FROM {table} ORDER BY {order}")).mappings()
                ]

            items, labelers = rows("items"), rows("labelers")
            sample = {row["id"]: row["sample_id"] for row in items}
            name = {row["id"]: row["name"] for row in labelers}
            answers, leases = (
                [{**row, "sample": sample[row["item"]], "who": name[row["labeler"]]} for row in rows(table)]
                for table in ("answers", "leases")
            )
            return cls(
                items={row["sample_id"]: row for row in items},
                answers=[{**row, "late": bool(row["late"])} for row in answers],
                leases={(row["sample"], row["who"]): row for row in leases},
                labelers={row["name"]: row for row in labelers},
                rounds=rows("rounds", "number"),
                badges=rows("badges"),
                images={sample[row["item"]]: bytes(row["png"]) for row in rows("images", "item")},
            )

    def counting(self, sample: str) -> list[str]:
        rows = [row for row in self.answers if row["sample"] == sample and row["void"] is None]
        return [row["verdict"] for row in rows if row["verdict"] != "skip"]


@contextmanager
def refused(why: str, message: str | None = None) -> Iterator[None]:
    """Of `Refused`, and in which words, if it matters."""
    with pytest.raises(Refused) as caught:
        yield
    assert (caught.value.why, caught.value.message) == (why, message or caught.value.message)
