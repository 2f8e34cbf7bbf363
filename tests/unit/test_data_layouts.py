"""Labelled images in layouts of their own: the paper's CSV, folders, imagefolder, WebDataset, Hugging Face."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kto_ray.config.data import (
    FoldersData,
    HuggingFaceData,
    ImageFolderData,
    PaperData,
    WebDatasetData,
)
from kto_ray.data import formats, notes
from kto_ray.data.folders import FoldersSource
from kto_ray.data.hugging_face import HuggingFaceSource
from kto_ray.data.imagefolder import ImageFolderSource
from kto_ray.data.paper import PaperSource
from kto_ray.data.webdataset import WebDatasetSource
from kto_ray.errors import UserError
from tests.dataset_hub import dataset_hub
from tests.labelled import counts_of, image_bytes, refusal, rows_of, write_images, write_jsonl

# -- the paper's CSV --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["file_name,caption,split", "file_path,caption,label", "split,caption,file_name"])
def test_the_papers_csv_in_both_spellings_with_both_choices(tmp_path: Path, header: str) -> None:
    write_images(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    columns = header.split(",")
    lines = [header]
    for number, split in enumerate(["exclusive_win", "intersections", "exclusive_lose"], start=1):
        image, caption = f"{number}.jpg", '"a cat, ""red"""'
        by = {"caption": caption, "split": split, "label": split, "file_name": image, "file_path": image}
        lines.append(",".join(by[column] for column in columns))
    path = tmp_path / "train.csv"
    path.write_text("\n".join(lines))
    both, win = (PaperSource(PaperData(path=str(path), choice=choice)) for choice in ("win_and_intersections", "win"))
    assert [row["desirable"] for row in rows_of(both)] == [True, True, False]
    assert [row["desirable"] for row in rows_of(win)] == [True, None, False]
    assert counts_of(both) == (2, 1, 0)
    assert both.preview().wrong == {}
    assert rows_of(both)[0] == {
        "id": "paper:train.csv:0",
        "uri": str(tmp_path / "1.jpg"),
        "image": None,
        "prompt": 'a cat, "red"',
        "desirable": True,
        "who": None,
        "metadata": None,
    }


def test_another_csv_is_not_the_papers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("file_name,caption,label\na,b,exclusive_win\n")
    assert "neither the columns file_name, caption, split nor file_path, caption, label" in refusal(
        PaperSource(PaperData(path=str(path)))
    )
    path.write_text("file_name,caption,split\na,b,train\n")
    with pytest.raises(UserError, match="none of the values exclusive_win, intersections, exclusive_lose"):
        PaperSource(PaperData(path=str(path))).preview()


# -- liked/ and disliked/ ---------------------------------------------------------------------------------------------


def folders(path: Path, **settings: str) -> FoldersSource:
    return FoldersSource(FoldersData(path=str(path), **settings))


def test_folders_of_liked_and_disliked_images_with_their_captions(tmp_path: Path) -> None:
    write_images(tmp_path, "Liked/1.png", "Liked/more/2.JPEG", "disliked/3.webp", "disliked/4.png", "disliked/5.png")
    (tmp_path / "Liked" / "1.txt").write_text("\ufeffa cat\nasleep\n", encoding="utf-8")
    (tmp_path / "Liked" / "more" / "2.caption").write_text("a dog")
    (tmp_path / "disliked" / "3.txt").write_text("a bird\r\n")
    (tmp_path / "disliked" / "4.txt").write_text(" \n")
    source = folders(tmp_path)
    assert [(row["id"], row["prompt"], row["desirable"]) for row in rows_of(source)] == [
        ("folders:Liked/1.png", "a cat\nasleep", True),
        ("folders:Liked/more/2.JPEG", "a dog", True),
        ("folders:disliked/3.webp", "a bird", False),
    ]
    assert counts_of(source) == (2, 1, 0)
    assert source.preview().wrong == {notes.NO_PROMPT: 2}
    assert counts_of(folders(tmp_path, prompt="a picture")) == (2, 3, 0)


