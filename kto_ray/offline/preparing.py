"""A prepared set of a source, made with Ray Data: listed, planned, encoded, sealed; each step only as far as it lacks.

    listing.py    every part of the source: what its images are              -> sets/<key>/listed/
    scoring.py    verdicts and filters by scorers, where `data` asks for them  -> sets/<key>/scores/
    planning.py   what is in the set, what is left out, which shards         -> sets/<key>/plan.parquet
    encoding.py   read -> decode (tasks) -> encode (actors) -> store (tasks)  -> latents/, samples/
    here          what became of every image                                  -> sets/<key>/set.json

The plan is written down before the first shard is made, so that the same command, whatever stopped it, makes the shards
that are missing and no others; each is named after what is in it. What another set has encoded is not encoded again.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from kto_ray.config import RunConfig, public
from kto_ray.data.held_out import Apart, held_out_prompts
from kto_ray.data.protocol import Source
from kto_ray.errors import UserError
from kto_ray.offline.encoding import (
    INDEX,
    DecodeShard,
    EncodeShard,
    Encoding,
    ReadPart,
    StoreShard,
    index_of,
    table_bytes,
)
from kto_ray.offline.listing import LISTED, ListPart, name_of
from kto_ray.offline.planning import AHEAD, LEFT_OUT, SHARD_BYTES, SetPlan, plan_set
from kto_ray.offline.scoring import Scoring, asks_scorers
from kto_ray.offline.showing import counting, quietly
from kto_ray.parts import AT_ONCE
from kto_ray.prepared import HELD_OUT, PREPARED, PreparedSet, sample_id, write_set
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

EXAMPLES = 3  # of what is left out, that are said


def prepared_folder(config: RunConfig) -> Storage:
    """Where encoded images are kept."""
    assert config.data is not None
    return Storage(config.data.prepare.folder or f"{config.runs_folder.rstrip('/')}/_prepared")


class Preparing:
    """Prepares one set; see the module.

    Args:
        held_out: prompts whose images are left out, besides those that `data.held_out_share` sets apart.
        folder: of the encoding.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        encoding: Encoding,
        held_out: Sequence[str],
        folder: Storage,
        console: Console,
    ) -> None:
        assert config.data is not None
        self.config, self.source, self.encoding, self.held_out = config, source, encoding, held_out
        self.settings, self.share = config.data.prepare, config.data.held_out_share
        self.folder, self.console = folder, console
        self.parts = list(source.parts())
        # A run keeps to what it has listed; another one looks anew: files have the same names when votes have come.
        run = f"{config.runs_folder.rstrip('/')}/{config.run}"
        data = public(config.data)
        sources = data["mix"]["source"] if config.data.mix else data["sources"]
        named = [run, sources, [part.name for part in self.parts], sorted(held_out), self.share]
        if asks_scorers(config):
            named += [config.data.score, data["filters"], public(config.label)]
        self.set = PreparedSet(self.folder, hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16])

    def prepare(self) -> PreparedSet:
        """The sealed set, whatever of it was there before.

        Raises:
            UserError: nothing is left to train on, or the source cannot be read.
        """
        if not self.set.sealed:
            if not self.folder.exists("encoding.json"):
                self.folder.write_json("encoding.json", asdict(self.encoding))
            began = time.monotonic()
            self._list()
            plan = self._plan()
            images, seconds = self._encode(plan.to_encode)
            self._seal(plan, {"encoded": images, "seconds": time.monotonic() - began, "seconds/encode": seconds})
        self._say()
        return self.set

    # -- list ---------------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        listed = self.set.storage / "listed"
        there = set(listed.names())
        missing = {number: part for number, part in enumerate(self.parts) if name_of(number) not in there}
        if not missing:
            return
        import ray.data

        stage = ListPart(self.source, missing, listed)
        dataset = quietly(ray.data.from_items([{"part": number} for number in missing])).map(stage)
        known = [part.rows for part in missing.values()]
        total = None if None in known else sum(rows or 0 for rows in known)
        with counting(self.console, "list images", total, "images") as advance:
            for row in dataset.iter_rows():
                advance(row["images"])

    def _plan(self) -> SetPlan:
        storage = self.set.storage
        if not storage.exists("plan.json"):
            lists = [storage.read_table(f"listed/{name_of(number)}") for number in range(len(self.parts))]
            lists = lists or [LISTED.empty_table()]
            known = set(self._index()["content"].to_pylist())
            size, multiple, resize = self.encoding.size, self.encoding.multiple, self.encoding.resize
            apart = Apart(self.held_out, self.share)
            if asks_scorers(self.config):
                scoring = Scoring(self.config, self.source, self.parts, self.encoding, storage, self.console)
                lists = scoring.judge(lists, apart)
            plan = plan_set(lists, size, multiple, resize, apart, known)
            if self.share:
                texts = pc.unique(pa.concat_tables(lists)["prompt"]).to_pylist()
                storage.write_json(HELD_OUT, [asdict(prompt) for prompt in held_out_prompts(texts, self.share)])
            files = {name: storage.write_table(f"plan/{name}.parquet", table) for name, table in vars(plan).items()}
            storage.write_json("plan.json", files)
        return SetPlan(*(storage.read_table(f"plan/{name}.parquet") for name in ("rows", "left_out", "to_encode")))

    # -- encode -------------------------------------------------------------------------------------------------------

    def _encode(self, to_encode: pa.Table) -> tuple[int, float]:
        """Make the shards that are missing; gives how many images that encoded, and in how many seconds."""
        there = pa.array([name.removesuffix(".parquet") for name in self.folder.names("samples")], pa.string())
        missing = to_encode.filter(pc.invert(pc.is_in(to_encode["shard"], value_set=there)))
        if not missing.num_rows:
            return 0, 0.0
        import ray.data
        from ray.data import ActorPoolStrategy

        parts = {number: self.parts[number] for number in pc.unique(missing["part"]).to_pylist()}
        items = [
            {"part": number, "planned": table_bytes(missing.filter(pc.equal(missing["part"], number)))}
            for number in parts
        ]
        pool = ActorPoolStrategy(min_size=self.settings.min_encoders, max_size=self.settings.max_encoders)
        resources = self.settings.resources
        dataset = quietly(ray.data.from_items(items), AHEAD * SHARD_BYTES * (1 + self.settings.max_encoders))
        # Stages that ask for the same would run as one: a part would be decoded and encoded by a single actor.
        dataset = dataset.map_batches(
            ReadPart(self.source, parts), batch_size=1, batch_format="pyarrow", memory=4 * SHARD_BYTES
        )
        dataset = dataset.map(DecodeShard(self.settings.background), memory=8 * SHARD_BYTES)
        dataset = dataset.map(
            EncodeShard,
            fn_constructor_args=(self.config.model, self.settings),
            compute=pool,
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus or None,
        )
        began, images = time.monotonic(), 0
        with counting(self.console, "encode images", missing.num_rows, "images") as advance:
            for row in dataset.map(StoreShard(self.folder)).iter_rows():
                images += row["images"]
                advance(row["images"] + row["unreadable"])
        return images, time.monotonic() - began

    def _index(self) -> pa.Table:
        """What has become of every image of this encoding so far, rows of `INDEX`; kept up to date in one file."""
        there = [name.removesuffix(".parquet") for name in self.folder.names("samples")]
        known = self.folder.read_table("index.parquet") if self.folder.exists("index.parquet") else INDEX.empty_table()
        new = sorted(set(there) - set(pc.unique(known["part"]).to_pylist()))
        if not new:
            return known
        with ThreadPoolExecutor(AT_ONCE) as pool:
            tables = list(pool.map(lambda shard: index_of(self.folder, shard), new))
        index = pa.concat_tables([known, *tables])
        self.folder.write_table("index.parquet", index)
        return index

    # -- seal ---------------------------------------------------------------------------------------------------------

    def _seal(self, plan: SetPlan, facts: dict[str, Any]) -> None:
        index = self._index()
        place_of = dict(zip(index["content"].to_pylist(), range(index.num_rows), strict=True))
        became = index.take([place_of[content] for content in plan.rows["content"].to_pylist()])
        readable = pc.is_null(became["why"])
        rows, found = plan.rows.filter(readable), became.filter(readable)
        bad = pc.invert(readable)
        unreadable = pa.table({"id": plan.rows.filter(bad)["id"], "why": became.filter(bad)["why"]})
        left_out = pa.concat_tables([plan.left_out, unreadable.cast(LEFT_OUT)])
        if not rows.num_rows:
            raise UserError(f"data: no image is left to train on{_reasons(left_out)}")
        ids = [sample_id(*one) for one in zip(rows["content"].to_pylist(), rows["prompt"].to_pylist(), strict=True)]
        columns = {"sample_id": pa.array(ids, pa.string()), "source_id": rows["id"]}
        columns |= {name: found[name] for name in ("part", "row", "latents_digest")}
        columns |= {name: rows[name] for name in PREPARED.names if name not in columns}
        samples = pa.table({name: columns[name] for name in PREPARED.names})
        reasons = Counter(left_out["why"].to_pylist())
        of_source = {"sources": [part.name for part in self.parts[:100]], "encoding": asdict(self.encoding)}
        write_set(self.folder, self.set.key, samples, left_out, {"left_out": dict(reasons), **of_source, **facts})

    def _say(self) -> None:
        manifest = self.set.manifest
        text = f"{manifest['images']} labelled images: {manifest['desirable']} yes, {manifest['undesirable']} no"
        if encoded := manifest["encoded"]:
            text += f"; {encoded} encoded in {manifest['seconds/encode']:.0f} s"
        self.console.print(text, highlight=False)
        if manifest["left_out"]:
            left_out = self.set.storage.read_table("left_out.parquet")
            self.console.print(
                f"  left out{_reasons(left_out)}; all are in {self.set.storage}/left_out.parquet",
                style="yellow",
                markup=False,
                highlight=False,
            )


def _reasons(left_out: pa.Table) -> str:
    """How many are left out for which reason, with some ids."""
    if not left_out.num_rows:
        return ""
    ids: dict[str, list[str]] = {}
    for row in left_out.to_pylist():
        ids.setdefault(row["why"], []).append(row["id"])
    said = [
        f"{len(those)} because {why} ({', '.join(those[:EXAMPLES])}{', ...' if len(those) > EXAMPLES else ''})"
        for why, those in sorted(ids.items(), key=lambda item: -len(item[1]))[:10]
    ]
    return ": " + "; ".join(said)
