"""Runs as a source, several sources, which kind lies at a path, what is held out, what is needed, and `show`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from kto_ray.cli import main
from kto_ray.config import Data, load, to_yaml, yaml12
from kto_ray.config.data import RunData, TableData
from kto_ray.data.held_out import Apart, held_out_prompts, require_apart
from kto_ray.data.protocol import LABELLED, Preview
from kto_ray.data.runs import FAILED, RunSource
from kto_ray.data.sense import require_classes
from kto_ray.data.showing import contact_sheet, look_at
from kto_ray.data.sources import kind_at, make_source, source_of
from kto_ray.data.table import TableSource
from kto_ray.errors import UserError
from kto_ray.objectives import CSFT, SFT, DiffusionKTO
from kto_ray.records import Verdict, verdicts_to_table
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.factories import make_samples, make_score, make_verdict
from tests.labelled import counts_of, image_bytes, rows_of, write_images, write_jsonl

# -- runs of this project ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """Two sealed rounds of four samples: one verdict of each kind in the first, a late one in the second."""
    folder = Storage(str(tmp_path / "demo"))
    folder.write("config.yaml", to_yaml(load("shapes_demo")).encode())
    for index in (0, 1):
        round_ = RoundStore(folder).round(index)
        samples = make_samples(round_.stage, 4)
        round_.add_samples(samples)
        round_.add_scores([make_score(sample.id) for sample in samples])
        said = [True, False, None] if index == 0 else [True, True]
        verdicts = [make_verdict(sample.id, desirable) for sample, desirable in zip(samples, said, strict=False)]
        if index == 0:
            late = samples[3].id
        else:
            verdicts += [make_verdict(late, False), Verdict(samples[3].id, "failed", "threshold", "r")]
        round_.add_verdicts(verdicts)
        round_.seal(round=index)
    RoundStore(folder).round(2).add_samples(make_samples("round-00002", 1))
    return folder


def test_a_run_gives_its_images_with_its_verdicts(run: Storage) -> None:
    source = RunSource(RunData(run=str(run)))
    assert counts_of(source) == (3, 2, 2)
    assert source.preview().wrong == {FAILED: 1}
    samples = {f"run:{sample.id}": sample for index in (0, 1) for sample in make_samples(f"round-{index:05}", 4)}
    rows = rows_of(source)
    assert [row["desirable"] for row in rows] == [True, False, None, False, True, True, None]
    for row in rows:
        sample, kept = samples[row["id"]], json.loads(row["metadata"])
        with Image.open(pa.BufferReader(row["image"])) as image:
            assert np.array_equal(np.asarray(image), sample.pixels_HWC)
        assert row["prompt"] == sample.prompt.text
        assert (kept["sample"], kept["seed"], kept["run"]) == (sample.id, sample.seed, str(run))
        assert kept["scores"] == {"shapes": 0.7}
    assert rows[0]["who"] == "threshold"


def test_a_run_gives_its_images_with_the_verdicts_of_a_label_set(run: Storage) -> None:
    ids = sorted(RoundStore(run).round(0).sample_ids)
    strict = run / "labels" / "strict"
    (strict / "00000").write_table("verdicts.parquet", verdicts_to_table([make_verdict(name, False) for name in ids]))
    strict.write_json("labels.json", {"label": {}, "rounds": 1})
    assert counts_of(RunSource(RunData(run=str(run), labels="strict"))) == (0, 4, 4)
    with pytest.raises(UserError, match=r"no label set 'lax'; it has: strict"):
        RunSource(RunData(run=str(run), labels="lax")).preview()


def test_a_run_without_rounds_or_pixels_is_refused(run: Storage, tmp_path: Path) -> None:
    RoundStore(run).round(1).drop_pixels()
    with pytest.raises(UserError, match=r"00001 has no pixels any more.*replay\.run="):
        RunSource(RunData(run=str(run))).preview()
    with pytest.raises(UserError, match="is not a run folder"):
        RunSource(RunData(run=str(tmp_path))).preview()


@pytest.mark.parametrize("to", ["parquet", "imagefolder", "hf"])
def test_an_exported_run_is_read_again_as_what_it_was(run: Storage, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    said = CliRunner().invoke(main, ["dataset", "export", str(run), "--to", to, "--out", str(out)])
    assert said.exit_code == 0, said.output
    assert "7 images, 3 desirable, 2 undesirable" in said.output
    source = make_source(kind_at(str(out)))
    assert source.preview().kind == {"parquet": "table", "imagefolder": "imagefolder", "hf": "hugging_face"}[to]
    assert counts_of(source) == (3, 2, 2)
    for row, before in zip(rows_of(source), rows_of(RunSource(RunData(run=str(run)))), strict=True):
        assert {name: row[name] for name in ("prompt", "desirable", "who")} == {
            name: before[name] for name in ("prompt", "desirable", "who")
        }
        assert (row["image"] or Path(row["uri"]).read_bytes()) == before["image"]

    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml12.load(front)["size_categories"] == ["n<1K"]
    assert "| 7 | 3 | 2 | 2 |" in text
    assert "`score_shapes`" in text
    if to == "parquet":
        ((declared,),) = [configs["data_files"] for configs in yaml12.load(front)["configs"]]
        tables = [pq.read_table(file) for file in sorted(out.glob(declared["path"]))]
        features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"}
        assert features.keys() == set(tables[0].column_names)
        assert pa.concat_tables(tables)["score_shapes"].to_pylist() == [0.7] * 7
    assert (
        "is there already"
        in CliRunner().invoke(main, ["dataset", "export", str(run), "--to", to, "--out", str(out)]).output
    )


def test_a_run_that_has_drawn_nothing_is_no_data_set(run: Storage, tmp_path: Path) -> None:
    empty = Storage(str(tmp_path / "offline"))
    empty.write("config.yaml", run.read("config.yaml"))
    RoundStore(empty).round(0).seal(round=0)
    said = CliRunner().invoke(main, ["dataset", "export", str(empty), "--to", "hf", "--out", str(tmp_path / "x")])
    assert (said.exit_code, (tmp_path / "x").exists()) == (2, False)
    assert "has drawn no images" in said.output


# -- which kind it is -------------------------------------------------------------------------------------------------

CSV = {
    "table": "prompt,image,label\np,a.png,1\n",
    "paper": "file_path,caption,label\na.png,p,intersections\n",
    "pairs": "prompt,image_0,image_1,label_0,label_1\np,a.png,b.png,1,0\n",
    "ratings": "prompt,image,rank\np,a.png,1\n",
    "votes": "prompt,image,vote,user\np,a.png,1,ann\n",
}


@pytest.mark.parametrize("kind", CSV)
def test_the_kind_of_a_table_is_found_by_its_columns(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(CSV[kind])
    assert kind_at(str(path)).kind == kind
    data = load(None, [f"data={path}"]).data
    assert data
    assert source_of(data).preview().kind == kind


def test_the_kind_of_a_folder_is_found_by_its_layout(tmp_path: Path, run: Storage) -> None:
    write_images(tmp_path / "folders", "good/1.png", "bad/2.png")
    write_images(tmp_path / "imagefolder" / "train", "1.png")
    (tmp_path / "imagefolder" / "train" / "metadata.csv").write_text("file_name,text,label\n1.png,a,1\n")
    (tmp_path / "hugging_face").mkdir()
    (tmp_path / "hugging_face" / "state.json").write_text("{}")
    (tmp_path / "webdataset").mkdir()
    (tmp_path / "webdataset" / "0.tar").touch()
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"prompt": ["p"], "image": ["a.png"], "label": [1]}), tmp_path / "table" / "0.parquet")
    for kind in ("folders", "imagefolder", "hugging_face", "webdataset", "table"):
        assert kind_at(str(tmp_path / kind)).kind == kind
    assert kind_at(str(tmp_path / "webdataset" / "{000..010}.tar")).kind == "webdataset"
    assert kind_at(str(run)).kind == "run"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "x.md").touch()
    for path, problem in (("nothing", "no folder of a known layout"), ("nowhere", "there is nothing at")):
        with pytest.raises(UserError, match=problem):
            kind_at(str(tmp_path / path))


def test_several_sources_come_one_after_the_other(tmp_path: Path) -> None:
    for name, label in (("a", 1), ("b", 0)):
        write_images(tmp_path / name, "1.png")
        write_jsonl(tmp_path / name / "t.jsonl", [{"prompt": name, "image": "1.png", "label": label}])
    data = load(None, [f"data=[{tmp_path}/a/t.jsonl, {{kind: table, path: {tmp_path}/b/t.jsonl}}]"]).data
    assert data
    source = source_of(data)
    assert [(row["id"], row["prompt"]) for row in rows_of(source)] == [
        ("0/table:t.jsonl:0", "a"),
        ("1/table:t.jsonl:0", "b"),
    ]
    preview = source.preview()
    assert (preview.rows, preview.verdicts) == (2, {"desirable": 1, "undesirable": 1, "none": 0})


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data={kind: pair, path: x}", "data.sources.0: unknown kind 'pair', did you mean 'pairs'?"),
        ("data={kind: pairs, path: x, rul: ever}", "unknown field 'data.sources.0.rul', did you mean 'rule'?"),
        ("data={kind: votes}", "data.sources.0: give path, or database and query"),
        ("data={kind: votes, database: 'sqlite:///x'}", "database and query belong together"),
        ("data={kind: table, path: x, desirable: [1]}", "give the values of both, or of neither"),
        ("data={kind: table, path: x, desirable: [1], undesirable: ['1']}", "both have '1'"),
        ("data={kind: table, path: x, verdict: y, expression: z}", "expression stands in the place of"),
        ("data={kind: ratings, path: x, top: 0.6, bottom: 0.6}", "are more than 1 together"),
        ("data=[]", "data: give sources, to learn from labelled images alone, or mix"),
        ("data={sources: x, held_out_share: 2}", "data.held_out_share: "),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, [override])
    assert problem in str(caught.value)


def test_data_survive_being_written_and_overridden() -> None:
    config = load(None, ["data=liked.csv", "data.held_out_share=0.1"])
    assert config.data == Data(sources=["liked.csv"], held_out_share=0.1)
    assert load(None, []).data is None
    secret = load(None, ["data={kind: votes, database: 'postgresql://u:s3cret@h/d', query: SELECT 1}"])
    assert "s3cret" not in to_yaml(secret) + repr(secret)


# -- what is held out, and what is needed -----------------------------------------------------------------------------


def test_prompts_are_held_out_by_their_words() -> None:
    apart = Apart(["A  cat"], share=0.3)
    assert "a CAT" in apart
    texts = [f"prompt {n}" for n in range(2000)]
    held_out = [text for text in texts if text in apart]
    assert 500 < len(held_out) < 700
    assert [text.upper() in apart for text in texts] == [text in apart for text in texts]
    assert not [text for text in texts if text in Apart(share=0.1) and text not in Apart(share=0.3)]
    rows = [{"id": str(n), "uri": "x", "prompt": text} for n, text in enumerate(["a cat", *texts])]
    table = pa.Table.from_pylist(rows, LABELLED)
    trained, evaluated = apart.split(table)
    assert sorted(trained["id"].to_pylist() + evaluated["id"].to_pylist()) == sorted(table["id"].to_pylist())
    assert evaluated["prompt"].to_pylist() == ["a cat", *held_out]


def test_held_out_prompts_are_never_trained_on() -> None:
    texts = [f"prompt {n % 50}" for n in range(500)]
    prompts = held_out_prompts(texts, 0.2)
    assert len({prompt.id for prompt in prompts}) == len(prompts) < 25
    require_apart([text for text in texts if text not in Apart(share=0.2)], prompts)
    with pytest.raises(UserError, match=r"1 of .* held-out prompts are trained on, for instance 'prompt"):
        require_apart([prompts[0].text.upper()], prompts)
    with pytest.raises(UserError, match="sets no prompt apart"):
        held_out_prompts(["a cat"], 0)


def preview(desirable: int, undesirable: int, none: int = 0) -> Preview:
    verdicts = {"desirable": desirable, "undesirable": undesirable, "none": none}
    return Preview("table", "t.csv", {}, sum(verdicts.values()), verdicts, LABELLED.empty_table(), {"odd rows": 3})


def test_an_objective_says_which_verdicts_it_needs() -> None:
    require_classes(preview(1, 1), DiffusionKTO())
    require_classes(preview(1, 0), SFT())
    require_classes(preview(0, 0, 5), DiffusionKTO(), to_be_scored=True)
    for given, objective, problem in (
        (
            preview(5, 0),
            DiffusionKTO(),
            r"kto needs desirable and undesirable .* no undesirable one\. sft learns",
        ),
        (preview(0, 5), SFT(), "sft needs desirable ones: there is no desirable one"),
        (preview(5, 0), CSFT(), "csft needs desirable and undesirable"),
        (preview(0, 0), SFT(), "gives no labelled image: 3 odd rows"),
    ):
        with pytest.raises(UserError, match=problem):
            require_classes(given, objective)


# -- kto-ray dataset show ---------------------------------------------------------------------------------------------


def show(*arguments: str) -> str:
    outcome = CliRunner().invoke(main, ["dataset", "show", *arguments])
    return f"{outcome.exit_code}\n{outcome.output}"


def test_what_a_source_holds_is_shown(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{n}.png" for n in range(6)))
    (tmp_path / "cut.jpg").write_bytes(image_bytes("red", "jpeg", (64, 64))[:400])
    (tmp_path / "empty.png").touch()
    rows: list[dict[str, Any]] = [{"prompt": "a b c", "image": f"{n}.png", "label": n % 2} for n in range(6)]
    rows += [{"prompt": "a", "image": name, "label": 1} for name in ("cut.jpg", "empty.png", "gone.png")]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    text = show(str(path), f"{{kind: table, path: {path}, verdict: none}}", "--sheet", str(tmp_path / "sheet.png"))
    assert text.startswith("0\n")
    for said in (
        "prompt: prompt, image: image, verdict: label",
        "desirable: 6 (66.7% of those with a verdict), undesirable: 3, no verdict: 0",
        "desirable: 0, undesirable: 0, no verdict: 9",
        "1 image files are missing, for instance",
        "words in a prompt (18 rows): 1 to 3, median 3",
        "cut.jpg: ",
        "empty.png: no image of a known format",
        "gone.png: [Errno 2] No such file",
        "sizes (of a sample of 12 images): 8x8: 12",
        "formats: desirable PNG: 3, none PNG: 6, undesirable PNG: 3",
    ):
        assert said in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        colors = sheet.convert("RGB").getcolors(2**20)
        assert colors
        assert {(46, 139, 87), (178, 34, 34), (128, 128, 128), (255, 0, 0)} <= {color for _, color in colors}


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    assert show(str(tmp_path / "nowhere.csv")).startswith("2\n")
    assert show("{kind: table, path: x, pth: y}").startswith("2\n")
    assert show("{kind: ").startswith("2\n")


def test_the_sample_is_spread_over_parts_and_the_same_each_time(tmp_path: Path) -> None:
    colors = ["red", "blue"]
    images = [image_bytes(colors[n % 2]) for n in range(60)]
    for number in range(30):
        table = pa.table({"prompt": ["p"] * 2, "image": images[:2], "label": [1, 0]})
        pq.write_table(table, tmp_path / f"{number:02}.parquet")
    source = make_source(TableData(path=str(tmp_path)))
    assert isinstance(source, TableSource)
    one, other = look_at(source, each=8), look_at(source, each=8)
    assert len(one.prompt_words) == 32  # of 16 files
    assert {kind: len(found) for kind, found in one.thumbnails.items()} == {"desirable": 8, "undesirable": 8}
    assert contact_sheet(one).tobytes() == contact_sheet(other).tobytes()


def test_an_image_of_too_many_pixels_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    rows = {
        "prompt": ["p"] * 2,
        "image": [image_bytes("red", size=(20, 11)), image_bytes("red", size=(12, 12))],
        "label": [1, 1],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    found = look_at(make_source(TableData(path=str(tmp_path / "t.parquet"))))
    assert len(found.unreadable) == 2
    assert all("decompression bomb" in why for why in found.unreadable.values())
