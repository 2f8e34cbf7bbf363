"""A state machine that drives an office, and a model of the queue in plain Python that foresees every row of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kto_ray.config.people import Human
from kto_ray.people import clock
from kto_ray.people.terms import ANSWERS, Offer, Standing
from tests.office import LEASE_S, Facts, Machine, Office, gold, new_item, refused, stage

NAMES = ("ann", "bob", "cai")
GOLD = 4


@dataclass
class Said:
    sample: str
    who: str
    verdict: str
    seconds: float
    at: float
    late: bool
    void: str | None = None


@dataclass
class Thing:
    """An item as the model knows it."""

    number: int | None
    version: int
    needed: int
    expected: str | None = None
    sealed: tuple[str, str | None] | None = None  # stage, and label; None: withdrawn


@dataclass
class Lease:
    until: float
    at: float
    order: int


@dataclass
class Model:
    """What should be so, in plain Python."""

    rule: str
    things: dict[str, Thing] = field(default_factory=dict)
    said: list[Said] = field(default_factory=list)
    leases: dict[tuple[str, str], Lease] = field(default_factory=dict)
    badges: dict[str, list[tuple[str, float]]] = field(default_factory=lambda: {name: [] for name in NAMES})
    revoked: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    rounds: dict[int, str] = field(default_factory=dict)  # "drawing", "finished", "sealed"
    granted: int = 0

    def counting(self, sample: str) -> list[str]:
        return [s.verdict for s in self.said if s.sample == sample and s.void is None and s.verdict != "skip"]

    def answer_of(self, sample: str, who: str) -> Said | None:
        return next((s for s in reversed(self.said) if (s.sample, s.who) == (sample, who)), None)

    def label(self, sample: str) -> str | None:
        """None: open, or withdrawn."""
        thing = self.things[sample]
        if thing.sealed:
            return thing.sealed[1]
        said = self.counting(sample)
        return rule_of(self.rule, said) if thing.expected is None and len(said) >= thing.needed else None

    def is_open(self, sample: str) -> bool:
        return self.things[sample].sealed is None and self.label(sample) is None

    def is_free(self, sample: str, who: str, now: float) -> bool:
        others = sum(
            leased == sample and other != who and lease.until > now for (leased, other), lease in self.leases.items()
        )
        return len(self.counting(sample)) + others < self.things[sample].needed

    def held(self, who: str, now: float) -> list[str]:
        """Images that are somebody's, in the order in which they were given."""
        mine = [
            (lease.order, sample)
            for (sample, owner), lease in self.leases.items()
            if owner == who and lease.until > now
        ]
        return [sample for _, sample in sorted(mine) if self.is_open(sample)]

    def askable(self, sample: str, who: str, now: float) -> bool:
        answer = self.answer_of(sample, who)
        answered = answer is not None and answer.void is None
        lease = self.leases.get((sample, who))
        return not answered and (lease is None or lease.until <= now)

    def wanted(self, who: str, now: float, lag: int) -> list[str]:
        """What somebody may be shown, best first."""
        upcoming = max((number + 1 for number, state in self.rounds.items() if state == "sealed"), default=0)
        found = [
            sample
            for sample, thing in self.things.items()
            if thing.expected is None
            and self.is_open(sample)
            and thing.version >= upcoming - lag
            and self.askable(sample, who, now)
            and self.is_free(sample, who, now)
        ]
        return sorted(found, key=self.urgency)

    def urgency(self, sample: str) -> tuple[int, int]:
        return (-(self.things[sample].number or 0), -len(self.counting(sample)))

    def why_not(self, who: str, badge: str, now: float) -> str | None:
        """Why somebody with this badge is not served."""
        until = dict(self.badges[who])[badge]
        if badge in self.revoked:
            return "revoked"
        return "expired" if until <= now else "excluded" if who in self.excluded else None

    def working(self, who: str, now: float) -> list[str]:
        return [badge for badge, until in self.badges[who] if until > now and badge not in self.revoked]

    def grant(self, sample: str, who: str, now: float, lease_s: float) -> None:
        self.granted += 1
        self.leases[sample, who] = Lease(now + lease_s, now, self.granted)

    def exclude(self, who: str) -> None:
        self.excluded.add(who)
        self.leases = {key: lease for key, lease in self.leases.items() if key[1] != who}
        for said in self.said:
            thing = self.things[said.sample]
            if said.who == who and said.void is None and thing.expected is None and not thing.sealed:
                said.void = "excluded"


