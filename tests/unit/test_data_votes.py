"""Sources in which an image has several rows: pairs, rankings and ratings, and logs of votes, from files and SQL."""

import base64
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.config.data import PairsData, RatingsData, VotesData
from kto_ray.data import formats, notes, pairs, ratings, votes
from kto_ray.data.pairs import PairsSource
from kto_ray.data.ratings import RatingsSource
from kto_ray.data.votes import VotesSource
from kto_ray.errors import UserError
from tests.labelled import Row, counts_of, image_bytes, refusal, rows_of, write_images, write_jsonl


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PART_ROWS", 2)


# -- pairs ------------------------------------------------------------------------------------------------------------

PAIRS = [
    ("a cat", "u1", "u2", 1.0, 0.0, True),
    ("a cat", "u1", "u3", 0.0, 1.0, True),
    ("a cat", "u2", "u3", 0.5, 0.5, True),
    ("a dog", "u4", "u5", 0.5, 0.5, True),
    ("a dog", "u6", "u7", 1.0, 0.0, False),
    ("a dog", "u4", "u1", 0.0, 1.0, True),
    (" ", "u8", "u9", 1.0, 0.0, True),
    ("a dog", "u8", "u9", None, None, True),
]
"""Caption, uids, labels, has_label."""
COLUMNS = ("caption", "image_0_uid", "image_1_uid", "label_0", "label_1", "has_label")


def write_pairs(path: Path, rows: Sequence[tuple[Any, ...]] = PAIRS, drop: Sequence[str] = ()) -> Path:
    table = pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))
    for side in (0, 1):
        jpegs = [f"jpeg of {uid}".encode() for uid in table[f"image_{side}_uid"].to_pylist()]
        table = table.append_column(f"jpg_{side}", pa.array(jpegs))
    pq.write_table(table.drop_columns(list(drop)), path, row_group_size=2)
    return path


def pairs_source(path: Path, **settings: Any) -> PairsSource:
    return PairsSource(PairsData(path=str(path), **settings))


def verdict_of(source: Any) -> dict[tuple[str, bytes], bool | None]:
    return {(row["prompt"], row["image"] or row["uri"].encode()): row["desirable"] for row in rows_of(source)}


def test_an_image_is_desirable_if_it_was_ever_preferred(tmp_path: Path) -> None:
    source = pairs_source(write_pairs(tmp_path / "p.parquet"))
    assert verdict_of(source) == {
        ("a cat", b"jpeg of u1"): True,
        ("a cat", b"jpeg of u2"): False,
        ("a cat", b"jpeg of u3"): True,
        ("a dog", b"jpeg of u4"): False,
        ("a dog", b"jpeg of u5"): None,
        ("a dog", b"jpeg of u1"): True,
    }
    assert counts_of(source) == (3, 2, 1)
    preview = source.preview()
    assert preview.wrong == {pairs.UNDECIDED: 2, notes.NO_PROMPT: 1}
    first = rows_of(source)[0]
    assert first["id"] == "pairs:p.parquet:0:0"
    assert json.loads(first["metadata"]) == {"wins": 1, "ties": 0, "losses": 1}
    # Of an image that repeats, the first place it stands at counts, in whichever part.
    assert "pairs:p.parquet:5:1" in {row["id"] for row in rows_of(source)}


def test_an_image_is_desirable_by_its_share_of_wins(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "p.parquet")
    source = pairs_source(path, rule="share", share=0.4, min_votes=2)
    assert verdict_of(source) == {
        ("a cat", b"jpeg of u1"): True,  # 1 of 2
        ("a cat", b"jpeg of u2"): False,  # a tie of 2
        ("a cat", b"jpeg of u3"): True,
        ("a dog", b"jpeg of u4"): False,
        ("a dog", b"jpeg of u5"): None,  # one pair only
        ("a dog", b"jpeg of u1"): None,
    }
    even = pairs_source(path, rule="share", where="caption = 'a cat'")
    assert verdict_of(even)["a cat", b"jpeg of u1"] is None
    assert even.preview().wrong[notes.FILTERED] == 5