@pytest.mark.parametrize(
    ("names", "settings", "problem"),
    [
        (["liked/1.png", "other/1.png"], {}, "disliked: {path} has no folder disliked, dislike"),
        (["liked/1.png", "good/1.png", "bad/1.png"], {}, "liked: {path} has both good and liked"),
        (["liked/1.png", "bad/1.png"], {"liked": "fine"}, "has no folder fine; it has: bad, liked; name one"),
        (["liked/1.png", "bad/1.md"], {}, "no files of the right kind"),
    ],
)
def test_folders_that_cannot_be_told_are_refused(
    tmp_path: Path, names: list[str], settings: dict[str, str], problem: str
) -> None:
    write_images(tmp_path, *names)
    assert problem.replace("{path}", str(tmp_path)) in refusal(folders(tmp_path, **settings))


# -- imagefolder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_imagefolder_metadata_in_every_format_and_folder(tmp_path: Path, ending: str) -> None:
    for split in ("test", "train"):
        write_images(tmp_path / split, "1.png", "more/2.png")
        rows = [{"file_name": "1.png", "text": "a", "label": 1}, {"file_name": "more/2.png", "text": "b", "label": 0}]
        path = tmp_path / split / f"metadata.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif ending == "jsonl":
            write_jsonl(path, rows)
        else:
            path.write_text("file_name,text,label\n1.png,a,1\nmore/2.png,b,0\n")
    (tmp_path / "train" / f"old_metadata.{ending}").write_text("no metadata of this")
    source = ImageFolderSource(ImageFolderData(path=str(tmp_path)))
    uris = [str(tmp_path / split / name) for split in ("test", "train") for name in ("1.png", "more/2.png")]
    assert [row["uri"] for row in rows_of(source)] == uris
    assert counts_of(source) == (2, 2, 0)
    assert source.preview().wrong == {}
    (tmp_path / "metadata.txt").touch()
    (tmp_path / ("metadata.csv" if ending != "csv" else "metadata.jsonl")).write_text("{}")
    assert "metadata in several formats" in refusal(ImageFolderSource(ImageFolderData(path=str(tmp_path))))


