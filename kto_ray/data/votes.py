"""A log of votes, as applications keep them: a row a vote, several an image, combined into one verdict.

    {"image_path": "7.png", "prompt": "a cat", "vote": "up", "user": "ann", "created_at": "2026-03-01T12:00:00Z"}

Files as those of kind `table`, or the answer to a query. An image is known by its path or URI, or by its bytes, and is
judged under each of its prompts apart. Votes that are neither yes nor no are none. Who disagrees with everybody can be
left out: of each person, the share of votes that are with the majority of all others on that image is taken, over
images on which these others have a majority.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from kto_ray.config.data import VotesData
from kto_ray.data.columns import FoundColumns, find_columns
from kto_ray.data.files import absolute
from kto_ray.data.labelling import Images, holds_images, prompts_of
from kto_ray.data.notes import FILTERED, NO_IMAGE, NOT_UNDERSTOOD, Notes
from kto_ray.data.protocol import Part
from kto_ray.data.rows import FileRows, Rows
from kto_ray.data.sql_rows import SqlRows
from kto_ray.data.table import expressions, named_classes
from kto_ray.data.tally import KEY, TallySource, place, true_in
from kto_ray.data.verdicts import Expression, Reading
from kto_ray.errors import UserError
from kto_ray.people.agreement import reliability

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

LEFT_OUT = "votes are left out: who gave them agrees too seldom with the others (agree_at_least)"
REPLACED = "votes were replaced by a later one of the same person"
NEITHER = "votes are neither yes nor no"
ALPHA = "agreement of votes on an image (Krippendorff's alpha: 1 is perfect, 0 is chance)"


class VotesSource(TallySource):
    """See the module."""

    def __init__(self, settings: VotesData) -> None:
        self.settings = settings
        field = "data.sources (votes)"
        if settings.database:
            rows: Rows = SqlRows(settings, field, absolute(settings.images or str(Path.cwd())))
        else:
            assert settings.path
            rows = FileRows(settings.path, field, absolute(settings.images) if settings.images else None)
        super().__init__("votes", rows)

    @cached_property
    def _columns(self) -> FoundColumns:
        settings, schema = self.settings, self.rows.schema()
        named = {name: getattr(settings, name) for name in ("prompt", "image", "who", "when")}
        if not settings.expression:
            named["verdict"] = settings.verdict
        needed = {"when"} if settings.combine == "latest" else set[str]()
        needed |= {"who"} if settings.agree_at_least else set()
        columns = find_columns(schema, named, self.where, self.field, frozenset({"who", "when"}) - needed)
        if not holds_images(schema.field(columns["image"]).type):
            raise UserError(f"{self.field}: image: {columns['image']!r} holds neither paths, URIs, nor bytes of images")
        return columns

    @cached_property
    def _expressions(self) -> list[Expression | None]:
        texts = {"expression": self.settings.expression, "where": self.settings.where}
        return expressions(self.rows, self.field, texts)

    @property
    def columns(self) -> Mapping[str, str]:
        return self._columns.of

    @property
    def light(self) -> Sequence[str]:
        """Images, too, where they are known by their bytes."""
        schema = self.rows.schema()
        looked_at = [name for each in self._expressions if each for name in each.columns(schema)]
        return list(dict.fromkeys([*self._columns.of.values(), *looked_at]))

    @property
    def heavy(self) -> Sequence[str]:
        return [self._columns["prompt"], self._columns["image"]]

    def votes(self, part: int, first: int, batch: pa.RecordBatch, notes: Notes) -> pa.Table:
        columns, rows = self._columns, range(first, first + batch.num_rows)
        expression, where = self._expressions
        prompts = pa.array(prompts_of(batch.column(columns["prompt"]), notes), pa.string())
        images = known_by(batch.column(columns["image"]), self.rows.folder(self._parts[part]))
        notes.add(NO_IMAGE, images.null_count)
        taken = pc.and_(pc.is_valid(prompts), pc.is_valid(images))
        if expression:
            votes = expression(batch)
        else:
            cells = named_classes(batch.column(columns["verdict"]), self.rows.schema(), columns["verdict"])
            votes, odd = Reading(self.settings.desirable, self.settings.undesirable).read(cells)
            strange = cells.filter(odd).to_pylist()
            notes.add(NOT_UNDERSTOOD, len(strange), map(repr, dict.fromkeys(strange)))
        if where:
            wanted = pc.fill_null(where(batch), False)
            notes.add(FILTERED, batch.num_rows - true_in(wanted))
            taken = pc.and_(taken, wanted)
        notes.add(NEITHER, votes.null_count)
        who, when = columns.get("who"), columns.get("when")
        nothing = pa.nulls(batch.num_rows, pa.string())
        return pa.table(
            {
                "place": place(part, rows, [0] * batch.num_rows),
                "image": images,
                "prompt": prompts,
                "vote": votes,
                "who": pc.cast(batch.column(who), pa.string()) if who else nothing,
                "moment": _times(batch.column(when)) if when else nothing,
            }
        ).filter(taken)

    @cached_property
    def _parts(self) -> Sequence[Part]:
        return self.rows.parts()

    def count(self, votes: "DuckDBPyConnection", notes: Notes) -> pa.Table:
        settings = self.settings
        votes.execute(
            f"""CREATE TABLE said AS
                SELECT {KEY} AS key, place, vote, nullif(trim(who), '') AS who,
                       coalesce(try_cast(moment AS DOUBLE), epoch(try_cast(moment AS TIMESTAMPTZ))) AS time
                FROM votes"""
        )
        self._require_times(votes)
        if settings.one_vote_each:
            votes.execute(
                "CREATE TABLE last AS SELECT * FROM said QUALIFY who IS NULL OR "
                "row_number() OVER (PARTITION BY key, who ORDER BY time DESC NULLS LAST, place DESC) = 1"
            )
            notes.add(REPLACED, _one(votes, "SELECT (SELECT count(*) FROM said) - (SELECT count(*) FROM last)"))
        else:
            votes.execute("CREATE VIEW last AS SELECT * FROM said")
        self._tell_agreement(votes, notes)
        votes.execute("CREATE TABLE out (who VARCHAR)")
        if settings.agree_at_least:
            self._leave_out(votes, notes)
        verdict = {
            "majority": "CASE WHEN yes > no THEN true WHEN yes < no THEN false END",
            "share": f"yes / (yes + no) >= {settings.share!r}",
            "latest": "latest",
        }[settings.combine]
        return votes.sql(
            f"""SELECT place, CASE WHEN yes + no >= {settings.min_votes} THEN {verdict} END AS desirable,
                       CASE WHEN people = 1 THEN someone END AS who, yes, no
                FROM (SELECT key, count(*) FILTER (vote AND counts) AS yes,
                             count(*) FILTER (NOT vote AND counts) AS no,
                             arg_max(vote, (time, place)) FILTER (vote IS NOT NULL AND counts) AS latest,
                             count(DISTINCT who) FILTER (counts) AS people, any_value(who) FILTER (counts) AS someone
                      FROM (SELECT *, (who IS NULL OR who NOT IN (SELECT who FROM out)) AS counts FROM last)
                      GROUP BY key)
                JOIN (SELECT key, min(place) AS place FROM said GROUP BY key) USING (key)
                ORDER BY place"""
        ).to_arrow_table()

    def _require_times(self, votes: "DuckDBPyConnection") -> None:
        if self._columns.get("when"):
            odd = votes.execute(
                "SELECT moment FROM votes WHERE moment IS NOT NULL AND try_cast(moment AS DOUBLE) IS NULL "
                "AND try_cast(moment AS TIMESTAMPTZ) IS NULL LIMIT 1"
            ).fetchall()
            if odd:
                raise UserError(
                    f"{self.field}: when: {odd[0][0]!r} in column {self._columns['when']!r} is no time; give a column "
                    "of times as ISO 8601 (2026-03-01T12:00:00Z) or in seconds since 1970"
                )

    def _tell_agreement(self, votes: "DuckDBPyConnection", notes: Notes) -> None:
        mixes = votes.execute(
            "SELECT yes, no, count(*) FROM (SELECT count(*) FILTER (vote) AS yes, count(*) FILTER (NOT vote) AS no "
            "FROM last GROUP BY key) GROUP BY yes, no"
        ).fetchall()
        alpha = reliability(Counter({("no",) * no + ("yes",) * yes: images for yes, no, images in mixes})).alpha
        if alpha is not None:
            notes.facts[ALPHA] = f"{alpha:.2f}"

    def _leave_out(self, votes: "DuckDBPyConnection", notes: Notes) -> None:
        votes.execute(
            f"""INSERT INTO out
                SELECT who FROM (
                    SELECT who, vote = (others > 0) AS agrees
                    FROM (SELECT *, sum(if(vote, 1, -1)) OVER (PARTITION BY key) - if(vote, 1, -1) AS others
                          FROM last WHERE vote IS NOT NULL)
                    WHERE others <> 0 AND who IS NOT NULL)
                GROUP BY who HAVING count(*) >= {self.settings.agree_on}
                                AND avg(agrees::INT) < {self.settings.agree_at_least!r}"""
        )
        names = [who for (who,) in votes.execute("SELECT who FROM out ORDER BY who").fetchall()]
        notes.add(LEFT_OUT, _one(votes, "SELECT count(*) FROM last WHERE who IN (SELECT who FROM out)"), names)

    def images(self, batch: pa.RecordBatch, rows: pa.Array, items: pa.Array, folder: str) -> Images:
        return Images(batch.column(self._columns["image"]), folder).take(rows)

    def prompts(self, batch: pa.RecordBatch, rows: pa.Array) -> list[str | None]:
        return prompts_of(batch.column(self._columns["prompt"]).take(rows))


def known_by(cells: pa.Array, folder: str) -> pa.Array:
    """What tells images apart: where they lie, or a digest of their bytes; null where there is none."""
    import hashlib

    images = Images(cells, folder)
    if images.files.null_count == len(cells):
        return images.uris
    digests = [file and hashlib.sha256(file).hexdigest() for file in images.files.to_pylist()]
    return pc.coalesce(pa.array(digests, pa.string()), images.uris)


def _times(cells: pa.Array) -> pa.Array:
    """As texts that `count` reads: seconds, or ISO 8601 in UTC."""
    if pa.types.is_temporal(cells.type):
        return pc.cast(pc.divide(pc.cast(pc.cast(cells, pa.timestamp("us")), pa.int64()), 1e6), pa.string())
    words = pc.utf8_trim_whitespace(pc.cast(cells, pa.string()))
    return pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)


def _one(votes: "DuckDBPyConnection", query: str) -> int:
    return int(votes.execute(query).fetchall()[0][0])
