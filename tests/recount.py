"""The operator's page as it must be, counted anew from every row of the database and in other words than the code's."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from nltk.metrics.agreement import AnnotationTask

from kto_ray.people.agreement import Reliability
from kto_ray.people.overview import LabelerRow, Overview, RoundRow
from tests.office import Facts, Office, Row


def recount(office: Office) -> Overview:
    """But for the rounding of Krippendorff's alpha."""
    facts, now = office.facts(), office.clock()
    images = [item for item in facts.items.values() if item["expected"] is None]
    waiting = {i["sample_id"] for i in images if i["label"] is None and i["sealed_in"] is None}
    held = {sample for (sample, _), lease in facts.leases.items() if lease["expires_at"] > now}
    counting = [row for row in facts.answers if row["void"] is None and row["verdict"] != "skip"]
    pairs = [
        pair
        for image in images
        for pair in combinations([row for row in counting if row["sample"] == image["sample_id"]], 2)
    ]
    names = sorted(name for name, person in facts.labelers.items() if person["role"] != "operator")
    return Overview(
        labelers=[labeler_row(office, facts, counting, pairs, name) for name in names],
        rounds=[round_row(row, [i for i in images if i["stage"] == row["stage"]]) for row in reversed(facts.rounds)],
        waiting=len(waiting),
        leased=len(waiting & held),
        agreement=reliability(pairs),
        recent={label: recent(facts, images, label) for label in ("desirable", "undesirable", "abstain")},
    )


def labeler_row(
    office: Office, facts: Facts, counting: Sequence[Row], pairs: Sequence[tuple[Row, ...]], name: str
) -> LabelerRow:
    now, gold = office.clock(), office.human.gold
    said = [row for row in facts.answers if row["who"] == name and row["void"] is None]
    verdicts = [row["verdict"] for row in said]
    seconds = [row["seconds"] for row in said if row["seconds"] is not None]
    known = [(row["verdict"], facts.items[row["sample"]]["expected"]) for row in counting if row["who"] == name]
    right = [verdict == expected for verdict, expected in known if expected is not None]
    alike = [a["verdict"] == b["verdict"] for a, b in pairs if name in (a["who"], b["who"])]
    doubtful = len(right) >= gold.least and sum(right) / len(right) < gold.limit
    mine = [badge for badge in facts.badges if badge["labeler"] == facts.labelers[name]["id"]]
    return LabelerRow(
        name=name,
        answers=len(said),
        desirable=verdicts.count("desirable"),
        undesirable=verdicts.count("undesirable"),
        unsure=verdicts.count("unsure"),
        skipped=verdicts.count("skip"),
        per_minute=len([row for row in said if row["at"] > now - 600]) / 10,
        median_seconds=median(seconds) if seconds else None,
        agreement=sum(alike) / len(alike) if alike else None,
        gold_right=sum(right),
        gold_seen=len(right),
        doubt=f"{sum(right)} of {len(right)} known answers right" if doubtful else None,
        excluded_why=facts.labelers[name]["excluded_why"],
        links=sum(badge["revoked_at"] is None and badge["expires_at"] > now for badge in mine),
        looking_at=sum(who == name and lease["expires_at"] > now for (_, who), lease in facts.leases.items()),
        last_at=max((row["at"] for row in said), default=None),
    )


def round_row(row: Row, images: Sequence[Row]) -> RoundRow:
    labels = [image["label"] for image in images]
    state = "drawing" if row["finished_at"] is None else "open" if row["sealed_at"] is None else "sealed"
    each = (labels.count(label) for label in ("desirable", "undesirable", "abstain", None))
    return RoundRow(row["number"], len(images), *each, state)


def reliability(pairs: Sequence[tuple[Row, ...]]) -> Reliability:
    if not pairs:
        return Reliability(None, None)
    percent = sum(one["verdict"] == other["verdict"] for one, other in pairs) / len(pairs)
    said = {(row["who"], row["sample"], row["verdict"]) for pair in pairs for row in pair}
    several = len({verdict for _, _, verdict in said}) > 1
    return Reliability(percent, float(AnnotationTask(data=sorted(said)).alpha()) if several else None)


def recent(facts: Facts, images: Sequence[Row], label: str) -> list[str]:
    latest = {row["sample"]: row["id"] for row in facts.answers}
    labelled = [image for image in images if image["label"] == label and image["sample_id"] in facts.images]
    return [i["id"] for i in sorted(labelled, key=lambda i: latest[i["sample_id"]], reverse=True)[:24]]
