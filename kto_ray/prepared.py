"""Prepared sets: labelled images as latents in sealed Parquet shards, ready to be streamed, and how they are read.

    <folder>/<encoding>/encoding.json                   one autoencoder, size, and way of decoding; their digest
             latents/<shard>.parquet  samples/...       what was encoded, each image once; parts of `parts.py`
             sets/<key>/samples.parquet                 a set: its rows of `PREPARED`, in the order of the source
                        left_out.parquet                what is not in it, and why
                        set.json                        seals: digests, counts, where it is from; written last

A shard knows nothing of prompts' sets or verdicts: sets that share images share shards. `offline/preparing.py` writes
both, `train/streaming.py` reads them on every train worker.

Shape suffixes: N rows of the set; B rows asked for; C, H, W latent channels, height, width.
"""

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kto_ray.errors import UserError
from kto_ray.parts import read_arrays
from kto_ray.records import Place, PolicyRef, Prompt, SampleRecord
from kto_ray.storage import Storage

FORMAT = 1
HELD_OUT = "held_out.json"
"""In a set's folder: prompts of its source that were set apart."""
STAGE = "data"
"""Of the samples of a set, which no policy of the run has drawn."""
NOBODY = PolicyRef(0, "")
"""Who drew them, as far as is known."""
PREPARED = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("desirable", pa.bool_(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("who", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("latents_digest", pa.string(), nullable=False),
    ]
)
"""One row an image and prompt. `sample_id` follows from both; `height` and `width` are those that it was cut to, in
pixels; the last three say where its latents lie."""
FOR_TRAINING = ["sample_id", "prompt", "desirable", "height", "width", "part", "row", "latents_digest"]


def sample_id(content: str, prompt: str) -> str:
    """Args: content: the SHA-256 of an image file."""
    return f"{STAGE}-{hashlib.sha256(f'{content} {prompt}'.encode()).hexdigest()[:24]}"


def is_labelled(sample_id: str) -> bool:
    """Whether it is the id of a labelled image, and not of one that a policy of the run has drawn."""
    return sample_id.startswith(f"{STAGE}-")


def text_id(prompt: str) -> str:
    """What a prompt is known by that only has a text."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


class PreparedSet:
    """A sealed set. Its rows are read once, without arrays: some 200 bytes an image.

    Args:
        folder: that of its encoding, which has the shards.
        key: its name in `sets/`.
    """

    def __init__(self, folder: Storage, key: str) -> None:
        self.folder, self.key = folder, key

    @property
    def storage(self) -> Storage:
        return self.folder / "sets" / self.key

    @property
    def sealed(self) -> bool:
        return self.storage.exists("set.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Raises UserError when a newer version has made it, FileNotFoundError when it is not sealed."""
        manifest: dict[str, Any] = self.storage.read_json("set.json")
        if manifest["format"] > FORMAT:
            raise UserError(
                f"{self.storage} was made by a newer version of kto-ray: its format is {manifest['format']}, this "
                f"version reads up to {FORMAT}"
            )
        return manifest

    @cached_property
    def table(self) -> pa.Table:
        """What training asks of the rows, with texts that come again kept once.

        Raises:
            ValueError: they are not as they were sealed.
        """
        data = self.storage.read("samples.parquet")
        if hashlib.sha256(data).hexdigest() != self.manifest["files"]["samples.parquet"]:
            raise ValueError(f"{self.storage}/samples.parquet has changed since the set was sealed")
        return pq.read_table(pa.BufferReader(data), columns=FOR_TRAINING, read_dictionary=["prompt", "part"])

    def __len__(self) -> int:
        return int(self.manifest["images"])

    @cached_property
    def desirable_N(self) -> npt.NDArray[np.bool_]:
        return self._numbers("desirable")

    @cached_property
    def size_N(self) -> npt.NDArray[np.int64]:
        """Number of each image's size, counted from the smallest: images of one size may be in one batch."""
        heights, widths = (self._numbers(name).astype(np.int64) for name in ("height", "width"))
        numbers_N: npt.NDArray[np.int64] = np.unique(heights << 32 | widths, return_inverse=True)[1].reshape(-1)
        return numbers_N

    @cached_property
    def shard_N(self) -> npt.NDArray[np.int64]:
        """Number of each image's shard, counted as they come in the set."""
        return self._codes("part")

    @cached_property
    def prompt_N(self) -> npt.NDArray[np.int64]:
        """Number of each image's prompt, counted as they come in the set."""
        return self._codes("prompt")

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        numbers_N: npt.NDArray[Any] = self.table[name].combine_chunks().to_numpy(zero_copy_only=False)
        return numbers_N

    def _codes(self, name: str) -> npt.NDArray[np.int64]:
        codes = self.table[name].unify_dictionaries().combine_chunks().indices
        numbers_N: npt.NDArray[np.int64] = codes.to_numpy(zero_copy_only=False).astype(np.int64)
        return numbers_N

    def prompts(self) -> list[str]:
        """All texts, each once."""
        texts: list[str] = pc.unique(self.table["prompt"].cast(pa.string())).to_pylist()
        return texts

    def held_out(self) -> list[Prompt]:
        """Prompts of the source that were set apart to evaluate on."""
        return [Prompt(**one) for one in self.storage.read_json(HELD_OUT)]

    def records(self, rows_B: npt.NDArray[np.int64]) -> list[SampleRecord]:
        """Samples by their number in the set."""
        return [
            SampleRecord(
                *(row["sample_id"], STAGE, Prompt(text_id(row["prompt"]), row["prompt"]), 0, 0, NOBODY),
                place=Place(row["part"], row["row"], row["latents_digest"], ""),
            )
            for row in self.table.take(rows_B).to_pylist()
        ]

    def latents_of(self, records: Sequence[SampleRecord]) -> npt.NDArray[np.float32]:
        """(B, C, H, W), of samples of one size, at least one; see `parts.read_arrays`."""
        return read_arrays(self.folder, "latents", records)


def write_set(folder: Storage, key: str, samples: pa.Table, left_out: pa.Table, facts: dict[str, Any]) -> PreparedSet:
    """Seal a set: rows of `PREPARED`, what was left out, and `facts` of where both are from."""
    storage = folder / "sets" / key
    files = {"samples.parquet": _write(storage, "samples.parquet", samples.cast(PREPARED))}
    files["left_out.parquet"] = _write(storage, "left_out.parquet", left_out)
    desirable = int(pc.sum(samples["desirable"]).as_py() or 0)
    counts = {"images": samples.num_rows, "desirable": desirable, "undesirable": samples.num_rows - desirable}
    storage.write_json("set.json", {"format": FORMAT, **counts, **facts, "files": files})
    return PreparedSet(folder, key)


def _write(storage: Storage, name: str, table: pa.Table) -> str:
    """In row groups and pages that one who reads a column can skip; gives the SHA-256."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=2**17)
    storage.write(name, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


OF_RUN = "set.json"
"""In a run's folder: the set that it trains on."""


def keep_set(run: Storage, prepared: PreparedSet) -> None:
    """Write down that a run trains on this set."""
    digest = hashlib.sha256(prepared.storage.read("set.json")).hexdigest()
    run.write_json(OF_RUN, {"folder": prepared.folder.uri, "key": prepared.key, "digest": digest})


def set_of(run: Storage) -> PreparedSet:
    """The set that a run trains on.

    Raises:
        UserError: it is gone, or is another one now.
        FileNotFoundError: there is none yet.
    """
    kept = run.read_json(OF_RUN)
    prepared = PreparedSet(Storage(kept["folder"]), kept["key"])
    if not prepared.sealed:
        raise UserError(f"{run} trains on the prepared set {prepared.storage}, which is gone; bring it back to go on")
    if hashlib.sha256(prepared.storage.read("set.json")).hexdigest() != kept["digest"]:
        raise UserError(f"{run} trains on the prepared set {prepared.storage}, which is another one now")
    return prepared
