"""Verdicts and filters of labelled images by scorers: what `data.score` and `data.filters` ask for.

    lists  ->  which images   ->  read -> decode (Ray Data)  ->  scorers (`score/pool.py`)  ->  sets/<key>/scores/
           ->  lists with verdicts by `label`, and without what filters leave out  ->  planning.py

Scorers see images as they are trained on: upright, and cut to the model's size. A shard's scores are written down once
all are there, so that what was stopped goes on at the shard where it was. Verdicts are those of `label/judging.py`, for
which the whole set is one round; scores and rule stay in the metadata of each image.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from kto_ray.concurrency import as_done, together
from kto_ray.config import Filter, RunConfig
from kto_ray.data.held_out import Apart
from kto_ray.data.protocol import Part, Source
from kto_ray.label.judging import BY_THRESHOLD, judge_round
from kto_ray.offline.encoding import DecodeShard, Encoding, ReadPart, Row, bytes_table, table_bytes
from kto_ray.offline.listing import LISTED
from kto_ray.offline.planning import AHEAD, FILTERED, SHARD_BYTES, plan_scoring
from kto_ray.offline.showing import counting, quietly
from kto_ray.prepared import NOBODY, STAGE, sample_id, text_id
from kto_ray.records import Prompt, SampleRecord, Score, Verdict, scores_to_table, table_to_scores
from kto_ray.rounds import by_sample
from kto_ray.samples import Samples
from kto_ray.score.pool import ScorerPool, require_scored
from kto_ray.storage import Storage

UNREADABLE = ""
"""In the place of a scorer: nobody could score the image, which cannot be read."""
Scores = Mapping[str, Mapping[str, Score]]


def asks_scorers(config: RunConfig) -> bool:
    assert config.data is not None
    return config.data.score != "none" or bool(config.data.filters)


class Scoring:
    """Scores what needs it of a source; see the module.

    Args:
        folder: of the set.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        parts: Sequence[Part],
        encoding: Encoding,
        folder: Storage,
        console: Console,
    ) -> None:
        assert config.data is not None
        self.config, self.data, self.source, self.parts = config, config.data, source, parts
        self.encoding, self.folder, self.console = encoding, folder / "scores", console

    def judge(self, lists: Sequence[pa.Table], held_out: Apart) -> list[pa.Table]:
        """Lists of parts with what scorers say of their images.

        Args:
            lists: of `LISTED`, one a part.
            held_out: images of these prompts are left out, and not scored.

        Raises:
            UserError: a scorer cannot be built, or failed on more images than `label.max_failed_fraction` allows.
        """
        encoding = self.encoding
        plan = plan_scoring(
            *(lists, encoding.size, encoding.multiple, encoding.resize, held_out),
            also_with_verdict=bool(self.data.filters) or self.data.score == "all",
            also_without=self.data.score != "none",
        )
        names = list(dict.fromkeys(plan["shard"].to_pylist()))
        there = {name.removesuffix(".parquet") for name in self.folder.names()}
        missing = pa.array([name for name in names if name not in there], pa.string())
        to_score = plan.filter(pc.is_in(plan["shard"], value_set=missing))
        if to_score.num_rows:
            asyncio.run(self._score(to_score))
        scores = [score for name in names for score in table_to_scores(self.folder.read_table(f"{name}.parquet"))]
        failures = [score for score in scores if score.value is None]
        if self.data.score != "none":
            require_scored(self.config.label, "data.score", failures, plan.num_rows)
        require_scored(self.config.label, "data.filters", failures, plan.num_rows, self.data.filters)
        return judged(lists, by_sample(scores), self.config)

    # -- scoring ------------------------------------------------------------------------------------------------------

    async def _score(self, to_score: pa.Table) -> None:
        import ray.data

        parts = {number: self.parts[number] for number in pc.unique(to_score["part"]).to_pylist()}
        items = [
            {"part": number, "planned": table_bytes(to_score.filter(pc.equal(to_score["part"], number)))}
            for number in parts
        ]
        dataset = quietly(ray.data.from_items(items), 2 * AHEAD * SHARD_BYTES).map_batches(
            ReadPart(self.source, parts), batch_size=1, batch_format="pyarrow", memory=4 * SHARD_BYTES
        )
        dataset = dataset.map(DecodeShard(self.data.prepare.background), memory=8 * SHARD_BYTES)
        pools = self._pools()
        try:
            async with together() as group:
                for pool in pools.values():
                    group.create_task(pool.start())
            rows = iter(dataset.iter_rows())
            with counting(self.console, "score images", to_score.num_rows, "images") as advance:
                while (row := await asyncio.to_thread(next, rows, None)) is not None:
                    scores, images = await self._score_shard(row, pools)
                    await asyncio.to_thread(self.folder.write_table, f"{row['shard']}.parquet", scores_to_table(scores))
                    advance(images)
        finally:
            for pool in pools.values():
                pool.close()

    def _pools(self) -> dict[str, ScorerPool]:
        cluster, voting = self.config.cluster, self.config.label.voting if self.data.score != "none" else {}
        pools = {name: ScorerPool(name, settings, cluster) for name, settings in voting.items()}
        filters = self.data.filters.items()
        return pools | {name: ScorerPool(name, settings, cluster, "data.filters") for name, settings in filters}

    async def _score_shard(self, row: Row, pools: Mapping[str, ScorerPool]) -> tuple[list[Score], int]:
        """Scores of a shard's images, and how many those are, with the ones that cannot be read."""
        pixels_NHWC = np.frombuffer(row["pixels"], np.uint8).reshape(-1, int(row["height"]), int(row["width"]), 3)
        records = [
            SampleRecord(
                *(sample_id(one["content"], one["prompt"]), STAGE, Prompt(text_id(one["prompt"]), one["prompt"])),
                *(0, 0, NOBODY),
            )
            for one in bytes_table(row["records"]).to_pylist()
        ]
        size = self.data.prepare.batch_size
        batches = [
            Samples(records[start : start + size], pixels_BHWC=pixels_NHWC[start : start + size])
            for start in range(0, len(records), size)
        ]
        scores = list[Score]()
        async with aclosing(as_done(pool.score(batch) for batch in batches for pool in pools.values())) as answers:
            async for answer in answers:
                scores += answer
        unreadable = json.loads(row["unreadable"])
        scores += [Score(content, UNREADABLE, "", None, why) for content, why in unreadable.items()]
        scores.sort(key=lambda score: (score.sample_id, score.scorer))
        return scores, len(records) + len(unreadable)


