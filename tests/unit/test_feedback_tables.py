"""An application's tables of votes: which columns are what, that only new rows are read, each once, and what is odd."""

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from kto_ray.config.feedback import Feedback
from kto_ray.errors import UserError
from kto_ray.feedback import file_votes, sql_votes
from kto_ray.feedback.file_votes import FileVotes
from kto_ray.feedback.sql_votes import SqlVotes
from kto_ray.feedback.understanding import VoteTable, image_id, moment_of
from kto_ray.people.votes import Vote
from tests.labelled import write_jsonl

Rows = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_votes, "AT_ONCE", 2)
    monkeypatch.setattr(file_votes, "AT_ONCE", 2)


class Reader:
    """Reads a table as the labeler does, from where the one before ended."""

    def __init__(self, table: VoteTable) -> None:
        self.table = table
        self.position: str | None = None
        self.odd: list[str] = []

    def __call__(self) -> list[Vote]:
        found = []
        for new in self.table.read(self.position):
            found += new.votes
            self.odd += new.odd.examples.get("odd", [])
            self.position = new.position
        return found

    def keys(self) -> list[str]:
        return [vote.key for vote in self()]


# -- a database


class Thumbs:
    """A table in SQLite, as an application has it."""

    def __init__(self, folder: Path) -> None:
        self.database = sqlite3.connect(folder / "app.sqlite")
        self.url = f"sqlite:///{folder}/app.sqlite"
        self.do("CREATE TABLE thumbs (id INTEGER PRIMARY KEY, image_id, vote, user_id, created_at)")

    def do(self, statement: str, rows: Rows | None = None) -> None:
        with self.database:
            self.database.executemany(statement, rows) if rows else self.database.execute(statement)

    def add(self, *rows: tuple[Any, ...]) -> None:
        self.do("INSERT INTO thumbs VALUES (?, ?, ?, ?, ?)", list(rows))

    def reader(self, **settings: Any) -> Reader:
        return Reader(SqlVotes(Feedback.model_validate({"database": self.url, "table": "thumbs"} | settings)))


@pytest.fixture
def thumbs(tmp_path: Path) -> Iterator[Thumbs]:
    thumbs = Thumbs(tmp_path)
    yield thumbs
    thumbs.database.close()


def test_rows_of_a_database_become_votes(thumbs: Thumbs) -> None:
    thumbs.add(
        (1, "a", "up", "ann", "2026-03-01T12:00:00Z"),
        (2, "a.png", "down", "bob", "2026-03-01 12:00:01"),
        (3, "https://cdn.example.org/images/b.png?size=2", 1, None, 1772366402.5),
        (4, "b", None, "cai", None),
    )
    reader = thumbs.reader()
    assert reader.table.check().of == {
        "id": "id",
        "image": "image_id",
        "verdict": "vote",
        "who": "user_id",
        "when": "created_at",
    }
    assert reader() == [
        Vote("table:1", "a", "desirable", "ann", 1772366400.0),
        Vote("table:2", "a", "undesirable", "bob", 1772366401.0),
        Vote("table:3", "b", "desirable", None, 1772366402.5),
        Vote("table:4", "b", "none", "cai", None),
    ]
    assert reader.odd == []


def test_only_new_rows_are_given_and_each_once(thumbs: Thumbs) -> None:
    reader = thumbs.reader()
    assert reader() == []
    thumbs.add(*((n, "a", 1, f"u{n}", None) for n in (1, 2, 3, 6, 7)))
    assert len(reader()) == 5
    assert reader() == []
    thumbs.add((8, "a", 0, "bob", None))
    assert reader.keys() == ["table:8"]
    thumbs.add((5, "a", 0, "late", None), (9, "a", 0, "dee", None))  # 5: of a longer transaction
    assert reader.keys() == ["table:5", "table:9"]
    assert reader() == []


