"""Records and folders for tests: small, deterministic, made from a few words."""

import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from kto_ray.parts import write_latents
from kto_ray.prepared import NOBODY, PREPARED, STAGE, PreparedSet, sample_id, write_set
from kto_ray.records import Label, PolicyRef, Prompt, Sample, SampleRecord, SampleRequest, Score, Verdict
from kto_ray.shapes import MODEL_FOLDER
from kto_ray.storage import Storage

BASE = PolicyRef(0, "b" * 64)


def make_requests(stage: str, count: int, seed: int = 0) -> list[SampleRequest]:
    return [SampleRequest.make(seed, stage, Prompt(f"p{i}", f"prompt {i}", {"i": str(i)}), 0) for i in range(count)]


def make_sample(request: SampleRequest, policy: PolicyRef = BASE) -> Sample:
    rng = np.random.default_rng(request.seed)
    return Sample(
        id=request.id,
        stage=request.stage,
        prompt=request.prompt,
        index=request.index,
        seed=request.seed,
        policy=policy,
        latents_CHW=rng.normal(size=(4, 2, 3)).astype(np.float32),
        pixels_HWC=rng.integers(0, 256, (16, 24, 3), np.uint8),
    )


def ruined(sample: Sample) -> Sample:
    """As a replica gives it whose numbers overflowed."""
    latents_CHW, pixels_HWC = np.full_like(sample.latents_CHW, np.nan), np.zeros_like(sample.pixels_HWC)
    error = "its latents or pixels, in float16, are not finite"
    return replace(sample, latents_CHW=latents_CHW, pixels_HWC=pixels_HWC, error=error)


def make_samples(stage: str, count: int, policy: PolicyRef = BASE) -> list[Sample]:
    """In the order of their ids, as the round store gives them back."""
    return sorted((make_sample(request, policy) for request in make_requests(stage, count)), key=lambda s: s.id)


def same_sample(one: Sample, other: Sample) -> bool:
    """Equal in every field, and in every bit and the dtype of both arrays."""
    arrays = ("latents_CHW", "pixels_HWC")
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        and getattr(one, name).dtype == getattr(other, name).dtype
        if name in arrays
        else getattr(one, name) == getattr(other, name)
        for name in one.__dataclass_fields__
        if name not in ("place", "look")  # of those that are stored
    )


def make_score(sample_id: str, value: float | None = 0.7, error: str | None = None) -> Score:
    return Score(sample_id, "shapes", "1", value, error if value is not None or error else "RuntimeError: no")


def make_verdict(sample_id: str, desirable: bool | None = True) -> Verdict:
    """None abstains."""
    label: Label = "abstain" if desirable is None else "desirable" if desirable else "undesirable"
    return Verdict(sample_id, label, "threshold", "absolute@1(value=0.5, dead_band=0): shapes >= 0.5")


def write_pipeline(folder: Path) -> Path:
    """The embedded world's pipeline folder with all its configs, and with weights of a layer each."""
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(MODEL_FOLDER, folder, ignore=ignore)
    for number, weights in enumerate(sorted(MODEL_FOLDER.glob("*/*.safetensors"))):
        layer = {"attn1.to_q.weight": np.full((64, 64), number, np.float32)}
        save_file(layer, folder / weights.relative_to(MODEL_FOLDER))
    return folder


def write_prompts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_checkpoints(run: Storage, versions: Sequence[int]) -> list[str]:
    """Checkpoints of these policies as Ray Train and torch leave them, oldest first; gives their folders' names."""
    folder, results = run / "checkpoints", []
    for version in versions:
        name, file = f"checkpoint_2026-11-25_09-00-{version:02}.000000", io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("state/data.pkl"), f"version {version}" * 1000)
        folder.write(f"{name}/state.pt", file.getvalue())
        results.append({"version": 0, "checkpoint_dir_name": name, "metrics": {"version": version}})
    snapshot = {
        "ray_version": "2.60.0",
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "current_report_index": len(results),
    }
    folder.write_json("checkpoint_manager_snapshot.json", snapshot)
    return [str(result["checkpoint_dir_name"]) for result in results]


def make_set(
    folder: Path, desirable: Sequence[bool], sizes: Sequence[int] = (), prompts: Sequence[str] = (), side: int = 16
) -> PreparedSet:
    """Images whose latents are their number in the set, in shards of eight of one size.

    Args:
        sizes: of each, 0 for a square one of this side, 1 for one that is wider by half.
    """
    storage = Storage(str(folder))
    sizes, prompts = sizes or [0] * len(desirable), prompts or [f"prompt {n}" for n in range(len(desirable))]
    rows: list[dict[str, Any]] = [{} for _ in desirable]
    for size in set(sizes):
        members = [n for n, its in enumerate(sizes) if its == size]
        height, width = side, side * (2 + size) // 2
        for start in range(0, len(members), 8):
            group, part = members[start : start + 8], f"shard-{size}-{start}"
            records = [SampleRecord(f"c{n}", STAGE, Prompt("", prompts[n]), 0, 0, NOBODY) for n in group]
            latents = np.stack([np.full((4, height // 8, width // 8), n, np.float32) for n in group])
            for n, record in zip(
                group, write_latents(storage, part, records, latents, {"unreadable": "{}"}), strict=True
            ):
                assert record.place
                rows[n] = {
                    "sample_id": sample_id(f"c{n}", prompts[n]),
                    "prompt": prompts[n],
                    "desirable": desirable[n],
                    "source_id": f"row {n}",
                    "height": height,
                    "width": width,
                    "part": part,
                    "row": record.place.row,
                    "latents_digest": record.place.latents_digest,
                }
    return write_set(storage, "set", pa.Table.from_pylist(rows, PREPARED), pa.table({"id": [], "why": []}), {})