who_ = st.sampled_from(NAMES)
pick_ = st.integers(0, 50)
verdict_ = st.sampled_from(ANSWERS)
rarely_ = st.integers(0, 9).map(lambda number: number == 9)


def rule_of(name: str, said: Sequence[str]) -> str:
    """The rules in other words than the code's."""
    if name == "unanimous":
        return said[0] if len(set(said)) == 1 and said[0] != "unsure" else "abstain"
    surplus = sum({"desirable": 1, "undesirable": -1, "unsure": 0}[verdict] for verdict in said)
    return "abstain" if surplus == 0 else "desirable" if surplus > 0 else "undesirable"


def check_promises(facts: Facts, rule_name: str, now: float) -> None:
    """What must hold of the rows alone, however they came about."""
    held = Counter(sample for (sample, _), lease in facts.leases.items() if lease["expires_at"] > now)
    standing = Counter((row["sample"], row["who"]) for row in facts.answers if row["void"] is None)
    assert not standing or max(standing.values()) == 1, "somebody has two standing answers on one image"
    both = {key for key, lease in facts.leases.items() if lease["expires_at"] > now} & standing.keys()
    assert not both, "somebody is still asked about what they have answered"
    states: Counter[str] = Counter()
    for sample, item in facts.items.items():
        said = facts.counting(sample)
        if item["expected"] is not None:
            assert (item["label"], item["sealed_in"], item["stage"]) == (None, None, None), "gold is never a label"
            continue
        assert len(said) + held[sample] <= item["needed"], "more people were asked than are needed"
        if item["label"] is None:
            states["withdrawn" if item["sealed_in"] else "open"] += 1
            assert len(said) < item["needed"], "an image with all its answers has no label"
        else:
            states["sealed" if item["sealed_in"] else "judged"] += 1
            assert len(said) == item["needed"], "a label without enough answers"
            assert item["label"] == rule_of(rule_name, said), "a label that does not follow from its answers"
    assert states.total() == sum(item["expected"] is None for item in facts.items.values())