def test_an_imagefolder_needs_metadata(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    assert "metadata.csv" in refusal(ImageFolderSource(ImageFolderData(path=str(tmp_path))))


# -- WebDataset -------------------------------------------------------------------------------------------------------


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def webdataset(path: Path) -> WebDatasetSource:
    return WebDatasetSource(WebDatasetData(path=str(path)))


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_webdataset_samples_are_files_of_one_name(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kto_ray.data.webdataset.ROWS", 2)
    for shard in range(2):
        files = {}
        for number in range(3):
            name = f"set/{number:03}"
            files |= {f"{name}.JPG": image_bytes("red", "jpeg"), f"{name}.txt": f"cat {shard} {number}".encode()}
            files |= {f"{name}.json": json.dumps({"caption": "another", "liked": number < 2, "user": "ann"}).encode()}
        write_tar(tmp_path / f"shard-{shard:02}.{ending}", files)
    source = webdataset(tmp_path / f"shard-{{00..01}}.{ending}")
    rows = rows_of(source)
    assert [row["prompt"] for row in rows] == [f"cat {shard} {number}" for shard in range(2) for number in range(3)]
    assert [row["desirable"] for row in rows] == [True, True, False] * 2
    assert {row["image"] for row in rows} == {image_bytes("red", "jpeg")}
    assert {row["who"] for row in rows} == {"ann"}
    assert counts_of(source) == (4, 2, 0)
    assert [row["id"] for row in rows_of(webdataset(tmp_path))] == [row["id"] for row in rows]


def test_webdataset_takes_its_class_file_and_its_json_alone(tmp_path: Path) -> None:
    with_class = {"1.png": image_bytes(), "1.caption": b"a", "1.cls": b"0", "1.json": b'{"label": 1}'}
    (row,) = rows_of(webdataset(write_tar(tmp_path / "a.tar", with_class)))
    assert (row["prompt"], row["desirable"]) == ("a", False)
    of_json = {"1.webp": image_bytes(), "1.json": '{"prompt": "ä", "vote": "up"}'.encode(), "README": b"hello"}
    (row,) = rows_of(webdataset(write_tar(tmp_path / "b.tar", of_json)))
    assert (row["prompt"], row["desirable"]) == ("ä", True)


@pytest.mark.parametrize(
    ("files", "cut", "problem"),
    [
        ({"1.png": b"x" * 600, "1.txt": b"a", "1.cls": b"1"}, 1700, "truncated"),
        ({"1.png": b"x" * 600, "1.txt": b"a", "1.cls": b"1"}, 700, ""),
        ({"1.txt": b"a", "1.cls": b"1"}, None, "no images in its first samples"),
        ({"1.png": b"x", "1.json": b"{"}, None, "1.json cannot be read"),
        ({"1.png": b"x", "1.json": b"[1]"}, None, "1.json is no JSON object"),
        ({}, None, "no images"),
    ],
)
def test_a_tar_that_cannot_be_read_is_named(
    tmp_path: Path, files: dict[str, bytes], cut: int | None, problem: str
) -> None:
    path = write_tar(tmp_path / "a.tar", files)
    path.write_bytes(path.read_bytes()[:cut])
    text = refusal(webdataset(path))
    assert str(path) in text
    assert problem in text


# -- data sets of Hugging Face ----------------------------------------------------------------------------------------

FEATURES = {"info": {"features": {"label": {"names": ["dislike", "like"], "_type": "ClassLabel"}}}}
TABLE = pa.table(
    {
        "prompt": ["a", "b"],
        "image": pa.array([{"bytes": image_bytes(), "path": None}, {"bytes": None, "path": "x.png"}]),
        "label": [1, 0],
    }
).replace_schema_metadata({"huggingface": json.dumps(FEATURES)})


def write_saved(folder: Path) -> None:
    """As `Dataset.save_to_disk` leaves it."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, TABLE.schema) as writer,
    ):
        writer.write_table(TABLE)


def test_data_sets_that_were_saved_to_disk(tmp_path: Path) -> None:
    write_saved(tmp_path / "one")
    write_saved(tmp_path / "several" / "train")
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for folder in ("one", "several"):
        first, second = rows_of(HuggingFaceSource(HuggingFaceData(name=str(tmp_path / folder))))
        assert (first["image"], first["desirable"]) == (image_bytes(), True)  # by the names of classes
        assert (second["image"], second["desirable"]) == (None, False)
    test = HuggingFaceSource(HuggingFaceData(name=str(tmp_path / "several"), split="test"))
    assert "has no 'test'; it has: train" in refusal(test)
    assert "neither state.json nor dataset_dict.json" in refusal(HuggingFaceSource(HuggingFaceData(name=str(tmp_path))))


BY_NAME = """
from kto_ray.config.data import HuggingFaceData
from kto_ray.data.hugging_face import HuggingFaceSource
from kto_ray.errors import UserError

source = HuggingFaceSource(HuggingFaceData(name="owner/liked"))
print([source.preview().rows, [row["desirable"] for table in source.tables() for row in table.to_pylist()]])
for settings in ({"split": "test"}, {"config": "other"}, {"name": "owner/none"}):
    try:
        HuggingFaceSource(HuggingFaceData(**{"name": "owner/liked"} | settings)).preview()
    except UserError as error:
        print(error)
"""


def test_data_sets_of_the_hub_by_name() -> None:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    with dataset_hub({"owner/liked": {"default/train/0000.parquet": sink.getvalue()}}) as address:
        hub = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        outcome = subprocess.run(
            [sys.executable, "-c", BY_NAME], env=os.environ | hub, capture_output=True, text=True, check=False
        )
    assert outcome.returncode == 0, outcome.stderr
    read, split, config, name = outcome.stdout.splitlines()
    assert read == "[2, [True, False]]"
    assert "has no 'test'; it has: train" in split
    assert "of its config 'other'" in config
    assert "there is no folder owner/none" in name


def test_batches_of_arrow_files_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BYTES", 2**16)
    large = pa.table({"prompt": ["p"] * 20, "image": [bytes([n]) * 2**14 for n in range(20)], "label": [1] * 20})
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, large.schema) as writer:
        writer.write_table(large)
    tables = list(HuggingFaceSource(HuggingFaceData(name=str(folder))).tables())
    assert len(tables) > 3
    assert [image for table in tables for image in table["image"].to_pylist()] == large["image"].to_pylist()