def test_what_is_long_read_is_not_looked_through_again(thumbs: Thumbs, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("kto_ray.feedback.sql_votes.time.monotonic", lambda: now[0])
    reader = thumbs.reader(look_back_s=60)
    thumbs.add(*((n, "a", 1, f"u{n}", None) for n in range(10, 15)))
    assert len(reader()) == 5
    assert json.loads(reader.position or "")["at"] is None  # a new process would look from the beginning
    now[0] += 61
    thumbs.add((15, "a", 1, "x", None))
    assert reader.keys() == ["table:15"]
    assert json.loads(reader.position or "")["at"] == 14
    thumbs.add((3, "a", 1, "much too late", None))
    assert reader() == []
    again = thumbs.reader(look_back_s=60)
    again.position = reader.position
    assert again.keys() == ["table:14", "table:15"]  # the labeler knows them
    other = thumbs.reader(query="SELECT * FROM thumbs WHERE id < 12", table=None)
    other.position = reader.position  # of another source: from the beginning
    assert other.keys() == ["table:3", "table:10", "table:11"]


def test_a_row_that_was_changed_is_a_new_vote_by_its_time(thumbs: Thumbs) -> None:
    thumbs.add((1, "a", "up", "ann", 10.0), (2, "a", "up", "bob", 11.0))
    reader = thumbs.reader(cursor="created_at")
    assert len(reader()) == 2
    thumbs.do("UPDATE thumbs SET vote = 'down', created_at = 12.0 WHERE id = 1")
    assert reader() == [Vote("table:1@12.0", "a", "undesirable", "ann", 12.0)]


def test_votes_that_cannot_be_understood_are_told(thumbs: Thumbs) -> None:
    thumbs.add((1, "a", "meh", "ann", None), (2, None, "up", "ann", None), (3, "a", "up", "ann", "yesterday"))
    thumbs.add((4, "a", "up", "ann", None))
    reader = thumbs.reader()
    assert reader.keys() == ["table:4"]
    assert reader.odd == ["vote 'meh'", "a row without an image", "time 'yesterday'"]
    named = thumbs.reader(desirable=["meh"], undesirable=["up"])
    assert [vote.verdict for vote in named()] == ["desirable", "undesirable"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "likes"}, "label.feedback.table: likes of sqlite:///"),
        ({"table": None, "query": "SELEC 1"}, "label.feedback.query: the query of sqlite:///"),
        ({"image": "picture"}, "label.feedback: image: thumbs of sqlite:///"),
        ({"cursor": "seq"}, "label.feedback.cursor: thumbs of sqlite:///"),
        (
            {"table": None, "query": "SELECT id, vote FROM thumbs"},
            "has none of the usual names; name it: {image: COLUMN}",
        ),
        ({"table": None, "query": "SELECT image_id, vote FROM thumbs"}, "name it: {id: COLUMN}"),
        ({"database": "sqlite:////nowhere/app.sqlite"}, "does not answer: unable to open database file"),
        ({"database": "postgresql+nothing://u:secret@h/n"}, "u:***@h/n cannot be opened"),
        ({"cursor": "vote", "table": None, "query": "SELECT *, x'00' AS b FROM thumbs"}, None),
        ({"cursor": "b", "table": None, "query": "SELECT *, x'00' AS b FROM thumbs"}, "holds bytess; give one"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(thumbs: Thumbs, settings: Any, message: str | None) -> None:
    thumbs.add((1, "a", "up", "ann", None))
    table = SqlVotes(Feedback(**({"database": thumbs.url, "table": "thumbs"} | settings)))
    if message is None:
        table.check()
        return
    with pytest.raises(UserError) as caught:
        table.check()
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


# -- files


def parquet(path: Path, *rows: tuple[Any, ...]) -> None:
    columns = list(zip(*rows, strict=True))
    pq.write_table(pa.table({"image": columns[0], "liked": columns[1], "user": columns[2]}), path, row_group_size=3)


def test_files_that_come_and_grow_are_read_where_they_ended(tmp_path: Path) -> None:
    reader = Reader(FileVotes(Feedback(path=str(tmp_path))))
    assert reader.table.check().of == {}
    assert reader() == []
    parquet(tmp_path / "1.parquet", *(("a", True, f"u{n}") for n in range(5)))
    assert reader.keys() == [f"file:1.parquet:{n}" for n in range(5)]
    assert reader() == []
    parquet(tmp_path / "1.parquet", *(("a", True, f"u{n}") for n in range(5)), ("b", False, "new"))
    parquet(tmp_path / "2.parquet", ("c", None, "ann"))
    assert reader() == [
        Vote("file:1.parquet:5", "b", "undesirable", "new"),
        Vote("file:2.parquet:0", "c", "none", "ann"),
    ]
    again = Reader(FileVotes(Feedback(path=f"{tmp_path}/*.parquet")))
    again.position = reader.position
    assert again() == []
    again.position = json.dumps({"source": "0123456789abcdef", "at": 14})  # the votes came from a database before
    assert len(again()) == 7


def test_json_lines_are_read_to_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_votes, "BYTES", 120)
    path = write_jsonl(tmp_path / "v.jsonl", [{"image": "a", "vote": 1, "user": f"u{n}"} for n in range(7)])
    reader = Reader(FileVotes(Feedback(path=str(path))))
    assert len(reader()) == 7
    with path.open("a") as file:
        file.write('{"image": "b", "vote": "down", "id": 77, "at": 3}\n\n[1]\n{"image": "c", "vo')
    assert [(vote.key, vote.verdict) for vote in reader()] == [("table:77", "undesirable")]
    assert reader.odd == ["v.jsonl row 8: '[1]'"]
    with path.open("a") as file:
        file.write('te": "up"}\nnonsense\n')
    assert [(vote.key, vote.image) for vote in reader()] == [("file:v.jsonl:9", "c")]
    assert reader.odd[1:] == ["v.jsonl row 10: 'nonsense'"]
    with path.open("a") as file:
        file.write("x" * 200)
    with pytest.raises(UserError, match="a line of more than 120 bytes"):
        reader()


