"""The stages between image files and shards, as Ray Data runs them: read -> decode -> encode -> store.

A row of the dataset is a whole shard on its way: tasks and actors work at one shard at a time, whatever Ray Data makes
of blocks, and the same shards come whoever works and whatever dies. `preparing.py` puts the stages together.

Shape suffixes: N images of a shard; H, W pixels; C, h, w latents.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kto_ray.config import Model, RunConfig
from kto_ray.config.preparing import Prepare
from kto_ray.data.protocol import Part, Source
from kto_ray.offline.decoding import UnreadableError, decode
from kto_ray.offline.listing import fetched
from kto_ray.parts import write_latents
from kto_ray.pictures import look
from kto_ray.prepared import NOBODY, STAGE
from kto_ray.records import Prompt, SampleRecord, derive_seed
from kto_ray.storage import Storage

Row = dict[str, Any]
UNREADABLE = "unreadable"
"""In the metadata of a shard's file of records: JSON, why images that were planned for it are not in it, by content."""


@dataclass(frozen=True)
class Encoding:
    """All that latents depend on besides the image."""

    autoencoder: str
    """Digest of its configuration and weights."""
    family: str
    size: tuple[int, int]
    """Height and width of the model's images in pixels."""
    multiple: int
    resize: str
    background: tuple[int, int, int]
    posterior: str
    dtype: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:16]


def table_bytes(table: pa.Table) -> bytes:
    """As a cell of a row."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def bytes_table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()


class ReadPart:
    """Rows ("part", "planned": rows of `Plan.to_encode`) become shards with references to, or bytes of, their files."""

    def __init__(self, source: Source, parts: Mapping[int, Part]) -> None:
        self.source, self.parts = source, parts

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            planned = bytes_table(row["planned"])
            missing = {shard["values"]: shard["counts"] for shard in planned["shard"].value_counts().to_pylist()}
            of_row = {one["row"]: one for one in planned.to_pylist()}
            gathered: dict[str, list[Row]] = {}
            start = 0
            for table in self.source.read(self.parts[row["part"]]):
                wanted = [number for number in range(table.num_rows) if start + number in of_row]
                for number, found in zip(wanted, table.take(wanted).to_pylist(), strict=True):
                    plan = of_row[start + number]
                    gathered.setdefault(plan["shard"], []).append(
                        {name: found[name] for name in ("id", "uri", "image", "prompt")} | {"content": plan["content"]}
                    )
                    missing[plan["shard"]] -= 1
                    if not missing[plan["shard"]]:
                        yield _on_its_way(plan, gathered.pop(plan["shard"]))
                start += table.num_rows


ON_ITS_WAY = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("prompt", pa.string()),
        pa.field("content", pa.string()),
    ]
)


def _on_its_way(plan: Row, rows: list[Row]) -> pa.Table:
    files = table_bytes(pa.Table.from_pylist(rows, ON_ITS_WAY))
    return pa.table(
        {
            "shard": [plan["shard"]],
            "height": [plan["height"]],
            "width": [plan["width"]],
            "files": pa.array([files], pa.large_binary()),
        }
    )


class DecodeShard:
    """A shard's image files become pixels, one array of all, and a list of what could not be read."""

    def __init__(self, background: tuple[int, int, int]) -> None:
        self.background = background

    def __call__(self, row: Row) -> Row:
        height, width = int(row["height"]), int(row["width"])
        images, records, unreadable = [], [], dict[str, str]()
        for found, file in fetched(bytes_table(row["files"])):
            try:
                if isinstance(file, UnreadableError):
                    raise file
                if hashlib.sha256(file).hexdigest() != found["content"]:
                    raise UnreadableError("the file has changed while it was prepared")
                image_HWC = decode(file, height, width, self.background)
            except UnreadableError as error:
                unreadable[found["content"]] = str(error)
                continue
            images.append(image_HWC)
            records.append({"content": found["content"], "prompt": found["prompt"], "look": look(image_HWC)})
        pixels = np.stack(images) if images else np.zeros((0, height, width, 3), np.uint8)
        return {
            "shard": row["shard"],
            "height": height,
            "width": width,
            "pixels": pixels.tobytes(),
            "records": records_bytes(records),
            "unreadable": json.dumps(unreadable),
        }


def records_bytes(records: list[Row]) -> bytes:
    schema = pa.schema({"content": pa.string(), "prompt": pa.string(), "look": pa.binary()})
    return table_bytes(pa.Table.from_pylist(records, schema))