def test_pairs_by_path_and_without_uids(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg", "2.jpg")
    rows = [{"prompt": "p", "image_0": "1.jpg", "image_1": "2.jpg", "label_0": 1, "label_1": 0}] * 2
    source = pairs_source(write_jsonl(tmp_path / "p.jsonl", rows))
    assert [row["desirable"] for row in rows_of(source)] == [True, False] * 2  # each image of a row is one of its own
    assert source.preview().wrong == {}


def test_labels_of_pairs_that_are_no_labels_are_counted(tmp_path: Path) -> None:
    source = pairs_source(write_pairs(tmp_path / "p.parquet", [("p", "u1", "u2", 0.7, 0.3, True), *PAIRS[:1]]))
    assert source.preview().wrong == {pairs.STRANGE: 2, pairs.UNDECIDED: 1}
    assert counts_of(source) == (1, 1, 0)


@pytest.mark.parametrize(
    ("drop", "problem"),
    [(["label_1"], "no column 'label_1'"), (["jpg_0"], "no columns jpg_0 and jpg_1 or"), (["caption"], "prompt: ")],
)
def test_pairs_without_a_column_are_refused(tmp_path: Path, drop: list[str], problem: str) -> None:
    assert problem in refusal(pairs_source(write_pairs(tmp_path / "p.parquet", drop=drop)))


def test_what_a_part_of_a_source_carries_is_its_own(tmp_path: Path) -> None:
    """Otherwise a million images would travel with each part."""
    import pickle

    rows = [(f"p{n}", f"a{n}", f"b{n}", 1.0, 0.0, True) for n in range(100)]
    parts = pairs_source(write_pairs(tmp_path / "p.parquet", rows)).parts()
    assert len(parts) == 50
    assert max(len(pickle.dumps(part)) for part in parts) < 4000


# -- rankings and ratings ---------------------------------------------------------------------------------------------


def ratings_source(path: Path, **settings: Any) -> RatingsSource:
    return RatingsSource(RatingsData(path=str(path), **settings))


RATED = [
    ("p", "1.png", 7),
    ("p", "2.png", 5),
    ("p", "3.png", 5),
    ("p", "4.png", 1),
    ("q", "5.png", 3),
    ("p", "6.png", None),
]


def write_rated(path: Path, column: str = "overall_rating", sign: int = 1) -> Path:
    rows = [{"prompt": p, "image_path": i, column: r and sign * r} for p, i, r in RATED]
    return write_jsonl(path, rows)


@pytest.mark.parametrize(("column", "sign"), [("overall_rating", 1), ("rank", -1)])
def test_the_top_and_the_bottom_of_a_prompt(tmp_path: Path, column: str, sign: int) -> None:
    source = ratings_source(write_rated(tmp_path / "t.jsonl", column, sign), top=0.25, bottom=0.25)
    assert [row["desirable"] for row in rows_of(source)] == [True, None, None, False, None]
    assert json.loads(rows_of(source)[0]["metadata"]) == {"score": sign * 7.0, "rank": 1, "images": 4}
    assert source.preview().wrong == {ratings.NO_SCORE: 1, notes.MISSING: 5}
    reversed_ = ratings_source(tmp_path / "t.jsonl", top=0.25, bottom=0.25, better="low" if sign > 0 else "high")
    assert [row["desirable"] for row in rows_of(reversed_)] == [False, None, None, True, None]


def test_equal_scores_stay_together(tmp_path: Path) -> None:
    source = ratings_source(write_rated(tmp_path / "t.jsonl"), top=0.5, bottom=0.25)
    assert [row["desirable"] for row in rows_of(source)] == [True, True, True, False, None]
    least = ratings_source(tmp_path / "t.jsonl", min_images=5)
    assert counts_of(least) == (0, 0, 5)


def test_a_row_of_several_images_is_compared_in_itself(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "image_path": ["1.jpg", "2.jpg", "3.jpg"], "rank": [2, 1, 3]},
        {"prompt": "p", "image_path": ["4.jpg", "5.jpg"], "rank": [1, 1]},
        {"prompt": "q", "image_path": ["6.jpg"], "rank": [2, 1]},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    source = ratings_source(tmp_path / "test.json")
    found = [(row["id"], Path(row["uri"]).name, row["desirable"]) for row in rows_of(source)]
    assert found == [
        ("ratings:test.json:0:0", "1.jpg", None),
        ("ratings:test.json:0:1", "2.jpg", True),
        ("ratings:test.json:0:2", "3.jpg", False),
        ("ratings:test.json:1:0", "4.jpg", None),
        ("ratings:test.json:1:1", "5.jpg", None),
    ]
    assert source.preview().wrong[ratings.UNEVEN] == 1


def test_two_images_a_row_and_the_one_people_preferred(tmp_path: Path) -> None:
    columns = {"prompt": ["p", "q"], "image": [[b"1", b"2"], [b"3", b"4"]], "human_preference": [[1, 0], [0, 1]]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = ratings_source(tmp_path / "t.parquet")
    assert [(row["image"], row["desirable"]) for row in rows_of(source)] == [
        (b"1", True),
        (b"2", False),
        (b"3", False),
        (b"4", True),
    ]


def test_images_beside_their_ratings_may_be_bytes(tmp_path: Path) -> None:
    columns = {"prompt": ["p"] * 3, "image": [b"1", b"2", b"3"], "rating": [3.0, 2.0, 1.0]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2)
    found = [(row["image"], row["desirable"]) for row in rows_of(ratings_source(tmp_path / "t.parquet"))]
    assert found == [(b"1", True), (b"2", None), (b"3", False)]


# -- votes ------------------------------------------------------------------------------------------------------------

LOG = [
    ("a.png", "cat", "up", "ann", "2026-01-01T00:00:00Z"),
    ("a.png", "cat", "down", "bob", "2026-01-01T01:30:00+01:00"),  # half past midnight
    ("a.png", "cat", "up", "cid", "2026-01-01 00:10:00"),
    ("b.png", "cat", "up", "ann", 1767312000),
    ("b.png", "cat", "down", "ann", 1767312001),
    ("b.png", "dog", "meh", "ann", None),
    ("", "dog", "up", "ann", None),
    ("c.png", "dog", "down", "ann", None),
    ("c.png", "dog", "up", "bob", None),
    ("c.png", "dog", "down", "cid", None),
]


def log_rows(rows: Sequence[tuple[Any, ...]] = LOG) -> list[Row]:
    return [dict(zip(("image_path", "prompt", "vote", "user", "created_at"), row, strict=True)) for row in rows]


def votes_source(path: Path, **settings: Any) -> VotesSource:
    return VotesSource(VotesData(path=str(path), **settings))


def by_image(source: VotesSource) -> dict[str, bool | None]:
    return {f"{row['prompt']} {row['uri'].rpartition('/')[2]}": row["desirable"] for row in rows_of(source)}


def test_several_votes_are_one_verdict(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png")
    path = write_jsonl(tmp_path / "log.jsonl", log_rows())
    majority = votes_source(path)
    assert by_image(majority) == {"cat a.png": True, "cat b.png": False, "dog b.png": None, "dog c.png": False}
    assert counts_of(majority) == (1, 2, 1)
    latest = votes_source(path, combine="latest")
    assert by_image(latest) == {"cat a.png": False, "cat b.png": False, "dog b.png": None, "dog c.png": False}
    share = votes_source(path, combine="share", share=0.7, min_votes=2)
    assert by_image(share) == {"cat a.png": False, "cat b.png": None, "dog b.png": None, "dog c.png": False}
    assert by_image(votes_source(path, one_vote_each=False)) == {
        "cat a.png": True,
        "cat b.png": None,
        "dog b.png": None,
        "dog c.png": False,
    }
    assert majority.preview().wrong == {
        notes.NO_IMAGE: 1,
        notes.NOT_UNDERSTOOD: 1,
        votes.NEITHER: 1,
        votes.REPLACED: 1,
    }
    rows = rows_of(majority)
    assert json.loads(rows[0]["metadata"]) == {"yes": 2, "no": 1}
    assert [row["who"] for row in rows] == [None, "ann", "ann", None]
    assert [row["id"] for row in rows] == [f"votes:log.jsonl:{row}:0" for row in (0, 3, 5, 7)]


def test_who_votes_against_everybody_is_left_out(tmp_path: Path) -> None:
    people = {"ann": "up", "bob": "up", "cid": "up", "troll": "down"}
    rows = [(f"{n}.png", "p", said, who, None) for n in range(12) for who, said in people.items()]
    rows += [("alone.png", "p", "down", "troll", None), ("alone.png", "p", "up", "eve", None)]
    path = write_jsonl(tmp_path / "log.jsonl", log_rows(rows))
    source = votes_source(path, agree_at_least=0.5, agree_on=10)
    preview = source.preview()
    assert preview.wrong[votes.LEFT_OUT] == 13
    assert preview.examples[votes.LEFT_OUT] == ["troll"]
    assert by_image(source)["p alone.png"] is True
    assert json.loads(rows_of(source)[0]["metadata"]) == {"yes": 3, "no": 0}
    assert by_image(votes_source(path))["p alone.png"] is None
    assert votes.LEFT_OUT not in votes_source(path, agree_at_least=0.5, agree_on=14).preview().wrong
    assert preview.facts[votes.ALPHA].startswith("-")  # 3 : 1 everywhere is less than chance


def test_images_of_a_log_may_be_known_by_their_bytes(tmp_path: Path) -> None:
    red, blue = image_bytes("red"), image_bytes("blue")
    columns = {"prompt": ["p"] * 4, "image": [red, blue, red, red], "vote": [1, 0, 0, 1], "user": list("abcd")}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet", row_group_size=2)
    found = [(row["image"], row["desirable"]) for row in rows_of(votes_source(tmp_path / "log.parquet"))]
    assert found == [(red, True), (blue, False)]

    texts = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (red, blue, red, red)]
    rows = [{"prompt": "p", "image": text, "vote": vote} for text, vote in zip(texts, [1, 0, 0, 1], strict=True)]
    path = write_jsonl(tmp_path / "log.jsonl", [*rows, {"prompt": "p", "image": "data:image/png;base64,?", "vote": 1}])
    assert [(row["image"], row["desirable"]) for row in rows_of(votes_source(path))] == found
    assert votes_source(path).preview().wrong[notes.NO_IMAGE] == 1


def database(path: Path) -> str:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE votes (id INTEGER PRIMARY KEY, png BLOB, said TEXT, up INT, who TEXT, at TEXT)")
    rows = [(b"1", "p", 1, "a", "2026-01-01"), (b"1", "p", 0, "a", "2026-01-02"), (b"2", "p", 1, None, None)]
    connection.executemany("INSERT INTO votes (png, said, up, who, at) VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return f"sqlite:///{path}"


QUERY = "SELECT png AS image, said AS prompt, up AS vote, who, at AS time FROM votes ORDER BY id"


def test_votes_are_the_answer_to_a_query(tmp_path: Path) -> None:
    source = VotesSource(VotesData(database=database(tmp_path / "v.db"), query=QUERY))
    found = [(row["id"], row["image"], row["desirable"], row["who"]) for row in rows_of(source)]
    assert found == [("votes:query:0:0", b"1", False, "a"), ("votes:query:2:0", b"2", True, None)]
    assert counts_of(source) == (1, 1, 0)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("SELECT nope FROM votes", "does not answer: no such column: nope"),
        ("SELECT * FROM votes WHERE up > 7", "it has no rows"),
        ("CREATE TABLE x (y INT)", "has to be a SELECT"),
        ("SELECT png, up FROM votes", "prompt: its column"),
    ],
)
def test_a_query_without_an_answer_is_refused(tmp_path: Path, query: str, problem: str) -> None:
    assert problem in refusal(VotesSource(VotesData(database=database(tmp_path / "v.db"), query=query)))


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOTES_PASSWORD", "s3cret")
    for url in ("nodb://u:$VOTES_PASSWORD@127.0.0.1/d", "nodb://u:s3cret@127.0.0.1/d"):
        text = refusal(VotesSource(VotesData(database=url, query="SELECT 1")))
        assert "cannot be opened" in text
        assert "s3cret" not in text


def test_times_must_be_times(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", log_rows([("a.png", "p", "up", "ann", "yesterday")]))
    with pytest.raises(UserError, match="'yesterday' in column 'created_at' is no time"):
        votes_source(path).preview()
    no_times = write_jsonl(tmp_path / "n.jsonl", [{"image": "a", "prompt": "p", "vote": 1}])
    with pytest.raises(UserError, match="when: its column"):
        votes_source(no_times, combine="latest").preview()
    with pytest.raises(UserError, match="who: its column"):
        votes_source(no_times, agree_at_least=0.5).preview()


def test_votes_by_an_expression_and_only_some(tmp_path: Path) -> None:
    rows = [{"image": f"{n % 2}.png", "prompt": "p", "stars": n, "app": "x" if n else "y"} for n in range(6)]
    source = votes_source(write_jsonl(tmp_path / "l.jsonl", rows), expression="stars >= 3", where="app = 'x'")
    assert by_image(source) == {"p 1.png": True, "p 0.png": None}