def test_a_file_that_cannot_be_read_holds_no_other_up(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").write_bytes(b"PAR1 half of it")
    parquet(tmp_path / "2.parquet", ("a", True, "ann"))
    reader = Reader(FileVotes(Feedback(path=str(tmp_path))))
    first, second = islice(reader.table.read(None), 2)
    assert [vote.image for vote in first.votes + second.votes] == ["a"]
    with pytest.raises(UserError, match=r"1\.parquet cannot be read"):
        reader()
    assert reader.position
    parquet(tmp_path / "1.parquet", ("b", True, "ann"))
    assert [vote.image for vote in reader()] == ["b"]
    (tmp_path / "1.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="got shorter"):
        reader()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/none", "label.feedback.path: there is nothing at"),
        ("{folder}/none/*.parquet", "label.feedback.path: there is nothing at"),
        ("{folder}/v.csv", "v.csv is neither Parquet nor JSON lines"),
        ("{folder}", "label.feedback: verdict: its column in"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "v.csv").write_text("image,vote\n")
    pq.write_table(pa.table({"image": ["a"], "opinion": ["fine"]}), tmp_path / "v.parquet")
    with pytest.raises(UserError) as caught:
        FileVotes(Feedback(path=path.format(folder=tmp_path))).check()
    assert message in str(caught.value)


def test_cells() -> None:
    names = ["a", " a ", "a.png", "x/y/a.JPG", "C:\\pictures\\a.jpeg", "s3://bucket/a.png?x=1", "", None, 7]
    assert [image_id(name) for name in names] == ["a"] * 6 + [None, None, "7"]
    times = [
        None,
        "",
        "1.5",
        2,
        True,
        "noon",
        "1970-01-01T00:00:03Z",
        datetime(1970, 1, 1, 1, tzinfo=UTC),
        float("nan"),
    ]
    assert [moment_of(cell) for cell in times] == [None, None, 1.5, 2.0, None, None, 3.0, 3600.0, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "v", "database": "sqlite://", "table": "t"}, "give path, or database"),
        ({"database": "sqlite://"}, "database needs table or query"),
        ({"table": "t"}, "database needs table or query"),
        ({"database": "sqlite://", "table": "t", "query": "SELECT 1"}, "database needs table or query"),
        ({"path": "v", "cursor": "id"}, "cursor is a column of a database's table"),
        ({"desirable": ["y"]}, "give the values of both"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Feedback(**settings)
