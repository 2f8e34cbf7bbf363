"""Tables of labelled images: files of every format, columns that are found or named, verdicts, and what is odd."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.config.data import TableData
from kto_ray.data import formats, notes
from kto_ray.data.files import resolve
from kto_ray.data.table import TableSource
from kto_ray.data.verdicts import Expression, Reading
from kto_ray.errors import UserError
from tests.labelled import counts_of, image_bytes, refusal, rows_of, write_images, write_jsonl

ROWS: list[dict[str, Any]] = [
    {"file_name": "a.png", "caption": 'a "red" cat, asleep', "label": 1},
    {"file_name": "more/b.png", "caption": "two\nlines", "label": 0},
    {"file_name": "c.png", "caption": "ein Kätzchen", "label": 0.5},
]


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PART_ROWS", 2)


def table(path: Path, **settings: Any) -> TableSource:
    return TableSource(TableData(path=str(path), **settings))


def written(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    """The rows in the format of the name's ending."""
    path, text, name = folder / name, io.StringIO(newline=""), name.lower()
    if ".csv" in name or ".tsv" in name:
        writer = csv.DictWriter(text, list(rows[0]), dialect="excel-tab" if ".tsv" in name else "excel")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith("jsonl"):
        write_jsonl(path, rows)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        file_or_stream = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        whole = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, file_or_stream(sink, whole.schema) as writer_:
            writer_.write_table(whole)
    return path


@pytest.mark.parametrize(
    "name", ["t.csv", "T.CSV", "t.csv.gz", "t.tsv", "t.jsonl", "t.json", "t.parquet", "file.arrow", "stream.arrow"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "a.png", "more/b.png", "c.png")
    source = table(written(tmp_path, name))
    rows = rows_of(source)
    assert [row["prompt"].replace("\r", "") for row in rows] == [row["caption"] for row in ROWS]
    assert [row["uri"] for row in rows] == [str(tmp_path / row["file_name"]) for row in ROWS]
    assert [row["desirable"] for row in rows] == [True, False, None]
    assert [row["id"] for row in rows] == [f"table:{name}:{number}" for number in range(3)]
    preview = source.preview()
    assert preview.columns == {"prompt": "caption", "image": "file_name", "verdict": "label"}
    assert preview.wrong == {}


def test_a_folder_and_a_pattern_join_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("2.parquet", "1.parquet", "sub/3.parquet", ".hidden.parquet"):
        written(tmp_path / "data", name)
    whole = [row["id"] for row in rows_of(table(tmp_path / "data"))]
    assert whole == [f"table:{name}.parquet:{row}" for name in ("1", "2", "sub/3") for row in range(3)]
    assert len(rows_of(table(tmp_path / "data" / "*.parquet"))) == 6
    assert len(rows_of(table(tmp_path / "data" / "**" / "*.parquet"))) == 9
    assert len(rows_of(table(tmp_path / "data" / "{1..2}.parquet"))) == 6


def test_windows_wrote_it(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "more/b.png")
    lines = (
        "\ufeffcaption,file_name,label",
        '"a cat,',
        'asleep",a.png,yes',
        "",
        "a dog,more\\b.png,NO",
        "x,C:\\x\\c.png,1",
        "",
    )
    path = tmp_path / "t.csv"
    path.write_bytes("\r\n".join(lines).encode())
    source = table(path)
    rows, preview = rows_of(source), source.preview()
    assert rows[0]["prompt"] == "a cat,\r\nasleep"
    assert rows[1]["uri"] == str(tmp_path / "more" / "b.png")
    assert preview.wrong == {notes.MISSING: 1}
    assert preview.examples[notes.MISSING] == [str(tmp_path / "C:/x/c.png")]


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", "a.png", "more/b.png", "c.png")
    source = table(written(tmp_path, "t.csv"), images=str(tmp_path / "pictures"))
    assert source.preview().wrong == {}
    assert table(written(tmp_path, "t.csv")).preview().wrong == {notes.MISSING: 3}


@pytest.mark.parametrize(
    ("base", "reference", "where"),
    [
        ("/data", "a/b.png", "/data/a/b.png"),
        ("/data", "../b.png", "/b.png"),
        ("/data", "/x/b.png", "/x/b.png"),
        ("/data", "a\\b.png", "/data/a/b.png"),
        ("/data", "https://x/y.png", "https://x/y.png"),
        ("/data", "file:///x/y.png", "/x/y.png"),
        ("s3://bucket/data", "a/b.png", "s3://bucket/data/a/b.png"),
        ("s3://bucket/data?region=eu", "b.png", "s3://bucket/data/b.png?region=eu"),
    ],
)
def test_where_a_reference_leads(base: str, reference: str, where: str) -> None:
    assert resolve(base, reference) == where


def test_images_in_the_rows_are_given_as_they_are(tmp_path: Path) -> None:
    plain = pa.table({"prompt": ["a", "b"], "image": [image_bytes("red"), b""], "label": [True, False]})
    pq.write_table(plain, tmp_path / "bytes.parquet")
    (row,) = rows_of(table(tmp_path / "bytes.parquet"))
    assert (row["image"], row["uri"]) == (image_bytes("red"), None)

    hugging_face = [{"bytes": image_bytes("blue"), "path": "x.png"}, {"bytes": None, "path": "y.png"}, None]
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "image": hugging_face, "label": [1, 0, 1]}), tmp_path / "t.parquet"
    )
    first, second = rows_of(table(tmp_path / "t.parquet"))
    assert (first["image"], first["uri"]) == (image_bytes("blue"), None)
    assert (second["image"], second["uri"]) == (None, str(tmp_path / "y.png"))


