"""The round store and the ledger: samples, scores and verdicts as Parquet, sealed by a manifest written last.

    rounds/00003/samples/*.parquet  scores/*.parquet  verdicts/*.parquet     parts, written as they come
                 manifest.json                                               seals: files, hashes, counts
                 training.parquet  training.json                             samples trained on, figures

The loop adds parts to an open round and seals it; the train worker reads sealed rounds; a resumed run reopens the
round that was not sealed and finds what is there. Records already there are not written twice, so everything before
the seal may be repeated. Evaluations are stored in the same way, under `evaluations/`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kto_ray.records import (
    SCORE_SCHEMA,
    VERDICT_SCHEMA,
    Sample,
    SampleRequest,
    Score,
    Verdict,
    samples_to_table,
    scores_to_table,
    table_to_samples,
    table_to_scores,
    table_to_verdicts,
    verdicts_to_table,
)
from kto_ray.storage import Storage


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
    """One round's folder, open until it has a manifest.

    Raises (from every method that adds): RuntimeError when the round is sealed.
    """

    def __init__(self, storage: Storage, stage: str) -> None:
        self.storage, self.stage = storage, stage
        self.sample_ids = set(self._ids("samples"))
        self.sealed = storage.exists("manifest.json")
        # A score that failed before a crash, or before the run was stopped for it, is asked for again in an open round.
        scores = [score for score in self.scores() if self.sealed or score.value is not None]
        self.scored = {(score.sample_id, score.scorer) for score in scores}
        self.failures = [score for score in scores if score.value is None]
        self.judged_ids = {verdict.sample_id for verdict in self.verdicts()}

    def _parts(self, kind: str) -> list[str]:
        return [f"{kind}/{name}" for name in self.storage.names(kind, suffix=".parquet")]

    def _all_parts(self) -> list[str]:
        return [part for kind in ("samples", "scores", "verdicts") for part in self._parts(kind)]

    def _ids(self, kind: str) -> list[str]:
        parts = (self.storage.read_table(part, ["sample_id"]) for part in self._parts(kind))
        return [row for table in parts for row in table["sample_id"].to_pylist()]

    def _add(self, kind: str, table: pa.Table) -> None:
        if self.sealed:
            raise RuntimeError(f"{self.storage} is sealed, {kind} cannot be added")
        keys = [table[name].to_pylist() for name in ("sample_id", "scorer") if name in table.column_names]
        name = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
        self.storage.write_table(f"{kind}/{name}.parquet", table)

    def missing(self, requests: Iterable[SampleRequest]) -> list[SampleRequest]:
        """Those requests whose samples are not here yet."""
        return [request for request in requests if request.id not in self.sample_ids]

    def add_samples(self, samples: Sequence[Sample]) -> None:
        """Store samples; those already here are left as they are."""
        if new := {sample.id: sample for sample in samples if sample.id not in self.sample_ids}:
            self._add("samples", samples_to_table(list(new.values())))
            self.sample_ids |= new.keys()

    def add_scores(self, scores: Sequence[Score]) -> None:
        """Store scores; a sample already scored by the same scorer keeps its first score."""
        firsts = {(score.sample_id, score.scorer): score for score in reversed(scores)}
        if new := {key: score for key, score in firsts.items() if key not in self.scored}:
            self._add("scores", scores_to_table(list(new.values())))
            self.scored |= new.keys()
            self.failures += [score for score in new.values() if score.value is None]

    @property
    def scored_ids(self) -> set[str]:
        """Samples with a score, or a failed one, of any scorer."""
        return {sample_id for sample_id, _ in self.scored}

    def add_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """Store verdicts; a sample already judged keeps its first verdict."""
        firsts = {verdict.sample_id: verdict for verdict in reversed(verdicts)}
        if new := {sample_id: verdict for sample_id, verdict in firsts.items() if sample_id not in self.judged_ids}:
            self._add("verdicts", verdicts_to_table(list(new.values())))
            self.judged_ids |= new.keys()

    def samples(self) -> list[Sample]:
        """All samples, in the order of their ids, whatever order they came in."""
        parts = [table_to_samples(self.storage.read_table(part)) for part in self._parts("samples")]
        return sorted((sample for part in parts for sample in part), key=lambda sample: sample.id)

    def prompt_ids(self) -> dict[str, str]:
        """Prompt id by sample id, in the order of `samples`, without reading latents and pixels."""
        tables = [self.storage.read_table(part, ["sample_id", "prompt_id"]) for part in self._parts("samples")]
        return dict(sorted((row["sample_id"], row["prompt_id"]) for table in tables for row in table.to_pylist()))

    def policy_versions(self) -> set[int]:
        """Of the policies that drew its samples."""
        parts = (self.storage.read_table(part, ["policy_version"]) for part in self._parts("samples"))
        return {version for table in parts for version in table["policy_version"].to_pylist()}

    def prompt_texts(self) -> set[str]:
        parts = (self.storage.read_table(part, ["prompt"]) for part in self._parts("samples"))
        return {text for table in parts for text in table["prompt"].to_pylist()}

    def scores(self) -> list[Score]:
        """One a sample and scorer; a value that came after a failure stands in its place."""
        tables = [self.storage.read_table(part) for part in self._parts("scores")]
        scores = table_to_scores(pa.concat_tables([SCORE_SCHEMA.empty_table(), *tables]))
        scores.sort(key=lambda score: (score.sample_id, score.scorer, score.value is not None))
        return list({(score.sample_id, score.scorer): score for score in scores}.values())

    def verdicts(self) -> list[Verdict]:
        """Verdicts sealed in this round; some may be on samples of earlier rounds, which people answered late."""
        tables = [self.storage.read_table(part) for part in self._parts("verdicts")]
        records = table_to_verdicts(pa.concat_tables([VERDICT_SCHEMA.empty_table(), *tables]))
        return sorted(records, key=lambda verdict: verdict.sample_id)

    def seal(self, **facts: Any) -> None:
        """Close the round: its manifest, written last, names every file with its hash, and `facts`."""
        if self.sealed:
            return
        files = {part: hashlib.sha256(self.storage.read(part)).hexdigest() for part in self._all_parts()}
        self.storage.write_json("manifest.json", {"stage": self.stage, **facts, "files": files})
        self.sealed = True

    @property
    def manifest(self) -> dict[str, Any]:
        """Raises FileNotFoundError while the round is open."""
        manifest: dict[str, Any] = self.storage.read_json("manifest.json")
        return manifest

    def verify(self) -> None:
        """Raises ValueError when a file is not as it was sealed, is gone, or came later."""
        sealed = self.manifest["files"]
        if others := set(self._all_parts()) ^ sealed.keys():
            raise ValueError(f"{self.storage}: {sorted(others)[0]} was added or removed since the round was sealed")
        for part, digest in sealed.items():
            if hashlib.sha256(self.storage.read(part)).hexdigest() != digest:
                raise ValueError(f"{self.storage}/{part} has changed since the round was sealed")

    @property
    def trained(self) -> bool:
        return self.storage.exists("training.json")

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

    def rounds(self) -> list[Round]:
        return [self.round(int(name)) for name in self.storage.names() if name.isdigit()]

    def trainable(self, index: int, policy_version: int, max_policy_lag: int) -> tuple[list[Sample], list[bool]]:
        """The samples that a sealed round trains on, and whether each is desirable.

        Those with a verdict, made by a policy at most `max_policy_lag` versions older than `policy_version`, in the
        order of their ids. Samples of earlier rounds whose verdict came late are fetched from there; a sample that
        got a verdict in an earlier round already keeps that one and is not trained on again. In a replayed round
        ("replayed_from" in its manifest) whatever policy made a sample will do: that is what replaying means.
        """
        replayed = "replayed_from" in self.round(index).manifest
        desirable = {
            verdict.sample_id: verdict.label == "desirable"
            for verdict in self.round(index).verdicts()
            if verdict.label in ("desirable", "undesirable")
        }
        stages = {sample_id.rpartition("-")[0] for sample_id in desirable}
        homes = [round_number(stage) for stage in sorted(stages)]
        for earlier in range(min(homes, default=index), index):
            for verdict in self.round(earlier).verdicts():
                desirable.pop(verdict.sample_id, None)
        samples = [
            sample
            for home in homes
            for sample in self.round(home).samples()
            if sample.id in desirable and (replayed or policy_version - sample.policy.version <= max_policy_lag)
        ]
        return samples, [desirable[sample.id] for sample in samples]

    def ledger(self) -> Ledger:
        """Adds up all rounds from their tables alone."""
        labels: dict[str, str] = {}
        generated, trained = set[str](), list[str]()
        for round_ in self.rounds():
            generated |= round_.sample_ids
            labels = {verdict.sample_id: verdict.label for verdict in round_.verdicts()} | labels
            trained += round_.trained_ids()
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
