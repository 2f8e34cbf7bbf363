"""What all answers come to, kept for the operator's page: at every look only what came since the one before is read.

`overview.py` makes the page of it, and `desk.py` keeps it. Answers are only added, or become void, which `voids` lists
in that order. So two ids say how far they were counted, whoever else writes to the database; with those, the answers on
an image as they were at the look before follow from its rows. A new process counts from the beginning, and so does one
that sees that the run was rewound.
"""

from bisect import bisect_right, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from statistics import median
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select, union

from kto_ray.people.agreement import Mix, Reliability, mix_of, reliability
from kto_ray.people.rewinding import REWOUND
from kto_ray.people.tables import answers, images, items, meta, voids

Row = sa.Row[Any]
STEP = 1000
"""So many answers are counted at a time: other calls need not wait until all of a long run's are."""
RECENT = 24
"""So many images of each label are shown."""


@dataclass
class PersonTally:
    """What one person's standing answers come to."""

    said: Counter[str] = field(default_factory=Counter)
    known: Counter[bool] = field(default_factory=Counter)
    """Answers on images of gold, right (True) or wrong."""
    alike: Counter[bool] = field(default_factory=Counter)
    """Other people's answers on the same images, as this one's (True) or not."""
    seconds: list[float] = field(default_factory=list)
    """That the answers took."""
    at: list[float] = field(default_factory=list)
    """When they were given, in order."""

    def add(self, row: Row) -> None:
        self.said[row.answer] += 1
        insort(self.at, row.at)  # mostly at the end
        if row.seconds is not None:
            self.seconds.append(row.seconds)

    def take_out(self, row: Row) -> None:
        self.said[row.answer] -= 1
        self.at.remove(row.at)
        if row.seconds is not None:
            self.seconds.remove(row.seconds)

    def since(self, at: float) -> int:
        """Answers after a time."""
        return len(self.at) - bisect_right(self.at, at)

    @property
    def median_seconds(self) -> float | None:
        self.seconds.sort()  # and kept so: the next time it is done at once
        return median(self.seconds) if self.seconds else None

    @property
    def agreement(self) -> float | None:
        return self.alike[True] / self.alike.total() if self.alike.total() else None


Labels = Counter[tuple[str | None, bool]]
"""Images by their label, None for none, and whether they are sealed."""