def test_unpaired_preferences_as_trl_has_them(tmp_path: Path) -> None:
    talk = [[{"role": "user", "content": "a cat"}], [{"role": "user", "content": "a dog"}]]
    columns = {"prompt": talk, "image": [{"bytes": image_bytes(), "path": None}] * 2, "label": [True, False]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert [(row["prompt"], row["desirable"]) for row in rows_of(table(tmp_path / "t.parquet"))] == [
        ("a cat", True),
        ("a dog", False),
    ]


def test_a_large_row_group_is_read_in_small_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BYTES", 2**20)
    large = pa.table({"prompt": ["p"] * 40, "image": [bytes([n]) * 2**17 for n in range(40)], "label": [1] * 40})
    pq.write_table(large, tmp_path / "t.parquet", row_group_size=40, compression="none", use_dictionary=False)
    tables = list(table(tmp_path / "t.parquet").tables())
    assert sum(each.num_rows for each in tables) == 40
    assert max(each.nbytes for each in tables) < 2**21 < large.nbytes
    assert [row for each in tables for row in each["image"].to_pylist()] == large["image"].to_pylist()


def test_numbers_that_change_their_kind_are_verdicts_all_the_same(tmp_path: Path) -> None:
    labels = [1, 0.5, "yes", False, "0.0", None, "1.0"]
    path = write_jsonl(
        tmp_path / "t.jsonl", [{"prompt": "p", "image": f"{n}.png", "label": label} for n, label in enumerate(labels)]
    )
    assert [row["desirable"] for row in rows_of(table(path))] == [True, None, True, False, False, None, True]


@pytest.mark.parametrize(
    ("cells", "verdicts", "odd"),
    [
        (["Yes ", "no", "👍", "👎", "Liked", "rejected", "", "tie", None], [1, 0, 1, 0, 1, 0, None, None, None], 0),
        ([1, 0, -1, None, 5], [1, 0, 0, None, None], 1),
        ([1.0, 0.5, 0.0], [1, None, 0], 0),
        ([True, None, False], [1, None, 0], 0),
        (["perhaps", "1"], [None, 1], 1),
    ],
)
def test_usual_words_for_yes_and_no(cells: list[Any], verdicts: list[Any], odd: int) -> None:
    found, strange = Reading().read(pa.array(cells))
    assert found.to_pylist() == [None if verdict is None else bool(verdict) for verdict in verdicts]
    assert sum(strange.to_pylist()) == odd


def test_values_of_verdicts_may_be_named(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "t.jsonl",
        [{"prompt": "p", "image": f"{n}.png", "split": value} for n, value in enumerate(["Win", "some", "lose", 1])],
    )
    source = table(path, verdict="split", desirable=["win", 1], undesirable=["lose"])
    assert [row["desirable"] for row in rows_of(source)] == [True, None, False, True]
    assert counts_of(source) == (2, 1, 1)


RATED = [
    {"prompt": f"p{n}", "image": f"{n}.png", "rating": rating, "split": split, "user": user}
    for n, (rating, split, user) in enumerate(
        [("5", "train", "ann"), ("3.5", "train", ""), ("", "train", "bob"), ("4", "test", "ann")]
    )
]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_verdict_by_an_expression_over_numbers_in_text(tmp_path: Path, name: str) -> None:
    source = table(written(tmp_path, name, RATED), expression="rating >= 4", where="split = 'train'", keep=["rating"])
    rows = rows_of(source)
    assert [row["desirable"] for row in rows] == [True, False, None]
    assert [row["who"] for row in rows] == ["ann", None, "bob"]
    assert json.loads(rows[0]["metadata"]) == {"rating": "5"}
    assert source.preview().wrong[notes.FILTERED] == 1
    assert [row["id"] for row in rows] == [f"table:{name}:{n}" for n in (0, 1, 2)]


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("ratin > 3", "'rating'"),
        ("rating >", "syntax error"),
        ("rating; drop table x", "more than one statement"),
        ("rating, split", "single expression"),
        ("split > 4", "write try_cast"),
        ("(SELECT count(*) FROM read_text('/etc/passwd')) > 0", "disabled"),
        ("(SELECT count(*) FROM read_csv('http://127.0.0.1/x')) > 0", ""),
    ],
)
def test_an_expression_that_is_none_is_refused(tmp_path: Path, expression: str, problem: str) -> None:
    text = refusal(table(written(tmp_path, "t.csv", RATED), expression=expression))
    assert text.startswith("data.sources (table): expression: ")
    assert problem in text


