"""What travels through the loop: prompts, samples, scores, verdicts and policies, and their Arrow schemas.

Everybody imports this module and it imports nobody. Records are frozen; tables are what `rounds.py` stores, one row a
record, so that a round folder can be read by anything that reads Parquet.

Shape suffixes: C, H, W channels, height, width of latents (CHW) and pixels (HWC).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Label = Literal["desirable", "undesirable", "abstain", "failed"]
LABELS: tuple[Label, ...] = ("desirable", "undesirable", "abstain", "failed")


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that follows from its parts alone, on every machine and Python version."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to draw. `id` is unique in its prompt set and is what seeds and held-out splits go by."""

    id: str
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """A policy by number and proof: `digest` is the SHA-256 of its safetensors; version 0 is the base model."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One image to draw. Id and seed follow from (run seed, stage, prompt id, index): placement changes nothing.

    `stage` is "round-00003" for training samples and "evaluation" for held-out ones.
    """

    id: str
    stage: str
    prompt: Prompt
    index: int
    seed: int

    @classmethod
    def make(cls, run_seed: int, stage: str, prompt: Prompt, index: int) -> "SampleRequest":
        seed = derive_seed(run_seed, stage, prompt.id, index)
        return cls(id=f"{stage}-{seed:016x}", stage=stage, prompt=prompt, index=index, seed=seed)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the arrays of a sample lie in its round's folder (see `parts.py`), and the SHA-256 of their bytes."""

    part: str
    row: int
    latents_digest: str
    pixels_digest: str


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One generated image without its arrays: what was asked for, who made it, and where it lies."""

    id: str
    stage: str
    prompt: Prompt
    index: int
    seed: int
    policy: PolicyRef
    error: str | None = field(default=None, kw_only=True)
    """Why this is no image: its numbers are not finite. Its pixels are black then; nobody is shown them, no scorer
    scores them, its verdict is "failed"."""
    place: Place | None = field(default=None, kw_only=True, compare=False)
    """None while it is not stored."""
    look: bytes = field(default=b"", kw_only=True, compare=False, repr=False)
    """What its pixels look like in a few numbers, see `pictures.look`; empty where nobody looked."""

    def __getattr__(self, name: str) -> NoReturn:
        if name == "pixels_HWC":
            raise AttributeError(
                "a record has no pixels_HWC; a labeler fetches the pixels of all samples that it was given with: "
                "await samples.pixels_BHWC()"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Sample(SampleRecord):
    """One generated image with both its faces, as a sampler leaves it.

    `latents_CHW` is the clean latent (float32, in the scaled space in which the model is trained); `pixels_HWC` is its
    decoding (uint8 RGB). Neither is ever recomputed from the other.
    """

    latents_CHW: npt.NDArray[np.float32]
    pixels_HWC: npt.NDArray[np.uint8]

    @classmethod
    def of(
        cls, record: SampleRecord, latents_CHW: npt.NDArray[np.float32], pixels_HWC: npt.NDArray[np.uint8]
    ) -> "Sample":
        return cls(
            *(record.id, record.stage, record.prompt, record.index, record.seed, record.policy),
            latents_CHW=latents_CHW,
            pixels_HWC=pixels_HWC,
            error=record.error,
            place=record.place,
            look=record.look,
        )

    def record(self, place: Place | None = None, look: bytes = b"") -> SampleRecord:
        """Without the arrays, which lie at `place`."""
        return SampleRecord(
            *(self.id, self.stage, self.prompt, self.index, self.seed, self.policy),
            error=self.error,
            place=place or self.place,
            look=look or self.look,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer says of a sample: a finite `value`, or None with the `error` that stood in its way."""

    sample_id: str
    scorer: str
    scorer_version: str
    value: float | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a labeler says of a sample; "failed": that nothing could be found out, which is never trained on.

    `rule` says how it came to it, for instance "absolute@1(value=0.5, dead_band=0): shapes >= 0.5".
    """

    sample_id: str
    label: Label
    labeler: str
    rule: str


METADATA_TYPE = pa.map_(pa.string(), pa.string())
SCORE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("scorer", pa.string(), nullable=False),
        pa.field("scorer_version", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("error", pa.string()),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("labeler", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
    ]
)


def scores_to_table(scores: Sequence[Score]) -> pa.Table:
    return pa.Table.from_pylist([{name: getattr(s, name) for name in SCORE_SCHEMA.names} for s in scores], SCORE_SCHEMA)


def table_to_scores(table: pa.Table) -> list[Score]:
    return [Score(**row) for row in table.to_pylist()]


def verdicts_to_table(verdicts: Sequence[Verdict]) -> pa.Table:
    rows = [{name: getattr(verdict, name) for name in VERDICT_SCHEMA.names} for verdict in verdicts]
    return pa.Table.from_pylist(rows, VERDICT_SCHEMA)


def table_to_verdicts(table: pa.Table) -> list[Verdict]:
    return [Verdict(**row) for row in table.to_pylist()]


RECORD_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_metadata", METADATA_TYPE),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
        pa.field("policy_digest", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
PLACE_SCHEMA = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("latents_digest", pa.string(), nullable=False),
        pa.field("pixels_digest", pa.string(), nullable=False),
    ]
)


def records_to_table(records: Sequence[SampleRecord]) -> pa.Table:
    """One row a sample, without its arrays and its place."""
    rows = [
        (
            *(r.id, r.stage, r.prompt.id, r.prompt.text, list(r.prompt.metadata.items()), r.index, r.seed),
            *(r.policy.version, r.policy.digest, r.error),
        )
        for r in records
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(RECORD_SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, RECORD_SCHEMA, strict=True)], RECORD_SCHEMA)


def index_to_table(records: Sequence[SampleRecord]) -> pa.Table:
    """One row a sample with its place, which it must have."""
    places = [record.place for record in records]
    table = records_to_table(records)
    for field_ in PLACE_SCHEMA:
        table = table.append_column(field_, pa.array([getattr(place, field_.name) for place in places], field_.type))
    return table


def table_to_records(table: pa.Table) -> list[SampleRecord]:
    """The inverse of `records_to_table`, with the places where the table has them."""
    return [
        SampleRecord(
            id=row["sample_id"],
            stage=row["stage"],
            prompt=Prompt(row["prompt_id"], row["prompt"], dict(row["prompt_metadata"])),
            index=row["index"],
            seed=row["seed"],
            policy=PolicyRef(row["policy_version"], row["policy_digest"]),
            error=row.get("error"),  # rounds of older versions have no such column
            place=Place(*(row[name] for name in PLACE_SCHEMA.names)) if "part" in row else None,
            look=row.get("look") or b"",
        )
        for row in table.to_pylist()
    ]