class Tallies:
    """See the module. `follow` brings them up to date; in the same transaction the others are asked."""

    def __init__(self) -> None:
        self._begin(None)

    def _begin(self, rewound: str | None) -> None:
        self._rewound = rewound
        self._answer = self._void = 0  # the last ones that were counted
        self.people: defaultdict[int, PersonTally] = defaultdict(PersonTally)  # by the labeler's id
        self._mixes: Counter[Mix] = Counter()
        self._labels: dict[str, Labels] = {}  # of stages in which only answers can change something
        self._recent: dict[str, dict[str, int]] = {}  # by label: items, and the last answer on each
        self._oldest: dict[str, int] = {}  # by label: `_recent` lacks items whose last answer was before this one

    def follow(self, connection: sa.Connection) -> bool:
        """Count some of what came since the last time; whether there was anything."""
        rewound = connection.scalar(select(meta.c.value).where(meta.c.key == REWOUND))
        if rewound != self._rewound:
            self._begin(rewound)
        new = select(answers.c.id).where(answers.c.id > self._answer).order_by(answers.c.id).limit(STEP)
        came = connection.scalars(new).all()
        gone = select(voids.c.answer, voids.c.id).where(voids.c.id > self._void)
        void = {row.answer: row.id for row in connection.execute(gone)}
        if not came and not void:
            return False
        upto = came[-1] if came else self._answer
        touched = union(
            select(answers.c.item).where(answers.c.id > self._answer, answers.c.id <= upto),
            select(answers.c.item).join(voids).where(voids.c.id > self._void, answers.c.id <= self._answer),
        )
        found = connection.execute(
            select(answers, items.c.stage, items.c.expected, items.c.label)
            .select_from(answers.join(items))
            .where(answers.c.item.in_(touched.subquery().select()), answers.c.id <= upto)
            .order_by(answers.c.item, answers.c.id)
        ).all()
        for _, rows in groupby(found, key=lambda row: row.item):
            self._count([*rows], void.keys())
        self._answer, self._void = upto, max(void.values(), default=self._void)
        return True

    def _count(self, rows: Sequence[Row], void: Iterable[int]) -> None:
        """All answers on one image, some of which were counted before.

        Args:
            void: answers that became void since.
        """
        before = {row.id: row for row in rows if row.id <= self._answer and (row.void is None or row.id in void)}
        now = {row.id: row for row in rows if row.void is None}
        for key in before.keys() - now.keys():
            self.people[before[key].labeler].take_out(before[key])
        for key in now.keys() - before.keys():
            self.people[now[key].labeler].add(now[key])
        self._compare(before.values(), -1)
        self._compare(now.values(), 1)
        image = rows[-1]
        if image.expected is None:
            self._labels.pop(image.stage, None)
            self._place(image)

    def _compare(self, said: Iterable[Row], times: int) -> None:
        """With what is known of the image, and with each other."""
        counting = [row for row in said if row.answer != "skip"]
        for row in counting:
            if row.expected is not None:
                self.people[row.labeler].known[row.answer == row.expected] += times
        if counting and counting[0].expected is None:
            self._mixes[mix_of(row.answer for row in counting)] += times
            for one, other in combinations(counting, 2):
                for row in (one, other):
                    self.people[row.labeler].alike[one.answer == other.answer] += times

    def _place(self, image: Row) -> None:
        """Among the recent ones."""
        for known in self._recent.values():
            known.pop(image.item, None)
        if image.label is not None and image.id >= self._oldest.get(image.label, 0):
            recent = self._recent.setdefault(image.label, {})
            recent[image.item] = image.id
            if len(recent) > 8 * RECENT:
                self._remember(image.label, recent)

    def _remember(self, label: str, recent: Mapping[str, int]) -> None:
        """The latest of these, and that there are others."""
        latest = sorted(recent, key=recent.__getitem__, reverse=True)[: 4 * RECENT]
        self._recent[label] = {item: recent[item] for item in latest}
        self._oldest[label] = recent[latest[-1]]

    def agreement(self) -> Reliability:
        return reliability(self._mixes)

    def labels(self, connection: sa.Connection, stages: Mapping[str, bool]) -> dict[str, Labels]:
        """What became of the images of each stage.

        Args:
            stages: all that there are, in order; whether they are sealed.
        """
        found = {stage: self._labels.get(stage, Labels()) for stage in stages}
        of = (items.c.stage, items.c.label, items.c.sealed_in.is_not(None))
        again = items.c.stage.in_([stage for stage in stages if stage not in self._labels])
        for stage, label, sealed, number in connection.execute(select(*of, func.count()).where(again).group_by(*of)):
            found[stage][label, bool(sealed)] = number
        # After a crash, images may be added to the last one even when it is sealed.
        self._labels = {stage: found[stage] for stage in [*stages][:-1] if stages[stage]}
        return found

    def recent(self, connection: sa.Connection, label: str) -> list[str]:
        """The items of a label whose images are kept, the latest first: after a rewinding, some may be gone."""
        if label in self._oldest and len(self._recent[label]) < RECENT:  # many answers were taken out
            latest = func.max(answers.c.id).label("latest")
            rows = select(items.c.id, latest).select_from(items.join(answers)).where(items.c.label == label)
            rows = rows.group_by(items.c.id).order_by(latest.desc()).limit(4 * RECENT)
            self._remember(label, {row.id: row.latest for row in connection.execute(rows)})
        recent = self._recent.get(label, {})
        kept = connection.scalars(select(images.c.item).where(images.c.item.in_([*recent])))
        return sorted(kept, key=recent.__getitem__, reverse=True)[:RECENT]
