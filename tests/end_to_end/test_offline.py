"""Labelled images in whole runs: the paper's table over images that scorers judge, whatever is killed meanwhile, and
an online run that learns from an application's thumbs and such images."""

import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kto_ray.config import RunConfig
from kto_ray.diffusion.loading import load_family
from kto_ray.evaluate.evaluation import STAGE
from kto_ray.evaluate.statistics import median_win_rate
from kto_ray.offline.decoding import UnreadableError, decode
from kto_ray.offline.planning import ONCE
from kto_ray.prepared import is_labelled, set_of
from kto_ray.relabel import saved_config
from kto_ray.rounds import Round, RoundStore
from kto_ray.storage import Storage
from kto_ray.train.streaming import Stream
from tests.end_to_end import jobs
from tests.end_to_end.cluster import free_port
from tests.labelled import image_bytes
from tests.plugins import CoinScorer

PARTS, IMAGES = 6, 12
"""Files of the source, and readable images of each."""
AT_LEAST = 0.1
ON_A_CPU = ("resources={num_cpus: 0.2, num_gpus: 0, threads: 1}", "dtype=float32")


def write_labelled(folder: Path) -> None:
    """In tables without verdicts; each has one image that is there already, one that is empty, and one cut off."""
    rng, again = np.random.default_rng(0), image_bytes()
    for part in range(PARTS):
        files = {f"{part}-again.png": again, f"{part}-empty.png": b"", f"{part}-cut.png": again[:-30]}
        for number in range(IMAGES):
            name = f"{part}-{number}.png"
            Image.fromarray(rng.integers(0, 256, (16 + number, 20, 3), np.uint8)).save(folder / name)
            files[name] = (folder / name).read_bytes()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        rows = [f"{name},a circle {number % 5}" for number, name in enumerate(files)]
        (folder / f"{part}.csv").write_text("\n".join(["image,prompt", *rows]) + "\n")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    write_labelled(folder)
    return folder


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory, labelled: Path, tiny_sd1_folder: Path, one_ray: dict[str, str]
) -> Path:
    """The folder of the three runs, of which the first was killed while it prepared and while it trained."""
    folder = tmp_path_factory.mktemp("table")
    overrides = [
        *(f"model={tiny_sd1_folder}", "rounds=2", "data.stream.steps=4", "train.workers=2", "train.micro_batch=4"),
        *(f"data.sources={{kind: table, path: {labelled}/*.csv, verdict: none}}", "data.score=all"),
        f"data.filters={{light: {{scorer: tests.plugins:CoinScorer, at_least: {AT_LEAST}}}}}",
        "label.scorers.CoinScorer.args.seconds=0.05",  # so that there is something to kill
        *("data.prepare.resources.num_cpus=0.2", "data.prepare.batch_size=1", "evaluate.images_per_prompt=5"),
        *("train.learning_rate=0.01", "train.warmup_steps=0"),  # so that medians differ
        *(f"{role}.{setting}" for role in ("generate", "train") for setting in ON_A_CPU),
    ]

    def start() -> jobs.Job:
        job = jobs.start(folder, "run", overrides, one_ray, job=["jobs/paper_table.py"])
        job.nodes = (os.getpid(),)  # Ray's processes are not under the driver
        return job

    job = start()
    job.wait_until(lambda: job.actors("ListPart"))[0].kill()
    job.wait_until(lambda: list(folder.glob("_prepared/*/sets/*/scores/*.parquet")))
    job.actors("ScorerActor")[0].kill()
    job.wait_until(lambda: job.actors("EncodeShard"))[0].kill()
    job.wait_until(lambda: list(folder.glob("_prepared/*/samples/*.parquet")))
    job.kill()

    job = start()
    job.wait_until(lambda: (folder / "run-kto/rounds/00000/training.json").exists())
    job.wait_until(lambda: job.actors("RayTrainWorker"))[-1].kill()
    assert job.wait() == 0, job.output()
    assert "the train workers failed" in job.output()
    return folder


