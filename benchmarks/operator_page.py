"""What the operator's page costs every three seconds, by how many answers there are: it keeps tallies of them.

    python benchmarks/operator_page.py [--quick]

A look is all that the page asks the database for, after as many new answers as eight people give in three seconds.
Beside it stands what the page did before tallies were kept, or rather a bound of it: every answer is read, with nothing
done with it. Counting anew is what the first look after a start of the desk does, in steps between which others call.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from labeling import postgres
from measuring import Table, median_and_range, ratios, run_alone

from kto_ray.config.people import Human
from kto_ray.people.clock import clock_of
from kto_ray.people.overview import overview
from kto_ray.people.people import People
from kto_ray.people.settling import decide
from kto_ray.people.tables import answers, images, in_transaction, items, labelers, open_database, rounds
from kto_ray.people.tallies import Tallies

PEOPLE, NEW, ROUND = 8, 24, 1200
SHARED = 0.3
"""So large a share of the images is judged by two."""


class Labeling:
    """A database of people's answers, of as many as are asked for: all but the last round are sealed."""

    def __init__(self, url: str) -> None:
        self.engine, self.human, self.rng = open_database(url, "benchmark"), Human(), random.Random(0)
        self.clock, self.tallies, self.images, self.answers = clock_of(self.engine), Tallies(), 0, 0
        people = People(self.engine, self.human, self.clock)
        self.operator = people.admit("operator", "operator").id
        for number in range(PEOPLE):
            people.admit(f"labeler-{number}")

    def grow(self, to: int) -> None:
        """Until there are so many answers, ten a second."""
        while self.answers < to:
            in_transaction(self.engine, lambda connection: self._add(connection, min(ROUND, to - self.answers)))

    def _add(self, connection: sa.Connection, count: int) -> None:
        number, now = self.answers // ROUND, self.clock()
        stage, rows = f"round-{number:05}", {table: list[dict[str, Any]]() for table in (items, images, answers)}
        if not connection.scalar(sa.select(sa.exists().where(rounds.c.stage == stage))):
            last = rounds.c.sealed_at.is_(None)
            judged = items.update().where(items.c.sealed_in.is_(None))
            connection.execute(judged.values(sealed_in=items.c.stage))
            connection.execute(rounds.update().where(last).values(sealed_at=now))
            connection.execute(rounds.insert().values(stage=stage, number=number, finished_at=now))
        people = connection.scalars(sa.select(labelers.c.id).where(labelers.c.role == "labeler")).all()
        while len(rows[answers]) < count:
            who = self.rng.sample(people, 1 + (self.rng.random() < SHARED))
            said = [self.rng.choices(("desirable", "undesirable", "unsure"), (5, 4, 1))[0] for _ in who]
            item = {"id": f"{self.images:016}", "sample_id": f"{stage}-{self.images:06}", "stage": stage}
            item |= {"number": number, "policy_version": number, "prompt_id": "p", "prompt": "a red circle"}
            item |= {"needed": len(who), "shuffle": self.rng.random(), "label": decide("majority", said)}
            rows[items].append(item)
            rows[images].append({"item": item["id"], "png": b"PNG"})
            for labeler, answer in zip(who, said, strict=True):
                seconds, at = self.rng.uniform(0.5, 5), now + len(rows[answers]) / 10
                answer_row = {"item": item["id"], "labeler": labeler, "answer": answer, "seconds": seconds}
                rows[answers].append(answer_row | {"at": at, "late": False})
            self.images += 1
        for table, new in rows.items():
            connection.execute(table.insert(), new)
        self.answers += len(rows[answers])

    def look(self) -> None:
        overview(self.engine, self.human, self.operator, self.clock, self.tallies)

    def read(self) -> None:
        said = (labelers.c.name, answers.c.item, answers.c.answer, answers.c.seconds, answers.c.at)
        rows = sa.select(*said).select_from(answers.join(items).join(labelers))
        in_transaction(self.engine, lambda connection: connection.execute(rows).all())

    def count_anew(self) -> None:
        self.tallies = Tallies()
        self.look()


def seconds_of(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(quick: bool) -> Table:
    """Let two databases grow, and look at them meanwhile."""
    sizes, repeats = ((240, 2400), 1) if quick else ((2_040, 20_400, 204_000), 7)
    rows = []
    with databases() as urls:
        labelings = {name: Labeling(url) for name, url in urls.items()}
        for size in sizes:
            for name, labeling in labelings.items():
                labeling.grow(size)
                anew, looks, reads = seconds_of(labeling.count_anew), list[float](), list[float]()
                for repeat in range(repeats):
                    labeling.grow(labeling.answers + NEW)
                    sides = [(looks, labeling.look), (reads, labeling.read)]
                    for figures, work in sides[:: 1 if repeat % 2 else -1]:
                        figures.append(seconds_of(work))
                row = (f"{size:,}, {name}", *median_and_range(ratios(reads, looks), "{:.1f}"))
                rows.append((*row, milliseconds(looks), milliseconds(reads), f"{anew:.2f} s"))
        for labeling in labelings.values():
            labeling.engine.dispose()
    return Table(
        title="The operator's page",
        columns=("answers", "all read / a look", "lowest - highest", "a look, ms", "all read, ms", "counted anew"),
        rows=rows,
        note=f"Median of {repeats} repeats; {NEW} answers came before each look.",
    )


@contextmanager
def databases() -> Iterator[dict[str, str]]:
    """URLs by name."""
    with tempfile.TemporaryDirectory() as folder, postgres() as server:
        yield {"SQLite": f"sqlite:///{Path(folder)}/people.sqlite", "PostgreSQL": server}


def milliseconds(seconds: Sequence[float]) -> str:
    return median_and_range([1000 * value for value in seconds], "{:.0f}")[0]


if __name__ == "__main__":
    run_alone(measure, __doc__)