def test_an_expression_looks_at_no_more_columns_than_it_names() -> None:
    schema = pa.schema([("a", pa.float64()), ("b", pa.string()), ("image", pa.binary())])
    assert Expression("a > 1 and b is not null", "f").columns(schema) == ["a", "b"]


def test_all_is_to_be_scored(tmp_path: Path) -> None:
    assert counts_of(table(written(tmp_path, "t.csv"), verdict="none")) == (0, 0, 3)


@pytest.mark.parametrize(
    ("header", "settings", "problem"),
    [
        ("prompt,caption,image,label", {}, "prompt: its column in {path} could be any of 'prompt', 'caption'"),
        (
            "words,image,label",
            {},
            "usual names; name it: {prompt: COLUMN}; there are: 'words' (string), 'image' (string)",
        ),
        ("prompt,image,label", {"verdict": "lable"}, "verdict: {path} has no column 'lable'"),
        ("prompt,image", {}, "verdict: its column in {path} has none of the usual names"),
        ("prompt,image,label", {"keep": ["who"]}, "no column 'who'"),
        ("prompt,image,label", {}, "or give an expression: 'label >= 4'"),
    ],
)
def test_columns_that_cannot_be_found_are_listed(
    tmp_path: Path, header: str, settings: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n{','.join('7' for _ in header.split(','))}\n")
    with pytest.raises(UserError) as caught:
        table(path, **settings).preview()
    assert problem.replace("{path}", str(path)) in str(caught.value)


def test_zero_and_minus_one_cannot_both_mean_no(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "image": f"{n}.png", "vote": n} for n in (1, 0, -1)]
    with pytest.raises(UserError, match="both 0 and -1"):
        table(write_jsonl(tmp_path / "t.jsonl", rows)).preview()
    named = table(tmp_path / "t.jsonl", desirable=[1], undesirable=[-1])
    assert counts_of(named) == (1, 1, 1)


