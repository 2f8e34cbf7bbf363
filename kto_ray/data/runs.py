"""The sealed rounds of a run of this project: what it drew, and what it or a label set says of it.

    runs/demo/rounds/00003/...            see `kto_ray/rounds.py`
    runs/demo/labels/strict/00003/...     made by `kto-ray relabel`, see `kto_ray/relabel.py`

A part a round. A sample whose verdict came late, in a later round, has it; one of which nothing could be found out is
left out; one without a verdict yet has none. Metadata say which sample it is, whose policy drew it, and its scores: who
trains the same model may take its latents from there, in the place of the pixels.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from kto_ray.config.data import RunData
from kto_ray.data.labelling import Images, labelled, metadata
from kto_ray.data.notes import Notes
from kto_ray.data.protocol import Part, Preview, Source
from kto_ray.data.table import first_rows
from kto_ray.errors import UserError
from kto_ray.images import to_png
from kto_ray.parts import PART_SIZE
from kto_ray.records import Verdict, table_to_verdicts
from kto_ray.relabel import saved_config, sealed_rounds
from kto_ray.rounds import NO_PIXELS, Round, RoundStore, by_sample, round_number
from kto_ray.storage import Storage

FAILED = "samples are left out: they failed, no image or no score came of them"


class RunSource(Source):
    """See the module."""

    kind = "run"
    field = "data.sources (run)"

    def __init__(self, settings: RunData) -> None:
        self.settings, self.run = settings, Storage(settings.run)

    def _rounds(self) -> Sequence[Round]:
        saved_config(self.run, f"{self.field}: run")
        rounds = sealed_rounds(self.run, f"{self.field}: run")
        for round_ in rounds:
            if round_.storage.exists(NO_PIXELS):
                raise UserError(
                    f"{self.field}: run: {round_.storage} has no pixels any more (keep_pixels); train on its latents "
                    f"with replay.run={self.settings.run}"
                )
        return rounds

    def _verdicts(self, rounds: Sequence[Round]) -> Iterator[Verdict]:
        name = self.settings.labels
        labels = self.run / "labels" / name if name else None
        if labels is None:
            for round_ in rounds:
                yield from round_.verdicts()
        elif not labels.exists("labels.json"):
            known = ", ".join((self.run / "labels").names()) or "none"
            raise UserError(f"{self.field}: labels: {self.run} has no label set {name!r}; it has: {known}")
        else:
            for index in range(labels.read_json("labels.json")["rounds"]):
                yield from table_to_verdicts((labels / f"{index:05}").read_table("verdicts.parquet"))

    def parts(self) -> Sequence[Part]:
        rounds = self._rounds()
        first: dict[str, tuple[str, str]] = {}
        for verdict in self._verdicts(rounds):  # the first one stays, as in training
            first.setdefault(verdict.sample_id, (verdict.label, verdict.labeler))
        parts = []
        for round_ in rounds:
            known = {name: first[name] for name in round_.sample_ids if name in first}
            of = {"round": round_number(round_.stage), "verdicts": known}
            parts.append(Part(round_.stage, of, len(_drawn(round_, known))))
        return parts

    def read(self, part: Part) -> Iterator[pa.Table]:
        round_ = RoundStore(self.run).round(part.of["round"])
        verdicts: Mapping[str, tuple[str, str]] = part.of["verdicts"]
        scores, drawn = by_sample(round_.scores()), _drawn(round_, verdicts)
        records = [record for record in round_.records() if record.id in drawn]
        for start in range(0, len(records), PART_SIZE):
            some = records[start : start + PART_SIZE]
            said = [verdicts.get(record.id, ("abstain", None)) for record in some]
            desirable = [None if label == "abstain" else label == "desirable" for label, _ in said]
            yield labelled(
                [f"{self.kind}:{record.id}" for record in some],
                Images.of(pa.nulls(len(some), pa.string()), pa.array(to_png(round_.pixels_of(some)), pa.binary())),
                [record.prompt.text for record in some],
                pa.array(desirable, pa.bool_()),
                pa.array([who for _, who in said], pa.string()),
                [
                    metadata(
                        {
                            "run": str(self.run),
                            "sample": record.id,
                            "prompt_id": record.prompt.id,
                            "seed": record.seed,
                            "policy": record.policy.version,
                            "policy_digest": record.policy.digest,
                            "scores": {name: score.value for name, score in scores.get(record.id, {}).items()},
                        }
                    )
                    for record in some
                ],
            )

    def preview(self) -> Preview:
        notes, counts, parts = Notes(), Counter[str]({"desirable": 0, "undesirable": 0}), self.parts()
        rows = sum(part.rows or 0 for part in parts)
        for part in parts:
            labels = Counter(label for label, _ in part.of["verdicts"].values())
            counts.update({name: labels[name] for name in ("desirable", "undesirable")})
        counts["none"] = rows - counts.total()
        store = RoundStore(self.run)
        notes.add(FAILED, sum(len(store.round(part.of["round"]).sample_ids) - (part.rows or 0) for part in parts))
        columns = {"rounds": str(len(parts)), "verdicts": self.settings.labels or "the run's own"}
        where = str(self.run)
        return Preview(self.kind, where, columns, rows, counts, first_rows(self), notes.counts, notes.examples)


def _drawn(round_: Round, verdicts: Mapping[str, tuple[str, str]]) -> set[str]:
    """Samples of a round that did not fail."""
    return {
        record.id
        for record in round_.records()
        if record.error is None and verdicts.get(record.id, ("", ""))[0] != "failed"
    }