def test_scores_verdicts_and_latents_are_those_of_this_process(
    table: Path, labelled: Path, tiny_sd1_folder: Path
) -> None:
    prepared = set_of(Storage(str(table / "run-kto")))
    rows = prepared.storage.read_table("samples.parquet").to_pylist()
    family = load_family(tiny_sd1_folder, RunConfig().model, torch.device("cpu"), torch.float32, parts="autoencoder")
    latents_NCHW = prepared.latents_of(prepared.records(np.arange(len(prepared))))
    found = {(row["source_id"], row["prompt"]): place for place, row in enumerate(rows)}
    values: dict[bool, list[float]] = {True: [], False: []}
    left_out = {"unreadable": 0, "dark": 0}
    for file in sorted(labelled.glob("*.csv")):
        for number, line in enumerate(file.read_text().splitlines()[1:]):
            name, prompt = line.split(",")
            place = found.pop((f"table:{file.name}:{number}", prompt), None)
            try:
                pixels_HWC = decode((labelled / name).read_bytes(), 16, 16, (255, 255, 255))
            except UnreadableError:
                left_out["unreadable"] += 1
                assert place is None
                continue
            (value,) = CoinScorer().score(pixels_HWC[None], [])
            if place is None:
                left_out["dark"] += value < AT_LEAST
                assert value < AT_LEAST or "again" in name
                continue
            row = rows[place]
            assert json.loads(row["metadata"])["scores"] == {"CoinScorer": value, "light": value}
            values[row["desirable"]].append(value)
            images_1CHW = torch.from_numpy(pixels_HWC[None].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.inference_mode():
                np.testing.assert_array_equal(latents_NCHW[place], family.encode(images_1CHW)[0].numpy())
    assert not found
    assert AT_LEAST <= min(values[False]) <= max(values[False]) < min(values[True])
    reasons = prepared.manifest["left_out"]
    assert sum(reasons.values()) + len(prepared) == PARTS * (IMAGES + 3)
    assert left_out["unreadable"] == 2 * PARTS == sum(n for why, n in reasons.items() if why.startswith("the file"))
    assert left_out["dark"] > 0
    assert reasons.get(ONCE, 0) <= PARTS


@pytest.mark.parametrize("name", ["run-kto", "run-sft", "run-csft"])
def test_draws_follow_from_set_seed_and_number_of_the_interval(table: Path, name: str) -> None:
    run = Storage(str(table / name))
    config, prepared = saved_config(run), set_of(run)
    assert config.data is not None
    stream = Stream(prepared, config.train, config.data.stream, config.seed)
    for index in range(config.rounds):
        interval = stream.interval(index)
        assert draws_of(run, index) == dict(zip(interval.ids, interval.draws_N.tolist(), strict=True))


def draws_of(run: Storage, index: int) -> dict[str, int]:
    drawn = RoundStore(run).round(index).storage.read_table("training.parquet")
    return dict(zip(drawn["sample_id"].to_pylist(), drawn["draws"].to_pylist(), strict=True))


def test_the_table_follows_from_the_runs_own_evaluations(table: Path) -> None:
    def scores_PK(run: str, version: int) -> np.ndarray[Any, Any]:
        round_ = Round(Storage(str(table / run)) / f"{STAGE}s" / f"{version:05}", STAGE)
        values = {score.sample_id: score.value for score in round_.scores()}
        records = sorted(round_.records(), key=lambda record: (record.prompt.id, record.index))
        return np.array([values[record.id] for record in records]).reshape(-1, 5)

    figures = json.loads((table / "run-table.json").read_text())
    mine_PK = scores_PK("run-kto", 2)
    others = {"the base model": ("run-kto", 0), "SFT": ("run-sft", 2), "CSFT": ("run-csft", 2)}
    assert figures.keys() == others.keys()
    for title, (run, version) in others.items():
        interval = median_win_rate(mine_PK, scores_PK(run, version))
        assert interval is not None
        assert figures[title]["CoinScorer"]["value"] == interval.value
        assert f"| {title} |" in (table / "run-table.md").read_text()


class Application:
    """Shows what a run publishes to somebody who likes about half of it."""

    def __init__(self, folder: Path, published: Path) -> None:
        self.published, self.shown = published, dict[str, bool]()
        self.database = sqlite3.connect(folder / "app.sqlite")
        self.url = f"sqlite:///{folder}/app.sqlite"
        self.database.execute("CREATE TABLE thumbs (id INTEGER PRIMARY KEY, image_id TEXT, user_id TEXT, vote INTEGER)")

    def look(self) -> None:
        for manifest in sorted(self.published.glob("manifest/*.jsonl")):
            for row in map(json.loads, manifest.read_text().splitlines()):
                if row["id"] not in self.shown:
                    pixels_HWC = np.asarray(Image.open(self.published / row["file"]), np.int64)
                    self.shown[row["id"]] = bool(pixels_HWC.sum() % 2)
                    vote = row["id"], "ann", int(self.shown[row["id"]])
                    self.database.execute("INSERT INTO thumbs (image_id, user_id, vote) VALUES (?, ?, ?)", vote)
        self.database.commit()


def test_a_run_learns_from_an_applications_thumbs_and_a_share_of_labelled_images(
    table: Path, labelled: Path, tiny_sd1_folder: Path, tmp_path: Path
) -> None:
    """Of which those that the table's set has are not encoded again."""
    application = Application(tmp_path, tmp_path / "run/feedback")
    source = f"{{kind: table, path: {labelled}/*.csv, expression: \"prompt like '%1'\"}}"
    overrides = [
        *(f"model={tiny_sd1_folder}", "rounds=1"),
        *(f"data.mix={{source: {source}, share: 0.25}}", f"data.prepare.folder={table}/_prepared"),
        *("label.labeler=feedback", "label.feedback.poll_s=0.2", "label.feedback.table=thumbs"),
        *(f"label.feedback.database={application.url}", f"label.human.port={free_port()}"),
        *("generate.resources.num_cpus=0.4", "train.resources.num_cpus=0.6", "data.prepare.resources.num_cpus=0.2"),
    ]
    job = jobs.start(tmp_path, "run", overrides)
    while job.process.poll() is None:
        application.look()
        time.sleep(0.2)
    assert job.wait() == 0, job.output()

    run = Storage(str(job.run))
    rows = [json.loads(line) for line in (job.run / "feedback/manifest/00000.jsonl").read_text().splitlines()]
    liked = {row["id"].rpartition("-")[0]: application.shown[row["id"]] for row in rows}
    verdicts = RoundStore(run).round(0).verdicts()
    assert {verdict.sample_id: verdict.label == "desirable" for verdict in verdicts} == liked
    assert len(liked) == 24

    prepared, before, draws = set_of(run), set_of(Storage(str(table / "run-kto"))), draws_of(run, 0)
    assert set(before.table["sample_id"].to_pylist()) < set(prepared.table["sample_id"].to_pylist())
    assert prepared.manifest["encoded"] == len(prepared) - len(before)
    mixed = {name: count for name, count in draws.items() if count and is_labelled(name)}
    assert 4 * sum(mixed.values()) == sum(draws.values())
    assert mixed.keys() <= set(prepared.table["sample_id"].to_pylist())
    assert draws.keys() - mixed.keys() >= {verdict.sample_id for verdict in verdicts}
