"""The round store and the ledger: samples, scores and verdicts as Parquet, sealed by a manifest written last.

    rounds/00003/samples/*.parquet  latents/  pixels/    what was drawn, by the replicas that drew it; see parts.py
                 scores/*.parquet  verdicts/*.parquet    of an open round, as they come
                 samples.parquet  scores.parquet  verdicts.parquet    of a sealed one: all of it but arrays
                 manifest.json                           seals: format, hashes, counts
                 no_pixels.json                          keep_pixels has let go of pixels/
                 training.parquet  training.json         samples trained on, figures

The loop adds to an open round and seals it; the train workers read sealed rounds; a resumed run reopens the round that
was not sealed and finds what is there. Records already there are not written twice, so everything before the seal may
be repeated. What a round holds, but for arrays, is read once and kept in memory as long as the `Round` is. Evaluations
are stored in the same way, under `evaluations/`.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kto_ray.errors import UserError
from kto_ray.parts import AT_ONCE, PART_SIZE, read_arrays, read_records, write_part
from kto_ray.records import (
    SCORE_SCHEMA,
    VERDICT_SCHEMA,
    Sample,
    SampleRecord,
    SampleRequest,
    Score,
    Verdict,
    index_to_table,
    scores_to_table,
    table_to_records,
    table_to_scores,
    table_to_verdicts,
    verdicts_to_table,
)
from kto_ray.storage import Storage

FORMAT = 2
"""Of a round's folder, in its manifest; release 0.1.0 wrote none, which is 1."""
NO_PIXELS = "no_pixels.json"
"""Written before a sealed round's pixels are deleted."""


def by_sample(scores: Iterable[Score]) -> dict[str, dict[str, Score]]:
    """Scores by sample id and scorer."""
    table: dict[str, dict[str, Score]] = {}
    for score in scores:
        table.setdefault(score.sample_id, {})[score.scorer] = score
    return table


@dataclass(frozen=True)
class Ledger:
    """Where every sample of a run (or of one round) stands.

    `generated = labeled + abstained + failed + pending`; `trained` are the samples drawn by training,
    `trained_twice` those drawn in more than one round, which must stay 0.
    """

    generated: int = 0
    labeled: int = 0
    abstained: int = 0
    failed: int = 0
    pending: int = 0
    trained: int = 0
    trained_twice: int = 0

    @property
    def balances(self) -> bool:
        settled = self.labeled + self.abstained + self.failed + self.pending
        return self.generated == settled and not self.trained_twice and self.trained <= self.labeled


def round_number(stage: str) -> int:
    """The inverse of `RoundStore.stage`."""
    return int(stage.removeprefix("round-"))