def test_what_is_odd_is_counted_and_named(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    rows = [
        {"prompt": "p", "image": "a.png", "label": 1},
        {"prompt": "p", "image": "a.png", "label": 0},
        {"prompt": "p", "image": "b.png", "label": 1},
        {"prompt": "p", "image": "b.png", "label": 1},
        {"prompt": "  ", "image": "a.png", "label": 1},
        {"prompt": None, "image": "a.png", "label": 1},
        {"prompt": ["x"], "image": "a.png", "label": 1},
        {"prompt": "p", "image": "", "label": 1},
        {"prompt": "p", "image": "gone.png", "label": 1},
        {"prompt": "[p] and {q}", "image": "b.png", "label": "perhaps"},
    ]
    source = table(write_jsonl(tmp_path / "t.jsonl", rows))
    assert counts_of(source) == (4, 1, 1)
    preview = source.preview()
    assert preview.wrong == {
        notes.BOTH: 1,
        notes.REPEATED: 1,
        notes.NO_PROMPT: 3,
        notes.NO_IMAGE: 1,
        notes.MISSING: 1,
        notes.NOT_UNDERSTOOD: 1,
    }
    assert preview.examples[notes.MISSING] == [str(tmp_path / "gone.png")]
    assert preview.examples[notes.NOT_UNDERSTOOD] == ["'perhaps'"]
    assert preview.examples[notes.NO_IMAGE] == ["table:t.jsonl:7"]


def test_ids_of_a_column_must_be_unique(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "image": f"{n}.png", "label": 1, "key": key} for n, key in enumerate(["x", "y", "x"])]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match=r"id: 'x' stands in column 'key' more than once"):
        table(path, id="key").preview()
    assert [row["id"] for row in rows_of(table(path, id="image"))] == ["table:0.png", "table:1.png", "table:2.png"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.csv", b"", "is empty"),
        ("t.jsonl", b"\n", "is empty"),
        ("t.json", b"[]", "is empty"),
        ("t.csv", "prompt,image,label\nKätzchen,a,1\n".encode("latin-1"), "save it as UTF-8"),
        ("t.csv", "prompt,image,label\n".encode("utf-16"), "save it as UTF-8"),
        ("t.csv", b"prompt,image,label\na,b\n", "line 2 has not the 3 columns of the header, but 2"),
        ("t.csv", b'prompt,image,label\na,b,1\n"c,d,1\n', "begins in line 3 cannot be read"),
        ("t.csv", b"prompt,prompt,label\n", "not all different"),
        ("t.jsonl", b'{"prompt": "a", "image": "b", "label": 1}\n{"prom', "line 2 is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1 is no object"),
        ("t.json", b'[{"prompt": "a", "image": "b", "label": 1},', "item 2 is not JSON"),
        ("t.parquet", b"PAR1", "cannot be read"),
        ("t.arrow", b"ARROW1junk", "cannot be read"),
        ("t.csv.gz", b"junk", "cannot be read"),
        ("t.xlsx", b"junk", "says nothing of what is in it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = refusal(table(path))
    assert str(path) in text
    assert problem in text


def test_nothing_there_and_several_formats_are_refused(tmp_path: Path) -> None:
    assert "there is nothing at" in refusal(table(tmp_path / "nowhere.csv"))
    assert "no files of the right kind" in refusal(table(tmp_path))
    written(tmp_path, "a.csv")
    written(tmp_path, "b.jsonl")
    assert "several formats in it (a.csv, b.jsonl)" in refusal(table(tmp_path))


def test_another_file_without_the_columns_of_the_first_is_named(tmp_path: Path) -> None:
    written(tmp_path, "a.parquet")
    written(tmp_path, "b.parquet", [{"caption": "p", "file_name": "x.png"}])
    assert "b.parquet has no column 'label'" in refusal(table(tmp_path / "*.parquet"))


def test_a_json_list_is_read_item_by_item(tmp_path: Path) -> None:
    """More than what is read ahead, with an item that is longer than that."""
    rows = [{"prompt": "x" * (2**21 if n == 3 else 2**10), "image": f"{n}.png", "label": n % 2} for n in range(1500)]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    assert [row["uri"].rpartition("/")[2] for row in rows_of(table(path))] == [row["image"] for row in rows]
