"""What travels through the loop: prompts, samples, scores, verdicts and policies, and their Arrow schemas.

Everybody imports this module and it imports nobody. Records are frozen; tables are what `rounds.py` stores, one row a
record, so that a round folder can be read by anything that reads Parquet.

Shape suffixes: N rows; C, H, W channels, height, width of latents (CHW) and pixels (HWC).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
class Sample:
    """One generated image: what was asked for, who made it, and both its faces.

    `latents_CHW` is the clean latent as the sampler left it (float32, in the scaled space in which the model is
    trained); `pixels_HWC` is its decoding (uint8 RGB). Neither is ever recomputed from the other.
    """

    id: str
    stage: str
    prompt: Prompt
    index: int
    seed: int
    policy: PolicyRef
    latents_CHW: npt.NDArray[np.float32]
    pixels_HWC: npt.NDArray[np.uint8]
    error: str | None = None
    """Why this is no image: its numbers are not finite. Its pixels are black then; nobody is shown them, no scorer
    scores them, its verdict is "failed"."""


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


def samples_to_table(samples: Sequence[Sample]) -> pa.Table:
    """One row a sample; `latents` and `pixels` are fixed-shape tensor columns.

    Raises:
        ValueError: no samples, or samples whose latents or pixels differ in shape.
    """
    if not samples:
        raise ValueError("a table of samples needs at least one sample: its tensor shapes come from them")
    return pa.table(
        {
            "sample_id": [s.id for s in samples],
            "stage": [s.stage for s in samples],
            "prompt_id": [s.prompt.id for s in samples],
            "prompt": [s.prompt.text for s in samples],
            "prompt_metadata": pa.array([list(s.prompt.metadata.items()) for s in samples], METADATA_TYPE),
            "index": pa.array([s.index for s in samples], pa.int32()),
            "seed": pa.array([s.seed for s in samples], pa.int64()),
            "policy_version": pa.array([s.policy.version for s in samples], pa.int32()),
            "policy_digest": [s.policy.digest for s in samples],
            "latents": _tensors([s.latents_CHW for s in samples]),
            "pixels": _tensors([s.pixels_HWC for s in samples]),
            "error": pa.array([s.error for s in samples], pa.string()),
        }
    )


def _tensors(arrays: Sequence[npt.NDArray[Any]]) -> pa.Array:
    # Arrow stores an array that is not in C order transposed, and gives it back transposed.
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(np.stack(arrays)))


def table_to_samples(table: pa.Table) -> list[Sample]:
    """The inverse of `samples_to_table`."""
    table = table.combine_chunks()
    latents_NCHW, pixels_NHWC = tensor_column(table, "latents"), tensor_column(table, "pixels")
    rows = table.drop_columns(["latents", "pixels"]).to_pylist()
    return [
        Sample(
            id=row["sample_id"],
            stage=row["stage"],
            prompt=Prompt(row["prompt_id"], row["prompt"], dict(row["prompt_metadata"])),
            index=row["index"],
            seed=row["seed"],
            policy=PolicyRef(row["policy_version"], row["policy_digest"]),
            latents_CHW=latents_CHW,
            pixels_HWC=pixels_HWC,
            error=row.get("error"),  # rounds of older versions have no such column
        )
        for row, latents_CHW, pixels_HWC in zip(rows, latents_NCHW, pixels_NHWC, strict=True)
    ]


def tensor_column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """A fixed-shape tensor column as one array of shape (N, ...)."""
    column = table.column(name).combine_chunks()
    array: npt.NDArray[Any] = column.to_numpy_ndarray()
    return array