class Round:
    """One round's folder, open until it has a manifest. Made without looking at it.

    Of what is in it a `Round` sees what was there when it first looked, and what was added through itself.

    Raises (from every method that adds): RuntimeError when the round is sealed.
    """

    def __init__(self, storage: Storage, stage: str) -> None:
        self.storage, self.stage = storage, stage
        self._manifest: dict[str, Any] | None = None
        self._is_open = self._trained = False
        self.seal_seconds: float | None = None
        """That sealing took; None: this object has not sealed it."""

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def sealed(self) -> bool:
        if self._manifest is None and not self._is_open:
            self._is_open = not self.storage.exists("manifest.json")
            self._manifest = None if self._is_open else self._read_manifest()
        return self._manifest is not None

    @property
    def manifest(self) -> dict[str, Any]:
        """Raises FileNotFoundError while the round is open, UserError when a newer version has made it."""
        if self._manifest is None:
            self._manifest = self._read_manifest()
        return self._manifest

    def _read_manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = self.storage.read_json("manifest.json")
        if manifest.get("format", 1) > FORMAT:
            raise UserError(
                f"{self.storage} was made by a newer version of kto-ray: its format is {manifest['format']}, this "
                f"version reads up to {FORMAT}"
            )
        return manifest

    @property
    def _in_one(self) -> bool:
        """Whether tables lie in one file each: not in an open round, nor in those of release 0.1.0."""
        return self.sealed and self.manifest.get("format", 1) > 1

    @cached_property
    def _records(self) -> dict[str, SampleRecord]:
        records = table_to_records(self._sealed_table("samples")) if self._in_one else read_records(self.storage)
        # Of two copies, as a crash may leave them, any will do, but for one in the form of release 0.1.0.
        records.sort(key=lambda record: (record.id, bool(record.place and record.place.latents_digest)))
        return {record.id: record for record in records}

    @cached_property
    def _scores(self) -> dict[tuple[str, str], Score]:
        """A value that came after a failure stands in its place."""
        scores = table_to_scores(self._table("scores", SCORE_SCHEMA))
        scores.sort(key=lambda score: (score.sample_id, score.scorer, score.value is not None))
        return {(score.sample_id, score.scorer): score for score in scores}

    @cached_property
    def _verdicts(self) -> dict[str, Verdict]:
        verdicts = table_to_verdicts(self._table("verdicts", VERDICT_SCHEMA))
        return {verdict.sample_id: verdict for verdict in sorted(verdicts, key=lambda verdict: verdict.sample_id)}

    def _table(self, kind: str, schema: pa.Schema) -> pa.Table:
        if self._in_one:
            return self._sealed_table(kind)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            tables = list(pool.map(self.storage.read_table, self._parts(kind)))
        return pa.concat_tables([schema.empty_table(), *tables])

    def _sealed_table(self, kind: str) -> pa.Table:
        """Raises ValueError when it is not as it was sealed."""
        return pq.read_table(pa.BufferReader(self._sealed_file(f"{kind}.parquet")))

    def _sealed_file(self, name: str) -> bytes:
        data = self.storage.read(name)
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]:
            raise ValueError(f"{self.storage}/{name} has changed since the round was sealed")
        return data

    def _parts(self, kind: str) -> list[str]:
        return [f"{kind}/{name}" for name in self.storage.names(kind, suffix=".parquet")]

    @cached_property
    def _asked_again(self) -> set[tuple[str, str]]:
        """Failed scores of an open round from before a crash, or before the run was stopped for them."""
        return set() if self.sealed else {key for key, score in self._scores.items() if score.value is None}

    @property
    def scored(self) -> Set[tuple[str, str]]:
        """Sample ids and scorers of the scores that are there, failed ones included."""
        return self._scores.keys() - self._asked_again

    @property
    def scored_ids(self) -> set[str]:
        """Samples with a score, or a failed one, of any scorer."""
        return {sample_id for sample_id, _ in self.scored}

    @cached_property
    def failures(self) -> list[Score]:
        return [score for key, score in self._scores.items() if score.value is None and key not in self._asked_again]

    def known_scores(self, samples: Iterable[SampleRecord], scorers: Iterable[str]) -> list[Score]:
        """Of these samples by these scorers, those with a value."""
        found = (self._scores.get((sample.id, scorer)) for sample in samples for scorer in scorers)
        return [score for score in found if score and score.value is not None]

    @property
    def sample_ids(self) -> Set[str]:
        return self._records.keys()

    @property
    def judged_ids(self) -> Set[str]:
        return self._verdicts.keys()

    def records(self) -> list[SampleRecord]:
        """All samples, in the order of their ids, whatever order they came in."""
        return sorted(self._records.values(), key=lambda record: record.id)

    def samples(self, records: Sequence[SampleRecord] | None = None) -> list[Sample]:
        """All, or those of these records, with their arrays. Raises ValueError when these are not what was stored."""
        records = self.records() if records is None else records
        if not records:
            return []
        arrays = zip(self.latents_of(records), self.pixels_of(records), strict=True)
        return [Sample.of(record, latents, pixels) for record, (latents, pixels) in zip(records, arrays, strict=True)]

    def latents_of(self, records: Sequence[SampleRecord]) -> npt.NDArray[np.float32]:
        """(B, C, H, W), of samples of this round; see `parts.read_arrays`."""
        return read_arrays(self.storage, "latents", records)

    def pixels_of(self, records: Sequence[SampleRecord]) -> npt.NDArray[np.uint8]:
        """(B, H, W, 3), of samples of this round; see `parts.read_arrays`.

        Raises:
            UserError: `keep_pixels` did not keep them.
        """
        try:
            return read_arrays(self.storage, "pixels", records)
        except FileNotFoundError as error:
            if not self.storage.exists(NO_PIXELS):
                raise
            raise UserError(f"{self.storage}: its pixels were not kept (keep_pixels)") from error

    def prompt_ids(self) -> dict[str, str]:
        """Prompt id by sample id, in the order of `records`."""
        return {record.id: record.prompt.id for record in self.records()}

    def prompt_texts(self) -> set[str]:
        return {record.prompt.text for record in self._records.values()}

    def policy_versions(self) -> set[int]:
        """Of the policies that drew its samples."""
        return {record.policy.version for record in self._records.values()}

    def scores(self) -> list[Score]:
        """One a sample and scorer, in the order of their ids."""
        return sorted(self._scores.values(), key=lambda score: (score.sample_id, score.scorer))

    def verdicts(self) -> list[Verdict]:
        """Verdicts sealed in this round; some may be on samples of earlier rounds, which people answered late."""
        return sorted(self._verdicts.values(), key=lambda verdict: verdict.sample_id)

    # -- adding -------------------------------------------------------------------------------------------------------
    # A loop of asyncio asks for what is new, stores that in a thread, and takes note of it in its own.

    def open(self) -> None:
        """Read what is there; from then on nothing is read any more, and this object knows what is added."""
        self._rewrite_old_parts()
        _ = self._scores, self._verdicts, self.failures

    def missing(self, requests: Iterable[SampleRequest]) -> list[SampleRequest]:
        """Those requests whose samples are not here yet."""
        return [request for request in requests if request.id not in self._records]

    def add_samples(self, samples: Sequence[Sample]) -> None:
        """Store samples; those already here are left as they are."""
        new = {sample.id: sample for sample in samples if sample.id not in self._records}
        self._require_open("samples")
        if new:
            self.know_samples(write_part(self.storage, list(new.values())))

    def copy_samples(self, origin: "Round") -> None:
        """Store those of a sealed round of another run, which may have lost its pixels."""
        if not origin._in_one:
            for start in range(0, len(origin.records()), PART_SIZE):
                self.add_samples(origin.samples(origin.records()[start : start + PART_SIZE]))
            return
        kept = not origin.storage.exists(NO_PIXELS)
        for part in origin.manifest["parts"]:
            for kind in ("latents", "pixels", "samples") if kept else ("latents", "samples"):
                self.storage.write(f"{kind}/{part}.parquet", origin.storage.read(f"{kind}/{part}.parquet"))
        if not kept:
            self.storage.write(NO_PIXELS, origin.storage.read(NO_PIXELS))
        places = {record.place for record in origin.records()}  # parts may have others, which were drawn twice
        self.know_samples(record for record in read_records(self.storage) if record.place in places)

    def know_samples(self, records: Iterable[SampleRecord]) -> None:
        """Take note of samples that whoever drew them has stored."""
        self._records.update((record.id, record) for record in records if record.id not in self._records)

    def add_scores(self, scores: Sequence[Score]) -> None:
        """Store scores; a sample already scored by the same scorer keeps its first score."""
        new = self.new_scores(scores)
        self.store_scores(new)
        self.know_scores(new)

    def new_scores(self, scores: Sequence[Score]) -> list[Score]:
        """Those that are not here yet."""
        firsts = {(score.sample_id, score.scorer): score for score in reversed(scores)}
        return [score for key, score in firsts.items() if key not in self._scores or key in self._asked_again]

    def store_scores(self, new: Sequence[Score]) -> Sequence[Score]:
        self._store("scores", scores_to_table(new))
        return new

    def know_scores(self, new: Sequence[Score]) -> None:
        """Take note of scores that are stored."""
        keys = {(score.sample_id, score.scorer): score for score in new}
        self.failures += [score for score in new if score.value is None]
        self._scores.update(keys)
        self._asked_again.difference_update(keys)

    def add_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """Store verdicts; a sample already judged keeps its first verdict."""
        new = self.new_verdicts(verdicts)
        self.store_verdicts(new)
        self.know_verdicts(new)

    def new_verdicts(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Those that are not here yet."""
        firsts = {verdict.sample_id: verdict for verdict in reversed(verdicts)}
        return [verdict for verdict in firsts.values() if verdict.sample_id not in self._verdicts]

    def store_verdicts(self, new: Sequence[Verdict]) -> None:
        self._store("verdicts", verdicts_to_table(new))

    def know_verdicts(self, new: Sequence[Verdict]) -> None:
        """Take note of verdicts that are stored."""
        self._verdicts.update((verdict.sample_id, verdict) for verdict in new)

    def _store(self, kind: str, table: pa.Table) -> None:
        self._require_open(kind)
        if table.num_rows:
            keys = [table[name].to_pylist() for name in ("sample_id", "scorer") if name in table.column_names]
            name = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
            self.storage.write_table(f"{kind}/{name}.parquet", table)

    def _require_open(self, kind: str) -> None:
        if self._manifest is not None:
            raise RuntimeError(f"{self.storage} is sealed, {kind} cannot be added")

    # -- sealing ------------------------------------------------------------------------------------------------------

    def seal(self, **facts: Any) -> None:
        """Close the round: its manifest, written last, has the hashes of its tables, and `facts`.

        The tables have the digests of all arrays, taken when those were written.
        """
        if self.sealed:
            return
        began = time.monotonic()
        records = self.records()
        tables = {
            "samples": index_to_table(records),
            "scores": scores_to_table(self.scores()),
            "verdicts": verdicts_to_table(self.verdicts()),
        }
        files = {f"{name}.parquet": self.storage.write_table(f"{name}.parquet", t) for name, t in tables.items()}
        parts = sorted({record.place.part for record in records if record.place})
        manifest = {"stage": self.stage, **facts, "format": FORMAT, "files": files, "parts": parts}
        self.storage.write_json("manifest.json", manifest)
        self._manifest, self.seal_seconds = manifest, time.monotonic() - began

    def _rewrite_old_parts(self) -> None:
        """Bring samples of an open round that release 0.1.0 has begun into the form of this one."""
        old = [record for record in self.records() if record.place and not record.place.latents_digest]
        if self.sealed:
            return
        for start in range(0, len(old), PART_SIZE):
            samples = self.samples(old[start : start + PART_SIZE])
            self._records.update((record.id, record) for record in write_part(self.storage, samples))
        for part in sorted({record.place.part for record in old if record.place}):
            self.storage.delete(f"samples/{part}.parquet")

    def verify(self) -> None:
        """Read all of a sealed round. Raises ValueError when something is not as it was sealed, or is gone."""
        if not self._in_one and (others := set(self._old_parts()) ^ self.manifest["files"].keys()):
            raise ValueError(f"{self.storage}: {sorted(others)[0]} was added or removed since the round was sealed")
        for name in self.manifest["files"]:
            self._sealed_file(name)
        if not self._in_one:
            return
        parts: dict[str, list[SampleRecord]] = {}
        for record in self.records():
            assert record.place
            parts.setdefault(record.place.part, []).append(record)
        kept = not self.storage.exists(NO_PIXELS)
        for part, records in parts.items():
            try:
                self.latents_of(records)
                if kept:
                    self.pixels_of(records)
            except FileNotFoundError as error:
                raise ValueError(f"{self.storage}: {part} was removed since the round was sealed") from error

    def _old_parts(self) -> list[str]:
        return [part for kind in ("samples", "scores", "verdicts") for part in self._parts(kind)]

    def tidy(self) -> None:
        """Delete what a sealed round has in its tables, too: the parts in which scores and verdicts came."""
        if self._in_one:
            for part in [*self._parts("scores"), *self._parts("verdicts")]:
                self.storage.delete(part)

    def drop_pixels(self) -> None:
        """Delete the pixels of a sealed round; latents, records, scores and verdicts stay."""
        if self.sealed and (parts := self._parts("pixels")):
            self.storage.write_json(NO_PIXELS, {"why": "keep_pixels"})
            for part in parts:
                self.storage.delete(part)

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> bool:
        self._trained = self._trained or self.storage.exists("training.json")
        return self._trained

    def record_training(self, draws: dict[str, int], report: dict[str, Any]) -> None:
        """Write down which samples were drawn, how often, and the training report; `training.json` last."""
        drawn = {sample_id: count for sample_id, count in draws.items() if count}
        self.storage.write_table(
            "training.parquet", pa.table({"sample_id": list(drawn), "draws": list(drawn.values())})
        )
        self.storage.write_json("training.json", report)

    def trained_ids(self) -> list[str]:
        if not self.trained:
            return []
        ids: list[str] = self.storage.read_table("training.parquet", ["sample_id"])["sample_id"].to_pylist()
        return ids


class RoundStore:
    """All rounds of a run."""

    def __init__(self, run: Storage) -> None:
        self.storage = run / "rounds"

    def stage(self, index: int) -> str:
        return f"round-{index:05}"

    def round(self, index: int) -> Round:
        return Round(self.storage / f"{index:05}", self.stage(index))

    def indices(self) -> list[int]:
        return [int(name) for name in self.storage.names() if name.isdigit()]

    def rounds(self) -> list[Round]:
        return [self.round(index) for index in self.indices()]

    def trainable(self, index: int, policy_version: int, max_policy_lag: int) -> tuple[list[SampleRecord], list[bool]]:
        """The samples that a sealed round trains on, and whether each is desirable.

        Those with a verdict, made by a policy at most `max_policy_lag` versions older than `policy_version`, in the
        order of their ids. Samples of earlier rounds whose verdict came late are fetched from there; a sample that
        got a verdict in an earlier round already keeps that one and is not trained on again. In a replayed round
        ("replayed_from" in its manifest) whatever policy made a sample will do: that is what replaying means.
        """
        here = self.round(index)
        replayed = "replayed_from" in here.manifest
        desirable = {
            verdict.sample_id: verdict.label == "desirable"
            for verdict in here.verdicts()
            if verdict.label in ("desirable", "undesirable")
        }
        homes = self.homes(desirable)
        for earlier in range(min(homes, default=index), index):
            for verdict in self.round(earlier).verdicts():
                desirable.pop(verdict.sample_id, None)
        records = [
            record
            for home in homes
            for record in (here if home == index else self.round(home)).records()
            if record.id in desirable and (replayed or policy_version - record.policy.version <= max_policy_lag)
        ]
        return records, [desirable[record.id] for record in records]

    @staticmethod
    def homes(sample_ids: Iterable[str]) -> list[int]:
        """Numbers of the rounds in which these samples were drawn, ascending."""
        return sorted({round_number(sample_id.rpartition("-")[0]) for sample_id in sample_ids})

    def latents_of(self, records: Sequence[SampleRecord]) -> npt.NDArray[np.float32]:
        """(B, C, H, W), of samples of any rounds, at least one; see `parts.read_arrays`."""
        by_stage: dict[str, list[SampleRecord]] = {}
        for record in records:
            by_stage.setdefault(record.stage, []).append(record)
        latents: dict[str, npt.NDArray[np.float32]] = {}
        for stage, those in by_stage.items():
            found_BCHW = self.round(round_number(stage)).latents_of(those)
            latents |= {record.id: latents_CHW for record, latents_CHW in zip(those, found_BCHW, strict=True)}
        return np.stack([latents[record.id] for record in records])

    def ledger(self) -> Ledger:
        """Adds up all rounds from their tables alone."""
        labels: dict[str, str] = {}
        generated, trained = set[str](), list[str]()
        for index in self.indices():  # one at a time in memory
            round_ = self.round(index)
            generated |= round_.sample_ids
            labels = {verdict.sample_id: verdict.label for verdict in round_.verdicts()} | labels
            trained += [sample_id for sample_id in round_.trained_ids() if sample_id in generated]  # data.mix: not it
        became = Counter(labels.values())
        counts = np.unique(trained, return_counts=True)[1]
        return Ledger(
            generated=len(generated),
            labeled=became["desirable"] + became["undesirable"],
            abstained=became["abstain"],
            failed=became["failed"],
            pending=len(generated - labels.keys()),
            trained=len(counts),
            trained_twice=int((counts > 1).sum()),
        )