class QueueMachine(RuleBasedStateMachine):
    """A queue, and a model of it that is told the same; the model foresees every refusal and every row."""

    def __init__(self, fresh: Callable[[], str]) -> None:
        super().__init__()
        self.machine, self.url = Machine(), fresh()
        self.patch = patch.object(clock, "time", self.machine)
        self.patch.start()
        self.accepted: list[tuple[str, str, str]] = []
        self.fixed: dict[str, tuple[Any, ...]] = {}  # sealed items and what was said of them

    def teardown(self) -> None:
        self.patch.stop()
        if hasattr(self, "office"):
            self.office.engine.dispose()

    @initialize(
        rule_name=st.sampled_from(["majority", "unanimous"]),
        action=st.sampled_from(["show", "exclude"]),
        lag=st.integers(0, 1),
        min_labels=st.none() | st.integers(1, 3),
        needed=st.lists(st.integers(1, 3), min_size=2, max_size=5),
    )
    def begin(self, rule_name: str, action: str, lag: int, min_labels: int | None, needed: list[int]) -> None:
        known = {"file": "gold.jsonl", "share": 0.3, "limit": 0.3, "least": 2, "action": action}
        human = Human(
            overlap={"rule": rule_name},
            gold=known,
            lease_s=LEASE_S,
            min_labels=min_labels,
            link_days=1,  # type: ignore[arg-type]
        )
        self.office, self.lag = Office(self.url, self.machine, human, lag), lag
        self.model = Model(rule_name)
        pieces = gold(GOLD // 2) + gold(GOLD // 2, "undesirable")
        self.office.intake.add_gold(pieces)
        self.model.things |= {piece.sample_id: Thing(None, 0, 1, piece.expected) for piece in pieces}
        for name in NAMES:
            self.admit(name)
        self.add(needed, 0)

    # -- helpers

    @property
    def now(self) -> float:
        return self.office.clock()

    @property
    def round(self) -> int:
        """The one that is not sealed."""
        return sum(state == "sealed" for state in self.model.rounds.values())

    def id_of(self, sample: str) -> str:
        return str(self.office.facts().items[sample]["id"])

    def badge(self, who: str, old: bool) -> str:
        badges = self.model.badges[who]
        return badges[0 if old else -1][0]

    def attempt(self, why: str | None, call: Callable[[], Any]) -> Any:
        """What a call gives; None when the model says that it must be refused, which then changes nothing."""
        if why is None:
            return call()
        before = self.office.facts()
        with refused(why):
            call()
        assert self.office.facts() == before
        event(f"refused: {why}")
        return None

    def pick(self, who: str, pick: int, any_item: bool) -> str:
        """One of somebody's images, or of all."""
        mine = sorted(sample for sample, owner in self.model.leases if owner == who)
        pool = sorted(self.model.things) if any_item or not mine else mine
        return pool[pick % len(pool)]

    # -- the loop's side

    @precondition(lambda self: self.model.rounds.get(self.round) != "finished")
    @rule(needed=st.lists(st.integers(1, 3), min_size=1, max_size=3), behind=st.integers(0, 2))
    def add(self, needed: list[int], behind: int) -> None:
        number, version = self.round, max(0, self.round - behind)
        first = sum(thing.number == number for thing in self.model.things.values())
        new = [new_item(number, first + i, needed=n, policy_version=version) for i, n in enumerate(needed)]
        for _ in range(2):  # twice is once
            self.office.intake.add(stage(number), number, new)
        self.model.rounds[number] = "drawing"
        self.model.things |= {item.sample_id: Thing(number, version, item.needed) for item in new}

    @rule()
    def finish(self) -> None:
        self.office.intake.finish(stage(self.round), self.round)
        self.model.rounds[self.round] = "finished"

    @precondition(lambda self: self.model.rounds.get(self.round) == "finished")
    @rule(withdraw=st.booleans())
    def seal(self, withdraw: bool) -> None:
        number = self.round
        judged = {
            sample: label
            for sample, thing in self.model.things.items()
            if not thing.sealed and (label := self.model.label(sample)) is not None
        }
        withdrawn = [s for s, thing in self.model.things.items() if thing.number == number and self.model.is_open(s)]
        sealed = self.office.intake.seal(stage(number), withdraw)
        assert {(one.sample_id, one.label) for one in sealed} == set(judged.items())
        assert [one.sample_id for one in sealed] == sorted(judged)
        fixed: dict[str, str | None] = {**judged, **dict.fromkeys(withdrawn if withdraw else ())}
        for sample, label in fixed.items():
            self.model.things[sample].sealed = (stage(number), label)
        self.model.rounds[number] = "sealed"
        facts = self.office.facts()
        self.fixed |= {sample: self.record(facts, sample) for sample in fixed}

    @precondition(lambda self: self.round > 0)
    @rule(pick=pick_)
    def seal_again(self, pick: int) -> None:
        chosen, before = stage(pick % self.round), self.office.facts()
        sealed = {one.sample_id: one.label for one in self.office.intake.seal(chosen)}
        fixed = {s: t.sealed[1] for s, t in self.model.things.items() if t.sealed and t.sealed[0] == chosen}
        expected = {sample: label for sample, label in fixed.items() if label is not None}
        assert sealed == expected
        assert self.office.facts() == before

    @staticmethod
    def record(facts: Facts, sample: str) -> tuple[Any, ...]:
        return facts.items[sample], [row for row in facts.answers if row["sample"] == sample]

    # -- the labelers' side

    @rule(who=who_, count=st.integers(1, 4), old=rarely_)
    def lease(self, who: str, count: int, old: bool) -> None:
        now, model, badge = self.now, self.model, self.badge(who, old)
        held, wanted = model.held(who, now), model.wanted(who, now, self.lag)
        offers = self.attempt(model.why_not(who, badge, now), lambda: self.office.queue.lease(badge, count))
        if offers is None:
            return
        sample_of = {row["id"]: sample for sample, row in self.office.facts().items.items()}
        given = [sample_of[offer.item] for offer in offers]
        assert given[: len(held)] == held[:count]
        assert len(given) == min(count, len(held) + len(wanted))
        new = given[len(held) :]
        known = [sample for sample in new if model.things[sample].expected is not None]
        assert all(model.askable(sample, who, now) for sample in known)
        images = [sample for sample in new if sample not in known]
        assert set(images) <= set(wanted)
        assert [model.urgency(s) for s in images] == [model.urgency(s) for s in wanted[: len(images)]]
        for sample in new:
            model.grant(sample, who, now, self.office.human.lease_s)
        assert [offer.expires_at for offer in offers] == [model.leases[sample, who].until for sample in given]

    @rule(who=who_, pick=pick_, verdict=verdict_, any_item=rarely_, old=rarely_)
    def answer(self, who: str, pick: int, verdict: str, any_item: bool, old: bool) -> None:
        now, model, badge = self.now, self.model, self.badge(who, old)
        sample = self.pick(who, pick, any_item)
        thing, before, lease = model.things[sample], model.answer_of(sample, who), model.leases.get((sample, who))
        stands = before is not None and before.void is None
        late = lease is not None and lease.until <= now
        why = model.why_not(who, badge, now)
        if why is None and stands:
            why = None if before is not None and before.verdict == verdict else "answered"
        elif why is None and lease is None:
            why = "lease"
        elif why is None and thing.sealed:
            why = "sealed"
        elif why is None and late and thing.expected is None and not model.is_free(sample, who, now):
            why = "taken"
        rows = self.office.facts()
        self.attempt(why, lambda: self.office.queue.answer(badge, rows.items[sample]["id"], verdict, pick / 4))
        if why is None and stands:
            assert self.office.facts() == rows
            event("answered again")
        elif why is None:
            event("answered late" if late else "answered")
            model.said.append(Said(sample, who, verdict, pick / 4, now, late))
            self.accepted.append((sample, who, verdict))
            del model.leases[sample, who]
            if thing.expected is not None and self.office.human.gold.action == "exclude":
                known = [
                    said.verdict == model.things[said.sample].expected
                    for said in model.said
                    if said.who == who and said.void is None and said.verdict != "skip"
                    if model.things[said.sample].expected is not None
                ]
                if len(known) >= 2 and sum(known) / len(known) < 0.3:
                    event("excluded by gold")
                    model.exclude(who)

    @rule(who=who_, verdicts=st.lists(verdict_, min_size=1, max_size=4), pick=pick_)
    def work(self, who: str, verdicts: list[str], pick: int) -> None:
        """What people mostly do."""
        self.lease(who, len(verdicts), old=False)
        for verdict in verdicts:
            if any(owner == who for _, owner in self.model.leases):
                self.answer(who, pick, verdict, any_item=False, old=False)

    @rule(who=who_, other=who_, pick=pick_, verdict=verdict_)
    def dawdle(self, who: str, other: str, pick: int, verdict: str) -> None:
        """Somebody has images for too long, and they are handed on."""
        self.lease(who, 2, old=False)
        self.wait(LEASE_S)
        self.lease(other, 3, old=False)
        self.answer(who, pick, verdict, any_item=False, old=False)

    @rule(who=who_, picks=st.lists(st.tuples(pick_, rarely_), max_size=3), old=rarely_)
    def extend(self, who: str, picks: list[tuple[int, bool]], old: bool) -> None:
        now, model, badge = self.now, self.model, self.badge(who, old)
        samples = {self.pick(who, pick, any_item) for pick, any_item in picks}
        ids = {sample: self.id_of(sample) for sample in samples}
        kept = self.attempt(model.why_not(who, badge, now), lambda: self.office.queue.extend(badge, list(ids.values())))
        if kept is None:
            return
        mine = {
            sample
            for sample in samples
            if (lease := model.leases.get((sample, who)))
            and model.is_open(sample)
            and (lease.until > now or model.things[sample].expected is not None or model.is_free(sample, who, now))
        }
        assert sorted(kept) == sorted(ids[sample] for sample in mine)
        for sample in mine:
            lease = model.leases[sample, who]
            lease.until, lease.at = now + self.office.human.lease_s, now

    @rule(who=who_, pick=pick_, any_item=st.booleans(), old=rarely_)
    def release(self, who: str, pick: int, any_item: bool, old: bool) -> None:
        badge, sample = self.badge(who, old), self.pick(who, pick, any_item)
        why = self.model.why_not(who, badge, self.now)
        self.attempt(why, lambda: self.office.queue.release(badge, [self.id_of(sample)]))
        if why is None:
            self.model.leases.pop((sample, who), None)

    @rule(who=who_, pick=pick_, any_item=rarely_, old=rarely_)
    def undo(self, who: str, pick: int, any_item: bool, old: bool) -> None:
        now, model, badge = self.now, self.model, self.badge(who, old)
        mine = [said for said in model.said if said.who == who]
        pool = sorted(model.things) if any_item or not mine else [said.sample for said in reversed(mine)]
        sample = pool[pick % len(pool)]
        before, why = model.answer_of(sample, who), model.why_not(who, badge, now)
        if why is None and (before is None or before.void == "excluded" or all(s is not before for s in mine[-10:])):
            why = "undo"
        elif why is None and model.things[sample].sealed:
            why = "sealed"
        elif why is None and before is not None:
            void, before.void = before.void, "undone"
            if model.things[sample].expected is None and not model.is_free(sample, who, now):
                before.void, why = void, "taken"
        offer = self.attempt(why, lambda: self.office.queue.undo(badge, self.id_of(sample)))
        if why is None:
            event("undone")
            model.grant(sample, who, now, self.office.human.lease_s)
            assert offer == Offer(self.id_of(sample), offer.prompt, now + self.office.human.lease_s)

    @rule(who=who_, old=rarely_)
    def look(self, who: str, old: bool) -> None:
        now, model, badge = self.now, self.model, self.badge(who, old)
        asked = [sample for sample, thing in model.things.items() if thing.number == self.round]
        judged = sum(model.label(sample) is not None for sample in asked)
        state = model.rounds.get(self.round)
        target = None if state != "finished" else min(len(asked), self.office.human.min_labels or len(asked))
        standing = self.office.intake.standing(stage(self.round))
        able = [name for name in NAMES if name not in model.excluded and model.working(name, now)]
        said = sum(len(model.counting(sample)) for sample in asked)
        stood = {(s.sample, s.who) for s in model.said if s.void is None}
        left = [sample for sample in asked if model.is_open(sample)]
        passed = sum(all((sample, name) in stood for name in able) for sample in left) if able else 0
        enough = target is not None and judged + passed >= target
        assert standing == Standing(len(asked), judged, passed, said, len(able), enough)
        people = {person.name: person for person in self.office.people.everybody()}
        assert {name: person.links for name, person in people.items()} == {n: len(model.working(n, now)) for n in NAMES}
        assert {name for name, person in people.items() if person.excluded_why} == model.excluded
        progress = self.attempt(model.why_not(who, badge, now), lambda: self.office.queue.progress(badge))
        if progress is None:
            return
        mine = [said for said in model.said if said.who == who]
        assert progress.answers == people[who].answers == sum(said.void is None for said in mine)
        undoable = [s.sample for s in reversed(mine[-10:]) if s.void is None and not model.things[s.sample].sealed]
        ids = {sample: row["id"] for sample, row in self.office.facts().items.items()}
        assert list(progress.undoable) == [ids[sample] for sample in undoable]
        if state is not None:
            assert (progress.round, progress.asked, progress.judged) == (self.round, len(asked), judged)
            assert progress.target == target
        waits = {None: "training" if self.round else "images", "drawing": "images", "finished": "people"}
        assert progress.waits_for == waits[state]

    # -- the operator's side

    @rule(who=who_)
    def admit(self, who: str) -> None:
        badge = self.office.people.admit(who)
        assert badge.expires_at == self.now + 24 * 3600
        self.model.badges[who].append((badge.id, badge.expires_at))

    @rule(who=who_, for_good=rarely_)
    def revoke(self, who: str, for_good: bool) -> None:
        working = self.model.working(who, self.now)
        assert self.office.people.revoke(who) == len(working)
        self.model.revoked |= set(working)
        if not for_good:
            self.admit(who)

    @rule(who=who_, for_good=rarely_)
    def exclude(self, who: str, for_good: bool) -> None:
        self.office.people.exclude(who, "by the operator")
        self.model.exclude(who)
        if not for_good:
            self.include(who)

    @rule(who=who_)
    def include(self, who: str) -> None:
        self.office.people.include(who)
        self.model.excluded.discard(who)

    # -- time and accidents

    @rule(seconds=st.sampled_from([1, LEASE_S // 2, LEASE_S - 1, LEASE_S, LEASE_S + 1]))
    def wait(self, seconds: int) -> None:
        self.machine.wait(seconds)

    @rule(who=who_, for_good=rarely_)
    def sleep_over_it(self, who: str, for_good: bool) -> None:
        """All links expire, and new ones are given."""
        self.machine.wait(24 * 3600)
        for name in NAMES:
            if name != who or not for_good:
                self.admit(name)

    @rule(back=st.sampled_from([0, 0, 1, LEASE_S, 10 * LEASE_S, 10**6]), longer=st.sampled_from([1, 1, 3, 1 / 3]))
    def crash(self, back: int, longer: float) -> None:
        """The clock of the machine may have gone back, and the configuration may give people more or less time."""
        self.office.human = self.office.human.model_copy(update={"lease_s": LEASE_S * longer})
        self.office.crash(back)
        known = [*self.model.leases.values(), *self.model.said]
        assert self.now == max([self.machine.wall, *(one.at for one in known)])

    # -- what must be so after every step

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        facts, model = self.office.facts(), self.model
        sealed = {sample: thing.sealed[0] if thing.sealed else None for sample, thing in model.things.items()}
        assert {sample: row["sealed_in"] for sample, row in facts.items.items()} == sealed
        labels = {sample: model.label(sample) for sample in model.things}
        assert {sample: row["label"] for sample, row in facts.items.items()} == labels
        rows = [Said(**{name: row[name] for name in Said.__dataclass_fields__}) for row in facts.answers]
        assert rows == model.said
        leases = {key: lease.until for key, lease in model.leases.items()}
        assert {key: row["expires_at"] for key, row in facts.leases.items()} == leases
        excluded = {name for name, row in facts.labelers.items() if row["excluded_at"] is not None}
        assert excluded == model.excluded

    @invariant()
    def the_promises_are_kept(self) -> None:
        if not hasattr(self, "model"):
            return
        facts = self.office.facts()
        check_promises(facts, self.model.rule, self.now)
        assert [(row["sample"], row["who"], row["verdict"]) for row in facts.answers] == self.accepted, (
            "an answer is lost"
        )
        assert {sample: self.record(facts, sample) for sample in self.fixed} == self.fixed, "something sealed changed"