class EncodeShard:
    """An actor with the autoencoder: a shard's pixels become latents, float32 (N, C, h, w)."""

    def __init__(self, model: Model, settings: Prepare) -> None:
        import torch

        from kto_ray.diffusion import source
        from kto_ray.diffusion.loading import DTYPES, load_family, pick_device

        resources = settings.resources
        if resources.threads or not resources.num_gpus:
            torch.set_num_threads(resources.threads or max(1, int(resources.num_cpus)))
        self.settings, self.device = settings, pick_device(settings.device, resources.num_gpus)
        folder = source.resolve(model)
        self.family = load_family(folder, model, self.device, DTYPES[settings.dtype], parts="autoencoder")

    def __call__(self, row: Row) -> Row:
        shape = (-1, int(row["height"]), int(row["width"]), 3)
        pixels_NHWC = np.frombuffer(row["pixels"], np.uint8).reshape(shape)
        contents = bytes_table(row["records"])["content"].to_pylist()
        latents_NChw = self.encode(pixels_NHWC, contents)
        rest = {name: row[name] for name in ("shard", "records", "unreadable")}
        return rest | {"latents": latents_NChw.tobytes(), "shape": json.dumps(latents_NChw.shape)}

    def encode(self, pixels_NHWC: np.ndarray[Any, Any], contents: list[str]) -> np.ndarray[Any, Any]:
        import torch

        made = []
        for start in range(0, len(contents), self.settings.batch_size):
            some = slice(start, start + self.settings.batch_size)
            images_BHWC = torch.from_numpy(pixels_NHWC[some].copy()).to(self.device)
            images_B3HW = images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
            generators = None
            if self.settings.posterior == "sample":
                seeds = [derive_seed("posterior", content) for content in contents[some]]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            with torch.inference_mode():
                made.append(self.family.encode(images_B3HW, generators).float().cpu().numpy())
        return np.concatenate(made) if made else np.zeros((0, 1, 1, 1), np.float32)


class StoreShard:
    """Writes a shard down, which is done then; what is left of the row are counts."""

    def __init__(self, folder: Storage) -> None:
        self.folder = folder

    def __call__(self, row: Row) -> Row:
        latents_NChw = np.frombuffer(row["latents"], np.float32).reshape(json.loads(row["shape"]))
        listed, unreadable = bytes_table(row["records"]).to_pylist(), json.loads(row["unreadable"])
        finite_N = [bool(np.isfinite(latents_Chw).all()) for latents_Chw in latents_NChw]
        unreadable |= {
            one["content"]: "its latents are not finite numbers; float32 may help (data.prepare.dtype)"
            for one, finite in zip(listed, finite_N, strict=True)
            if not finite
        }
        records = [
            SampleRecord(
                *(one["content"], STAGE, Prompt("", one["prompt"]), 0, 0, NOBODY),
                look=one["look"],
            )
            for one, finite in zip(listed, finite_N, strict=True)
            if finite
        ]
        kept_NChw = latents_NChw[np.array(finite_N, np.bool_)]
        write_latents(self.folder, row["shard"], records, kept_NChw, {UNREADABLE: json.dumps(unreadable)})
        return {"shard": row["shard"], "images": len(records), "unreadable": len(unreadable)}


INDEX = pa.schema(
    [
        pa.field("content", pa.string()),
        pa.field("part", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("latents_digest", pa.string()),
        pa.field("why", pa.string()),
    ]
)
"""What became of an image: where its latents lie, or why it has none."""


def index_of(folder: Storage, shard: str) -> pa.Table:
    """Rows of `INDEX` for one shard, in its order."""
    table = pq.read_table(pa.BufferReader(folder.read(f"samples/{shard}.parquet")))
    unreadable = json.loads(table.schema.metadata[UNREADABLE.encode()])
    rows = [
        {"content": content, "part": shard, "row": number, "latents_digest": digest, "why": None}
        for number, (content, digest) in enumerate(
            zip(table["sample_id"].to_pylist(), table["latents_digest"].to_pylist(), strict=True)
        )
    ]
    rows += [{"content": content, "part": shard, "why": why} for content, why in unreadable.items()]
    return pa.Table.from_pylist(rows, INDEX)


def encoding_of(config: RunConfig, size: tuple[int, int], multiple: int, autoencoder: str, family: str) -> Encoding:
    assert config.data is not None
    prepare = config.data.prepare
    return Encoding(
        *(autoencoder, family, size, multiple),
        *(prepare.resize, prepare.background, prepare.posterior, prepare.dtype),
    )