# -- judging ----------------------------------------------------------------------------------------------------------


def judged(lists: Sequence[pa.Table], scores: Scores, config: RunConfig) -> list[pa.Table]:
    """Rows of `LISTED` with verdicts of `label` where `data.score` asks for them, and with a `why` where an image
    passes no filter, or could not be scored; scores and rule in their metadata.

    Args:
        scores: by sample id (`prepared.sample_id`), or by content for images that cannot be read, and by scorer.
    """
    assert config.data is not None
    data, rows = config.data, [listed.to_pylist() for listed in lists]
    wanting = {
        name: text_id(row["prompt"])
        for row in (row for part in rows for row in part)
        if (name := _id(row)) in scores and data.score != "none" and (row["desirable"] is None or data.score == "all")
    }
    verdicts: dict[str, Verdict] = {}
    if wanting:
        verdicts = {verdict.sample_id: verdict for verdict in judge_round(config.label, scores, wanting, None).verdicts}
    return [
        pa.Table.from_pylist([_judged(row, scores, verdicts, data.filters) for row in part], LISTED) for part in rows
    ]


def _id(row: Row) -> str:
    return sample_id(row["content"], row["prompt"]) if row["content"] else ""


def _judged(row: Row, scores: Scores, verdicts: Mapping[str, Verdict], filters: Mapping[str, Filter]) -> Row:
    name = _id(row)
    if row["content"] in scores:
        return row | {"why": scores[row["content"]][UNREADABLE].error}
    found = scores.get(name)
    if found is None:
        return row
    kept: dict[str, Any] = {"scores": {scorer: score.value for scorer, score in found.items()}}
    row = dict(row)
    if verdict := verdicts.get(name):
        kept["rule"] = verdict.rule
        row |= {"desirable": {"desirable": True, "undesirable": False}.get(verdict.label), "who": BY_THRESHOLD}
        if verdict.label == "failed":
            row["why"] = f"it could not be scored: {verdict.rule}"
    row["metadata"] = json.dumps(json.loads(row["metadata"] or "{}") | kept, ensure_ascii=False)
    return row | {"why": row["why"] or _left_out(found, filters)}


def _left_out(found: Mapping[str, Score], filters: Mapping[str, Filter]) -> str | None:
    """By which filter, and why; None: it passes all."""
    for name, settings in filters.items():
        value = found[name].value
        if value is None:
            return f"it could not be scored: no score of {name}: {found[name].error}"
        if settings.at_most is not None and value > settings.at_most:
            return f"{FILTERED}: its score by {name} is above {settings.at_most:g}"
        if settings.at_least is not None and value < settings.at_least:
            return f"{FILTERED}: its score by {name} is below {settings.at_least:g}"
    return None
