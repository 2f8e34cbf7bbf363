"""An application as the labeler: it finds images, its users vote, verdicts reach rounds; with a desk of this process.

The application is real but small: it reads manifests, keeps thumbs in a database, in files, or sends them.
"""

import asyncio
import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from kto_ray.config import Labeling, RunConfig
from kto_ray.errors import UserError
from kto_ray.feedback import checks
from kto_ray.feedback.labeler import FeedbackLabeler
from kto_ray.feedback.publishing import Publisher, name_of
from kto_ray.images import to_png
from kto_ray.people.access import Signer, secret_of
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.desk import Desk
from kto_ray.people.rewinding import take_back
from kto_ray.people.terms import NewItem
from kto_ray.people.votes import Vote
from kto_ray.people.web.app import create_app
from kto_ray.records import PolicyRef, Sample, Verdict
from kto_ray.samples import Samples
from kto_ray.storage import Storage
from tests.factories import make_samples


class App:
    """The product: what it shows, and its table of thumbs."""

    def __init__(self, folder: Path) -> None:
        self.published, self.votes_folder = folder / "published", folder / "votes"
        self.votes_folder.mkdir(parents=True)
        self.database = sqlite3.connect(folder / "app.sqlite")
        self.url = f"sqlite:///{folder}/app.sqlite"
        with self.database:
            self.database.execute(
                "CREATE TABLE thumbs (id INTEGER PRIMARY KEY AUTOINCREMENT, image TEXT, vote TEXT, user_id TEXT)"
            )

    def images(self, number: int = 0) -> list[dict[str, Any]]:
        manifest = self.published / f"manifest/{number:05}.jsonl"
        return [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []

    def thumb(self, image: str, vote: str, *users: str | None) -> None:
        with self.database:
            rows = [(image, vote, user) for user in users]
            self.database.executemany("INSERT INTO thumbs (image, vote, user_id) VALUES (?, ?, ?)", rows)


class Bench:
    """A labeler on a run's folder; made anew, it is the labeler of a continued run."""

    def __init__(self, app: App, folder: Path, lag: int = 0, **label: Any) -> None:
        feedback = {"folder": str(app.published), "poll_s": 0.02, **label.pop("feedback", {})}
        settings = {"labeler": "feedback", "scorers": {}, "feedback": feedback, **label}
        self.config = RunConfig(label=Labeling.model_validate(settings), max_policy_lag=lag)
        self.storage, human = Storage(str(folder / "run")), self.config.label.human
        self.storage.write("config.yaml", b"")
        self.labeler = FeedbackLabeler(self.config, self.storage, Console())
        owner = database_owner(human, self.storage)
        self.labeler.desk = self.desk = Desk(database_url(human, self.storage), owner, human, lag)

    async def submit(self, samples: list[Sample]) -> None:
        await self.labeler.submit(Samples.of(samples))
        await self.labeler.finish(samples[0].stage)

    async def seal(self, stage: str = "round-00000") -> dict[str, Verdict]:
        return {verdict.sample_id: verdict for verdict in await self.labeler.seal(stage)}

    async def labels(self, stage: str = "round-00000") -> dict[str, str]:
        return {sample: verdict.label for sample, verdict in (await self.seal(stage)).items()}

    async def enough(self, stage: str = "round-00000") -> None:
        await asyncio.wait_for(self.labeler.enough(stage), PATIENCE_S)

    async def until(self, words: str, stage: str = "round-00000") -> None:
        """Wait for the round until it says so, which is not enough."""
        task = asyncio.ensure_future(self.labeler.enough(stage))
        async with asyncio.timeout(PATIENCE_S):
            while words not in self.labeler.status(stage):
                await asyncio.sleep(0.02)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


PATIENCE_S = 240


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    app = App(tmp_path)
    yield app
    app.database.close()


def in_database(app: App, **more: Any) -> dict[str, Any]:
    return {"feedback": {"database": app.url, "table": "thumbs"}, **more}


# -- what goes out


async def test_images_go_out_once_with_all_that_the_application_needs(app: App, tmp_path: Path) -> None:
    bench, samples = Bench(app, tmp_path), make_samples("round-00003", 3, PolicyRef(2, "c" * 64))
    await bench.submit(samples)
    rows = app.images(3)
    assert [row["id"].rpartition("-")[0] for row in rows] == [sample.id for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        with Image.open(app.published / row["file"]) as image:
            np.testing.assert_array_equal(np.asarray(image), sample.pixels_HWC)
        height, width, _ = sample.pixels_HWC.shape
        known = {"prompt": sample.prompt.text, "round": 3, "policy": 2, "width": width, "height": height}
        assert known.items() <= row.items()
        assert row["uri"] == f"{app.published}/{row['file']}"
    files = {file: file.stat().st_mtime_ns for file in app.published.rglob("*") if file.is_file()}
    again = Bench(app, tmp_path)  # after a crash the round is submitted again
    await again.submit(samples)
    assert {file: file.stat().st_mtime_ns for file in app.published.rglob("*") if file.is_file()} == files


async def test_a_crash_while_images_go_out_leaves_each_of_them_once(app: App, tmp_path: Path) -> None:
    bench, samples = Bench(app, tmp_path), make_samples("round-00000", 4)
    await bench.labeler.submit(Samples.of(samples[:2]))
    pngs = to_png(np.stack([sample.pixels_HWC for sample in samples[2:]]))
    new = [NewItem(s.id, s.prompt.id, s.prompt.text, png) for s, png in zip(samples[2:], pngs, strict=True)]
    await bench.desk.add("round-00000", 0, new)
    names = await bench.desk.announce({item.sample_id: name_of(item) for item in new})
    bench.labeler.publisher.publish("round-00000", new[:1], names)  # and then the process died
    again = Bench(app, tmp_path)
    await again.submit(samples)
    rows = app.images()
    assert sorted(row["id"] for row in rows) == sorted({row["id"] for row in rows})
    assert len(rows) == len(list((app.published / "images").iterdir())) == 4


def test_jpeg_where_that_is_wanted(tmp_path: Path) -> None:
    (png,) = to_png(make_samples("round-00000", 1)[0].pixels_HWC[None])
    item = NewItem("s", "p", "ein Kreis", png)
    Publisher(Storage(str(tmp_path)), "jpeg").publish("round-00000", [item], {"s": "s-1"})
    with Image.open(tmp_path / "images/s-1.jpg") as image:
        assert (image.format, image.size) == ("JPEG", Image.open(BytesIO(png)).size)


async def test_a_rewound_image_is_another_one(app: App, tmp_path: Path) -> None:
    bench, (sample,) = Bench(app, tmp_path, **in_database(app)), make_samples("round-00000", 1)
    await bench.submit([sample])
    old = app.images()[0]["id"]
    take_back(bench.desk.engine, ["round-00000"])
    changed = Sample.of(sample, sample.latents_CHW, 255 - sample.pixels_HWC)
    again = Bench(app, tmp_path, **in_database(app))
    await again.submit([changed])
    assert app.images()[-1]["id"] != old
    app.thumb(old, "up", "ann")
    await again.until("0 of 1 images answered by 0 votes, 1 needed; votes that came to nothing: 1")


# -- what comes back


async def test_a_rounds_verdicts_come_from_a_table(app: App, tmp_path: Path) -> None:
    bench, samples = Bench(app, tmp_path, **in_database(app)), make_samples("round-00000", 3)
    await bench.submit(samples)
    assert bench.labeler.status("round-00000") == "the application's votes"
    await bench.until("the application's votes: 0 of 3 images answered by 0 votes, 3 needed")
    for image, vote in zip(app.images(), ("up", "down"), strict=False):
        app.thumb(image["id"], vote, "ann")
    await bench.until("2 of 3 images answered by 2 votes, 3 needed")
    app.thumb(app.images()[2]["file"], "up", "bob", "cai")
    await bench.enough()
    verdicts = await bench.seal()
    assert [verdicts[sample.id].label for sample in samples] == ["desirable", "undesirable", "desirable"]
    assert verdicts[samples[2].id].rule == "majority@1(of 1): bob desirable, cai desirable"
    assert {verdict.labeler for verdict in verdicts.values()} == {"feedback"}
    figures = bench.labeler.figures("round-00000")
    assert (figures["feedback/counted"], figures["people/judged"], figures["people/labelers"]) == (4, 3, 3)
    assert bench.storage.read_table("people/00000.parquet").num_rows == 4


async def test_what_lies_there_at_the_deadline_counts(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path, **in_database(app))
    await bench.submit(make_samples("round-00000", 2))
    app.thumb(app.images()[0]["id"], "down", None)
    assert list((await bench.labels()).values()) == ["undesirable"]


async def test_late_votes_join_the_next_round_and_too_late_ones_are_told(
    app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(app, tmp_path, lag=1, **in_database(app, human={"min_labels": 0.5}))
    samples = make_samples("round-00000", 4)
    await bench.submit(samples)
    images = [image["id"] for image in app.images()]
    app.thumb(images[0], "up", "ann")
    app.thumb(images[1], "down", "ann")
    await bench.enough()  # half of them
    assert len(await bench.labels()) == 2
    app.thumb(images[0], "down", "ann")  # changed her mind after the seal
    app.thumb(images[2], "down", "bob")
    await bench.submit(make_samples("round-00001", 2, PolicyRef(1, "c" * 64)))
    app.thumb(app.images(1)[0]["id"], "up", "ann")
    with caplog.at_level(logging.WARNING):
        second = await bench.labels("round-00001")
    assert second[samples[2].id] == "undesirable"
    assert samples[0].id not in second
    figures = bench.labeler.figures("round-00001")
    assert (figures["people/late"], figures["feedback/too_late"], figures["feedback/counted"]) == (1, 1, 2)
    assert f"came after their image's round was sealed with a verdict, for instance: '{images[0]}'" in caplog.text


async def test_the_last_vote_of_a_person_counts_and_can_be_taken_back(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path, **in_database(app))
    await bench.submit(make_samples("round-00000", 3))
    one, two, three = (image["id"] for image in app.images())
    for image, vote in [(one, "up"), (one, "down"), (two, "up"), (two, "none"), (three, "up"), (three, "up")]:
        app.thumb(image, vote, "ann")
    assert list((await bench.labels()).values()) == ["undesirable", "desirable"]
    figures = bench.labeler.figures("round-00000")
    assert (figures["feedback/counted"], figures["feedback/taken_back"]) == (5, 1)


@pytest.mark.parametrize(
    ("overlap", "votes", "label"),
    [
        ({"rule": "majority"}, "uud", "desirable"),
        ({"rule": "majority"}, "ud", "abstain"),
        ({"rule": "unanimous"}, "uud", "abstain"),
        ({"rule": "share", "least_yes": 0.7}, "uud", "undesirable"),
        ({"rule": "share", "least_yes": 0.7}, "uuuuuuuddd", "desirable"),
        ({"rule": "latest"}, "uud", "undesirable"),
        ({"rule": "latest"}, "ddu", "desirable"),
        ({"labels": 3}, "uu", None),
        ({"labels": 3}, "uuu", "desirable"),
    ],
)
async def test_how_votes_are_combined(app: App, tmp_path: Path, overlap: Any, votes: str, label: str | None) -> None:
    """Of people without names, each of whom is somebody else."""
    bench, (sample,) = (
        Bench(app, tmp_path, **in_database(app, human={"overlap": overlap})),
        make_samples("round-00000", 1),
    )
    await bench.submit([sample])
    for vote in votes:
        app.thumb(app.images()[0]["id"], {"u": "up", "d": "down"}[vote], None)
    assert await bench.labels() == ({} if label is None else {sample.id: label})
    assert bench.labeler.figures("round-00000")["feedback/counted"] == len(votes)


async def test_odd_votes_are_counted_and_told_once_a_round(
    app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(app, tmp_path, **in_database(app))
    await bench.submit(make_samples("round-00000", 1))
    (image,) = app.images()
    for vote, who in [("meh", "ann"), ("up", "operator"), ("up", "x" * 100), ("up", "(anonymous 1)"), ("up", "ann")]:
        app.thumb(image["id"], vote, who)
    app.thumb("some/other.png", "up", "ann", "bob")
    await bench.desk.badge_of("operator", "operator")
    with caplog.at_level(logging.WARNING):
        assert list((await bench.labels()).values()) == ["desirable"]
    figures = bench.labeler.figures("round-00000")
    found = {name: figures[f"feedback/{name}"] for name in ("counted", "odd", "unknown_image")}
    assert found == {"counted": 1, "odd": 4, "unknown_image": 2}
    told = [record.getMessage() for record in caplog.records]
    assert [sum(word in text for text in told) for word in ("did not publish", "cannot be understood")] == [1, 1]
    assert "'other'" in caplog.text


async def test_who_was_excluded_counts_no_more(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path, **in_database(app))
    await bench.submit(make_samples("round-00000", 2))
    one, two = (image["id"] for image in app.images())
    app.thumb(one, "up", "troll")
    await bench.until("1 of 2 images answered by 1 votes")
    bench.desk.people.exclude("troll", "by the operator")
    app.thumb(two, "up", "troll", "ann")
    assert len(await bench.labels()) == 1
    assert bench.labeler.figures("round-00000")["feedback/excluded"] == 1


async def test_a_vote_counts_once_however_often_it_is_read(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path, **in_database(app))
    await bench.submit(make_samples("round-00000", 2))
    one, two = (image["id"] for image in app.images())
    app.thumb(one, "up", None, None, None)
    await bench.until("1 of 2 images answered by 3 votes")
    again = Bench(app, tmp_path, **in_database(app))  # the driver died; what was read lately is read again
    await again.submit(make_samples("round-00000", 2))
    app.thumb(one, "down", None)
    app.thumb(two, "down", None)
    await again.enough()
    verdicts = await again.seal()
    said = next(verdict.rule for verdict in verdicts.values() if verdict.label == "desirable")
    assert said.count(" desirable") == 3
    assert said.count("undesirable") == 1
    assert again.labeler.figures("round-00000")["feedback/known"] == 3


async def test_files_of_votes_that_come_and_grow(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path, feedback={"path": str(app.votes_folder)})
    await bench.submit(make_samples("round-00000", 3))
    one, two, three = (image["id"] for image in app.images())
    pq.write_table(pa.table({"image": [one], "liked": [True]}), app.votes_folder / "1.parquet")
    await bench.until("1 of 3 images answered by 1 votes")
    pq.write_table(pa.table({"image": [one, two], "liked": [True, False]}), app.votes_folder / "1.parquet")
    with (app.votes_folder / "2.jsonl").open("w") as lines:
        lines.write(json.dumps({"image": three, "vote": "👍", "user": "ann"}) + "\n")
    await bench.enough()
    assert list((await bench.labels()).values()) == ["desirable", "undesirable", "desirable"]
    assert bench.labeler.figures("round-00000")["feedback/counted"] == 3


async def test_a_database_that_is_away_is_said_and_asked_again(
    app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(app, tmp_path, **in_database(app))
    await bench.submit(make_samples("round-00000", 1))
    app.database.execute("ALTER TABLE thumbs RENAME TO gone")
    with caplog.at_level(logging.WARNING):
        await bench.until("no such table: thumbs")
    assert caplog.text.count("does not answer") == 1
    app.database.execute("ALTER TABLE gone RENAME TO thumbs")
    app.thumb(app.images()[0]["id"], "up", "ann")
    with caplog.at_level(logging.WARNING):
        await bench.enough()
    assert "votes can be read again" in caplog.text
    assert len(await bench.labels()) == 1


# -- votes that are sent


class Sender:
    """The application as a client of the run's API."""

    def __init__(self, bench: Bench, name: str = "application", role: Any = "application") -> None:
        signer = Signer(secret_of(bench.desk.engine))
        token = signer.token(bench.desk.people.admit(name, role))
        site = create_app(bench.desk, bench.config.label.human, signer)
        self.client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=site, root_path="/demo"),
            base_url="http://votes.test/demo/",
            headers={"Authorization": f"Bearer {token}"},
        )

    async def send(self, *votes: Mapping[str, Any]) -> httpx2.Response:
        return await self.client.post("api/votes", json={"votes": votes})


async def test_votes_may_be_sent_and_sent_again(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path)
    await bench.submit(make_samples("round-00000", 3))
    one, two, three = (image["id"] for image in app.images())
    sender = Sender(bench)
    votes = [
        {"id": "1", "image": one, "verdict": "desirable", "who": "ann", "when": 20},
        {"id": "2", "image": one, "verdict": "undesirable", "who": "ann", "when": 10},
        {"id": "3", "image": two, "verdict": "undesirable"},
        {"id": "4", "image": three, "verdict": "desirable", "who": "bob"},
        {"id": "5", "image": three, "verdict": "none", "who": "bob"},
        {"id": "6", "image": "nothing", "verdict": "desirable"},
    ]
    reply = (await sender.send(*votes)).json()
    counts = {"counted": 3, "older": 1, "taken_back": 1, "unknown_image": 1}
    nothing = dict.fromkeys(("known", "too_late", "excluded", "odd"), 0)
    examples = {"unknown_image": ["'nothing'"]}
    assert reply == {**counts, **nothing, "examples": examples}
    again = (await sender.send(*votes)).json()
    assert {name: number for name, number in again.items() if name != "examples" and number} == {
        "known": 5,
        "unknown_image": 1,
    }
    await bench.until("2 of 3 images answered by 2 votes")
    await sender.send({"id": "7", "image": three, "verdict": "desirable"})
    await bench.enough()
    assert list((await bench.labels()).values()) == ["desirable", "undesirable", "desirable"]
    figures = bench.labeler.figures("round-00000")
    assert (figures["feedback/counted"], figures["feedback/known"], figures["feedback/unknown_image"]) == (4, 5, 2)


async def test_only_the_application_sends_votes_and_it_does_nothing_else(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path)
    await bench.submit(make_samples("round-00000", 1))
    vote = {"id": "1", "image": app.images()[0]["id"], "verdict": "desirable"}
    for name, role in (("ann", "labeler"), ("operator", "operator")):
        reply = await Sender(bench, name, role).send(vote)
        assert (reply.status_code, reply.json()["why"]) == (403, "application")
    sender = Sender(bench)
    for path, body in (("lease", {}), ("answer", {"item": "x", "verdict": "skip"})):
        reply = await sender.client.post(f"api/{path}", json=body)
        assert (reply.status_code, reply.json()["why"]) == (403, "application")
    assert (await sender.client.get("api/overview")).status_code == 403
    entered = await sender.client.get("enter/" + sender.client.headers["Authorization"].removeprefix("Bearer "))
    assert entered.status_code == 403
    assert "cookie" not in str(entered.headers)
    del sender.client.headers["Authorization"]
    assert (await sender.send(vote)).status_code == 401
    await bench.until("0 of 1 images answered by 0 votes")


async def test_batches_are_large_but_bounded(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path)
    await bench.submit(make_samples("round-00000", 1))
    sender, image = Sender(bench), app.images()[0]["id"]
    many = [{"id": str(n), "image": image, "verdict": "desirable", "who": f"user-{n}"} for n in range(1001)]
    assert (await sender.send(*many[:300])).json()["counted"] == 300
    refused = await sender.send(*many)
    assert (refused.status_code, refused.json()["why"]) == (422, "request")
    assert (await sender.send()).status_code == 422
    too_large = await sender.send({"id": "x" * 2**20, "image": image, "verdict": "desirable"})
    assert (too_large.status_code, too_large.json()["why"]) == (413, "size")
    (verdict,) = (await bench.seal()).values()
    assert verdict.rule.endswith("and 280 more")


# -- before it begins


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"human": {"gold": {"file": "gold.jsonl"}}}, "human.gold.file is for people who judge on the page"),
        ({"human": {"labelers": ["ann"]}}, "would be given no page to judge on"),
        ({"human": {"on_deadline": "scorer"}}, "on_deadline: scorer needs a scorer"),
        ({"human": {"min_labels": 1.5}}, "min_labels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(label: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Labeling.model_validate({"labeler": "feedback", "scorers": {}, **label})


@pytest.mark.parametrize(
    ("feedback", "message"),
    [
        ({"database": "sqlite:///{folder}/app.sqlite", "table": "likes"}, "label.feedback.table: likes"),
        ({"path": "{folder}/nowhere"}, "label.feedback.path: there is nothing at"),
        ({"folder": "{folder}/app.sqlite"}, "label.feedback.folder: cannot write"),
        ({"database": "sqlite:///{folder}/app.sqlite", "table": "thumbs"}, None),
        ({}, None),
    ],
)
@pytest.mark.usefixtures("app")
def test_it_is_looked_at_before_a_run_begins(tmp_path: Path, feedback: Any, message: str | None) -> None:
    settings = {name: value.format(folder=tmp_path) for name, value in feedback.items()}
    label, run = Labeling.model_validate({"labeler": "feedback", "feedback": settings}), Storage(str(tmp_path / "run"))
    if message is None:
        checks.check(label, run)
    else:
        with pytest.raises(UserError, match=message):
            checks.check(label, run)
    assert not (tmp_path / "run").exists()


async def test_a_position_and_its_votes_are_kept_together(app: App, tmp_path: Path) -> None:
    bench = Bench(app, tmp_path)
    await bench.submit(make_samples("round-00000", 1))
    assert await bench.desk.position() is None
    await bench.desk.take([Vote("k", app.images()[0]["id"], "desirable")], "up to here")
    with pytest.raises(AttributeError):  # it fails in the middle: nothing of it is kept
        bench.desk.votes.take([Vote("l", app.images()[0]["id"], "desirable", who=7)], "further")  # type: ignore[arg-type]
    assert await bench.desk.position() == "up to here"
