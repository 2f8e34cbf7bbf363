"""A run that is watched: what is read of its folder, as it goes and when it has ended, and the pages that show it."""

import html
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from starlette.testclient import TestClient

from kto_ray.cli import main
from kto_ray.config import RunConfig, WatchPage, load, require_same
from kto_ray.errors import UserError
from kto_ray.evaluate import albums, timeline
from kto_ray.evaluate.albums import ImageStory, Key, disagreements
from kto_ray.evaluate.plots import PLOTS
from kto_ray.evaluate.summary import results_of, sheet_of
from kto_ray.people.access import Signer
from kto_ray.people.people import Badge
from kto_ray.people.web.entrance import Entrance
from kto_ray.people.web.guard import HEADERS
from kto_ray.records import Prompt, Verdict
from kto_ray.storage import Storage
from kto_ray.watch import curves, reading, standing
from kto_ray.watch.finding import PAGE, Wish, find
from kto_ray.watch.own_page import OwnPage
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.thumbnails import EDGE, Thumbnails, to_webp
from kto_ray.watch.web.app import create_app
from kto_ray.watch.web.pages import STATIC, named
from tests.factories import make_score
from tests.watched import RULE, WatchedFolder

BAD = "<script>alert(1)</script> \"quoted\" & 'more'"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WatchedFolder:
    """Three rounds of 24 images, four evaluations of 20; not to be changed."""
    return WatchedFolder(tmp_path_factory.mktemp("runs") / "demo").make()


@pytest.fixture(scope="module")
def run(written: WatchedFolder) -> WatchedRun:
    return WatchedRun(written.uri)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may have changed is read again."""
    monkeypatch.setattr(reading, "FRESH_S", -1)


# -- albums


def test_an_image_has_its_whole_story(written: WatchedFolder, run: WatchedRun) -> None:
    album = run.album(Key("round", 1))
    assert len(album.images) == 24
    assert (album.sealed, album.settled, album.kept) == (True, True, True)
    record = written.rounds.round(1).records()[5]
    image = run.image(Key("round", 1), record.id)
    assert (image.record, image.draws, image.error) == (record, 2, None)
    assert image.verdict
    assert image.verdict.rule == RULE
    assert image.label == ("desirable" if (image.value("shapes") or 0) >= 0.5 else "undesirable")
    assert {one.record.prompt.id for one in run.same_prompt(image)} == {record.prompt.id}
    with pytest.raises(UserError, match="demo has no image nothing in round 1"):
        run.image(Key("round", 1), "nothing")
    with pytest.raises(UserError, match="demo has no round 7"):
        run.album(Key("round", 7))


def test_what_failed_says_why(run: WatchedRun) -> None:
    failed = [image for image in run.album(Key("round", 0)).images if image.label == "failed"]
    assert sorted(str(image.error) for image in failed) == [
        "its latents or pixels, in float16, are not finite",
        *["shapes: RuntimeError: it ran out of memory"] * 2,
    ]
    assert {image.draws for image in failed} == {0}


def test_held_out_images_are_judged_by_the_bar_that_the_run_reports_by(written: WatchedFolder, run: WatchedRun) -> None:
    for version in (0, 3):
        labels = [image.label for image in run.album(Key("evaluation", version)).images]
        assert labels.count("desirable") / len(labels) == written.evaluation.summary(version).pass_rate.value
    image = run.album(Key("evaluation", 2)).images[3]
    same = run.same_seed(image)
    assert [one.key.number for one in same] == [0, 1, 2, 3]
    assert {one.record.seed for one in same} == {image.record.seed}
    assert same[2] == image
    in_round = run.album(Key("round", 0)).images[0]
    assert run.same_seed(in_round) == [in_round]


@pytest.mark.usefixtures("impatient")
def test_an_open_round_grows(tmp_path: Path) -> None:
    folder = WatchedFolder(tmp_path / "open", rounds=2)
    run = WatchedRun(folder.uri)
    assert run.rounds() == []
    round_, requests = folder.rounds.round(0), folder.requests(0)
    samples = folder.draw(round_, requests[:10], 0)
    assert [image.label for image in run.album(Key("round", 0)).images] == ["pending"] * 10
    folder.score(round_, samples, 0)
    samples += folder.draw(round_, requests[10:], 0)
    album = run.album(Key("round", 0))
    assert (len(album.images), sum(bool(image.scores) for image in album.images)) == (24, 10)
    folder.score(round_, samples[10:], 0)
    folder.judge(round_)
    folder.seal(0, round_)
    album = run.album(Key("round", 0))
    assert (album.sealed, album.settled, {image.draws for image in album.images}) == (True, False, {0})
    folder.train(0, round_)
    album = run.album(Key("round", 0))
    assert (album.settled, {image.draws for image in album.images}) == (True, {2})
    assert run.album(Key("round", 0)) is album
    round_.drop_pixels()
    assert not WatchedRun(folder.uri).album(Key("round", 0)).kept


@pytest.mark.usefixtures("impatient")
def test_parts_that_go_while_they_are_read_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WatchedFolder(tmp_path / "sealing", rounds=1)
    round_ = folder.make_round(0)
    read, tries = albums.read_round, list[int]()

    def torn(*arguments: Any) -> Any:
        tries.append(len(tries))
        if len(tries) == 1:
            round_.tidy()
            raise FileNotFoundError
        return read(*arguments)

    monkeypatch.setattr(reading, "read_round", torn)
    assert len(WatchedRun(folder.uri).album(Key("round", 0)).images) == 24
    assert len(tries) == 2


def test_verdicts_that_came_late_are_found_with_what_people_said(tmp_path: Path) -> None:
    folder = WatchedFolder(tmp_path / "late", rounds=2, max_policy_lag=1, label={"labeler": "human"})
    first, second = folder.rounds.round(0), folder.rounds.round(1)
    samples = folder.draw(first, folder.requests(0), 0)
    on_time, late = samples[0].id, samples[1].id
    first.add_verdicts([Verdict(on_time, "desirable", "human", "majority@1: 1 yes, 0 no")])
    folder.seal(0, first)
    folder.draw(second, folder.requests(1), 0)
    second.add_verdicts([Verdict(late, "abstain", "human", "majority@1: 1 yes, 1 no")])
    folder.seal(1, second)
    rows: list[tuple[str, str, str, str | None, int]] = [
        ("anna", on_time, "desirable", None, 0),
        ("anna", late, "desirable", None, 1),
        ("ben", late, "undesirable", None, 1),
    ]
    rows += [("cleo", late, "skip", None, 1), ("dan", late, "undesirable", "undone", 1)]
    import pyarrow as pa

    for number in (0, 1):
        table = [{"labeler": w, "sample_id": i, "answer": a, "void": v} for w, i, a, v, n in rows if n == number]
        (folder.storage / "people").write_table(f"{number:05}.parquet", pa.Table.from_pylist(table))
    album = WatchedRun(folder.uri).album(Key("round", 0))
    assert album.by_id[on_time].answers == (("anna", "desirable"),)
    assert not album.by_id[on_time].people_disagree
    found = album.by_id[late]
    assert (found.label, found.answers) == ("abstain", (("anna", "desirable"), ("ben", "undesirable")))
    assert found.people_disagree
    assert [one.label for one in album.images].count("pending") == 22
    assert [one.record.id for one in find(album.images, Wish(disagree="people"), []).images] == [late]


def test_scorers_disagree_where_they_rank_otherwise() -> None:
    scores = {
        id_: {"a": make_score(id_, a), "b": make_score(id_, b)}
        for id_, a, b in (("x", 0.1, 30.0), ("y", 0.2, 20.0), ("z", 0.3, 10.0), ("w", 0.4, None))
    }
    apart = disagreements(scores, ["a", "b"])
    assert apart == pytest.approx({"x": 5 / 6 - 1 / 8, "y": 0.5 - 3 / 8, "z": 5 / 8 - 1 / 6})
    assert disagreements(scores, ["a"]) == {}


# -- finding


def found(run: WatchedRun, **wish: Any) -> list[ImageStory]:
    images = [image for album in run.rounds() for image in album.images]
    return list(find(images, Wish(**wish), ["shapes", "redness"]).images)


def test_images_are_found(run: WatchedRun) -> None:
    everything = found(run)
    assert len(everything) == 72
    assert [image.key.number for image in everything] == [2] * 24 + [1] * 24 + [0] * 24
    for label in ("desirable", "undesirable"):
        assert found(run, verdict=label) == [image for image in everything if image.label == label] != []
    assert {image.key.number for image in found(run, verdict="failed")} == {0}
    black = found(run, prompt=" On BLACK ")
    assert black == [image for image in everything if "on black" in image.record.prompt.text] != []
    between = found(run, low=0.2, high=0.7)
    assert (
        between
        == [i for i in everything if i.value("shapes") is not None and 0.2 <= (i.value("shapes") or 0) <= 0.7]
        != []
    )
    assert all((image.value("redness") or 0) <= 0 for image in found(run, scorer="redness", high=0))
    highest = [image.value("shapes") for image in found(run, order="highest")]
    assert highest == sorted((v for v in highest if v is not None), reverse=True) + [None] * 3
    assert found(run, order="lowest")[0].value("shapes") == min(v for v in highest if v is not None)
    apart = [image.disagreement or 0 for image in found(run, order="disagreement")]
    assert apart == sorted(apart, reverse=True)
    assert len(found(run, disagree="scorers")) == sum(one >= 0.5 for one in apart) > 0


def test_pages_hold_all_images_once(run: WatchedRun) -> None:
    one = run.album(Key("round", 0)).images[0]
    images = [replace(one, draws=number) for number in range(2 * PAGE + 5)]
    pages = [find(images, Wish(page=page), []) for page in (1, 2, 3)]
    assert [image.draws for page in pages for image in page.shown] == list(range(2 * PAGE + 5))
    assert find(images, Wish(page=99), []).page == 3
    assert find([], Wish(), []).pages == 1


@pytest.mark.usefixtures("impatient")
def test_what_was_found_is_kept_until_something_is_new(tmp_path: Path) -> None:
    folder = WatchedFolder(tmp_path / "kept", rounds=2)
    folder.train(0, folder.make_round(0))
    run, wish = WatchedRun(folder.uri), Wish(order="highest")
    first = run.finder.find(run.rounds(), wish, ["shapes"])
    assert run.finder.find(run.rounds(), wish.model_copy(update={"page": 2}), ["shapes"]).images is first.images
    assert len(run.finder.find(run.rounds(), Wish(verdict="undesirable"), ["shapes"]).images) < len(first.images)
    folder.make_round(1)
    grown = run.finder.find(run.rounds(), wish, ["shapes"])
    assert grown.images == find([i for album in run.rounds() for i in album.images], wish, ["shapes"]).images
    assert len(grown.images) == 48


def test_an_address_says_what_is_asked_for_and_nothing_else() -> None:
    assert Wish().query() == ""
    assert Wish(prompt="a & b", low=0.5, page=3).query(page=1) == "prompt=a+%26+b&low=0.5"


# -- thumbnails


def test_a_thumbnail_is_made_once_however_many_ask(run: WatchedRun) -> None:
    image, made, thumbnails = run.album(Key("round", 0)).images[0], list[int](), Thumbnails()
    begin = threading.Barrier(8)

    def pixels() -> Any:
        made.append(1)
        time.sleep(0.05)
        return np.zeros((512, 256, 3), np.uint8)

    def ask() -> None:
        begin.wait()
        thumbnails.of(image, pixels)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    with Image.open(io.BytesIO(thumbnails.of(image, pixels))) as small:
        assert small.size == (EDGE // 2, EDGE)


def test_thumbnails_that_nobody_looks_at_go_and_failures_are_tried_again(run: WatchedRun) -> None:
    first, second = [i for i in run.album(Key("round", 1)).images if i.record.place][:2]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    thumbnails, made = Thumbnails(most_bytes=len(to_webp(pixels)) + 1), list[str]()

    def read(name: str) -> Any:
        made.append(name)
        return pixels

    thumbnails.of(first, lambda: read("first"))
    thumbnails.of(second, lambda: read("second"))
    thumbnails.of(second, lambda: read("second"))
    thumbnails.of(first, lambda: read("first"))
    assert made == ["first", "second", "first"]
    for _ in range(2):
        with pytest.raises(UserError, match="gone"):
            Thumbnails().of(first, lambda: (_ for _ in ()).throw(UserError("gone")))


def test_small_pictures_stay_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    with Image.open(io.BytesIO(to_webp(pixels))) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


# -- curves


def test_curves_are_the_reports(run: WatchedRun) -> None:
    now = run.now()
    drawn = curves.curves_of(PLOTS["progress"] + PLOTS["feedback"], now.rows["round"], now.rows["evaluation"])
    assert [curve.title for curve in drawn] == ["Share that passes", "Mean score", "Verdicts", "Policy lag"]
    share = drawn[0]
    assert [line.label for line in share.lines] == ["held-out prompts", "trained prompts"]
    assert len(share.lines[0].dots) == 4
    assert share.lines[0].band.endswith("Z")
    assert len(drawn[2].bars) == 3 + 3 + 1  # failed ones in the first round only
    assert curves.curves_of(PLOTS["people"], now.rows["round"], now.rows["evaluation"]) == []


def test_a_curve_keeps_to_its_box_and_leaves_gaps() -> None:
    points = [(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, 2.0)]
    curve = curves.laid_out("t", "n", "round", [curves.Series("one", "blue", points)])
    assert curve
    (line,) = curve.lines
    assert [letter for letter in line.path if letter in "ML"] == ["M", "M", "L"]
    assert [dot.says for dot in line.dots] == ["one, round 0: 1", "one, round 2: 3", "one, round 3: 2"]
    assert all(curves.LEFT <= dot.x <= curves.WIDTH - curves.RIGHT for dot in line.dots)
    assert all(curves.TOP <= dot.y <= curves.HEIGHT - curves.BOTTOM for dot in line.dots)
    assert min(line.dots, key=lambda dot: dot.y).says.endswith(": 3")
    flat = curves.laid_out("t", "n", "round", [curves.Series("one", "blue", [(5.0, 0.0)])])
    assert flat
    assert flat.alt == "one 0"
    assert curves.laid_out("t", "n", "round", [curves.Series("one", "blue", [(5.0, None)])]) is None


# -- timeline


def rows_of(ends: list[float], **seconds: float) -> list[dict[str, Any]]:
    figures = {f"seconds/{name}": value for name, value in seconds.items()}
    spent = {"spent/generators/work": 1.0, "spent/generators/wait": 3.0, "spent/train_workers/work": 2.0}
    return [{"kind": "round", "step": n, "time": end, **figures, **spent} for n, end in enumerate(ends)]


def test_stages_follow_each_other_and_what_is_left_is_idle() -> None:
    rows = rows_of([110.0, 130.0], generate=4, label=1, load=1, train=4)
    evaluations = [{"kind": "evaluation", "step": 1, "time": 115.0}]
    line = timeline.timeline_of(RunConfig(), rows, evaluations)
    assert line
    begin, whole = 100.0, 30.0
    at = {lane.name: [(begin + whole * s.x, whole * s.width) for s in lane.spans] for lane in line.stages}
    assert at["Draw"] == [pytest.approx((100, 4), abs=1e-2), pytest.approx((120, 4), abs=1e-2)]
    assert at["Judge"][1] == pytest.approx((124, 1), abs=1e-2)
    assert at["Train"][1::2] == [pytest.approx((106, 4), abs=1e-2), pytest.approx((126, 4), abs=1e-2)]
    assert at["Evaluate"] == [pytest.approx((110, 5), abs=1e-2)]
    assert line.idle == pytest.approx(5 / 30)
    generators, train = line.processes
    assert (generators.name, generators.idle, train.idle) == ("Generators", 0.75, 0)
    assert [span.says for span in generators.spans[:2]] == ["round 0: 25\u202f% work", "round 0: 75\u202f% wait"]
    assert (line.rounds, line.of) == (2, 2)
    last = timeline.timeline_of(RunConfig(), rows, evaluations, latest=1)
    assert last
    assert (last.rounds, last.of, last.edges[-1]) == (1, 2, (1.0, 1))
    assert timeline.timeline_of(RunConfig(), [], []) is None


def test_storing_has_its_place_between_the_stages() -> None:
    line = timeline.timeline_of(
        RunConfig(), rows_of([110.0], generate=3, label=1, seal=1, load=1, train=2, publish=2), []
    )
    assert line
    at = {lane.name: [(100 + 10 * s.x, 10 * s.width) for s in lane.spans] for lane in line.stages}
    assert at["Store"] == [pytest.approx((104, 1)), pytest.approx((108, 2))]
    assert at["Train"] == [pytest.approx((105, 1)), pytest.approx((106, 2))]
    assert line.idle == pytest.approx(0)


def test_processes_of_a_role_are_told_apart_where_there_are_several() -> None:
    rows = rows_of([110.0, 120.0], generate=4, label=1, load=1, train=4)
    rows[0]["processes/generators"] = {"1": {"work": 3.0, "wait": 1.0}, "10": {"wait": 2.0}}
    rows[1]["processes/generators"] = {"2": {"work": 1.0, "sleep": 3.0}, "10": {"work": 2.0}}
    rows[1]["processes/train_workers"] = {"0": {"work": 2.0}}
    line = timeline.timeline_of(RunConfig(), rows, [])
    assert line
    found = [(lane.name, lane.single, lane.idle) for lane in line.processes]
    assert found == [
        ("Generators", False, 0.75),
        *[("replica 1", True, 0.25), ("replica 2", True, 0.75), ("replica 10", True, 0.5)],
        ("Train workers", False, 0),
    ]
    first, second, _ = line.processes[1:4]
    assert {span.says[:8] for span in first.spans} == {"round 0:"}  # it was not there in the other one
    assert {span.says[:8] for span in second.spans} == {"round 1:"}


def test_rounds_that_are_drawn_ahead_lie_where_they_were_drawn() -> None:
    rows = rows_of([110.0, 116.0, 122.0], generate=3, label=0, load=0, train=6)
    line = timeline.timeline_of(RunConfig(max_policy_lag=1), rows, [])
    assert line
    begin, whole = 101.0, 21.0
    draw = next(lane for lane in line.stages if lane.name == "Draw")
    assert [begin + whole * span.x for span in draw.spans] == [pytest.approx(x, abs=1e-2) for x in (101, 104, 110)]


# -- in words


@pytest.mark.usefixtures("impatient")
def test_a_run_says_what_it_is_at(tmp_path: Path) -> None:
    from kto_ray.lease import held

    folder = WatchedFolder(tmp_path / "words", rounds=2)
    run = WatchedRun(folder.uri)
    assert standing.standing_of(run).state == "stopped"
    with held(folder.storage, 10, 60):
        assert standing.standing_of(run).doing == "it is starting"
        folder.evaluate(0)
        round_ = folder.rounds.round(0)
        samples = folder.draw(round_, folder.requests(0)[:10], 0)
        folder.score(round_, samples[:4], 0)
        now = standing.standing_of(run)
        assert (now.state, now.doing, now.images, now.left_s) == ("runs", "round 0 is being drawn and scored", 10, None)
        assert [(bar.what, bar.done, bar.of) for bar in now.progress] == [
            ("drawn", 10, 24), ("scored", 4, 24), ("judged", 0, 24),
        ]  # fmt: skip
        folder.score(round_, folder.draw(round_, folder.requests(0)[10:], 0) + samples[4:], 0)
        folder.judge(round_)
        folder.seal(0, round_)
        assert standing.standing_of(run).doing == "the model learns from round 0"
        folder.train(0, round_)
        assert standing.standing_of(run).doing == "round 0 is done, the next one begins"
        folder.draw(folder.evaluation.round(1), folder.evaluation.requests[:5], 1)
        now = standing.standing_of(run)
        assert now.doing == "policy 1 is being evaluated"
        assert [(bar.done, bar.of) for bar in now.progress] == [(5, 20), (0, 20)]
    assert standing.standing_of(run).state == "stopped"
    folder.train(1, folder.make_round(1))
    folder.end()
    now = standing.standing_of(run)
    assert (now.state, now.doing, now.trained, now.images) == ("finished", "the run has ended", 2, 48)


@pytest.mark.usefixtures("impatient")
def test_a_driver_that_is_silent_is_said_to_be(tmp_path: Path) -> None:
    from kto_ray.lease import Claim

    folder = WatchedFolder(tmp_path / "silent", rounds=2)
    claim = replace(Claim.mine(60), machine="another", renewed="2026-01-01 00:00:00 UTC")
    folder.storage.write_json("lease/00001-x.json", {k: getattr(claim, k) for k in claim.__dataclass_fields__})
    now = standing.standing_of(WatchedRun(folder.uri))
    assert now.state == "silent"
    assert "nothing was heard of the driver" in now.doing


def test_health_is_told_with_the_runs_own_doubts() -> None:
    config = RunConfig()
    assert [finding.kind for finding in standing.health_of(config, [])] == ["fine"]
    row = {"step": 0, "desirable": 3, "undesirable": 1, "objective/accuracy": 0.6, "objective/saturated": 0.0}
    texts = [finding.text for finding in standing.health_of(config, [row])]
    assert texts[0] == "Nothing gives reason to doubt after round 0."
    assert texts[1].startswith("Round 0: 75% of the verdicts say yes; in 60% of the draws")
    bad = [{**row, "step": step, "objective/accuracy": 0.3, "objective/saturated": 0.9} for step in range(3)]
    found = standing.health_of(config, bad)
    assert [finding.kind for finding in found] == ["doubt", "hint", "figures"]
    assert found[0].text.startswith("Possible collapse: 90% of the drawn samples")
    assert "Nothing gives reason" not in " ".join(finding.text for finding in found)


# -- pages


class Site:
    """The pages of some runs in this process, and who has a badge."""

    def __init__(self, *runs: WatchedRun, **settings: Any) -> None:
        self.signer = Signer("secret")
        self.token = self.signer.token(Badge("watcher", time.time() + 1000))
        entrance = Entrance(self.signer, WatchPage(**settings), {"operator": "kto_ray_watch"})
        self.app = create_app(named(runs), entrance)
        self.stranger = TestClient(self.app)
        self.client = TestClient(self.app, headers={"Authorization": f"Bearer {self.token}"})


@pytest.fixture(scope="module")
def site(run: WatchedRun) -> Site:
    return Site(run)


@pytest.fixture(scope="module")
def paths(run: WatchedRun) -> list[str]:
    image = run.album(Key("evaluation", 1)).images[0].record.id
    return [
        *(
            "",
            "timeline",
            "timeline?all=true",
            "images",
            "images?page=2&prompt=red&low=&order=highest&disagree=scorers",
        ),
        *(f"images/evaluation-1/{image}", f"images/evaluation-1/{image}?album=evaluation-1"),
        *(f"thumbnails/evaluation-1/{image}.webp", f"pictures/evaluation-1/{image}.png"),
    ]


def test_nobody_comes_in_without_a_badge(site: Site, paths: list[str]) -> None:
    old = Signer("another secret").token(Badge("watcher", time.time() + 1000))
    expired = site.signer.token(Badge("watcher", time.time() - 1))
    for path in ["/", *(f"/runs/demo/{path}" for path in paths)]:
        for headers in ({}, {"Authorization": f"Bearer {old}"}, {"Authorization": f"Bearer {expired}"}):
            said = site.stranger.get(path, headers=headers)
            assert said.status_code in (401, 429), path
            assert "demo" not in said.text
            assert HEADERS.items() <= dict(said.headers.items() | {k: said.headers[k] for k in HEADERS}.items()).items()
    assert site.stranger.get("/runs/nothing/").status_code in (401, 429)


def test_a_link_lets_a_browser_in(site: Site) -> None:
    browser = TestClient(site.app)
    said = browser.get(f"/enter/{site.token}")
    assert said.status_code == 200
    assert str(said.url).endswith("/runs/demo/")
    assert "kto_ray_watch" in browser.cookies
    assert "kto_ray_operator" not in browser.cookies


def test_pages_are_whole_and_cost_nothing_where_nothing_is_new(site: Site, paths: list[str]) -> None:
    for path in paths:
        said = site.client.get(f"/runs/demo/{path}")
        assert said.status_code == 200, path
        assert said.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]
        if said.headers["Content-Type"].startswith("text/html"):
            assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", said.text), path
            again = site.client.get(f"/runs/demo/{path}", headers={"If-None-Match": said.headers["ETag"]})
            assert (again.status_code, again.content) == (304, b"")
        else:
            assert "immutable" in said.headers["Cache-Control"]


def test_addresses_on_pages_lead_somewhere(site: Site, paths: list[str]) -> None:
    asked = set()
    for path in [path for path in paths if not path.endswith((".webp", ".png"))]:
        page = site.client.get(f"/runs/demo/{path}")
        for address in re.findall(r'(?:href|src|data-picture)="([^"]+)"', page.text):
            asked.add(str(page.url.join(address.replace("&amp;", "&"))))
    kinds = {re.sub(r"[0-9a-f]{16}|\?.*|\d+", "", address) for address in asked}
    assert len(kinds) > 10
    for kind in kinds:
        address = next(one for one in asked if re.sub(r"[0-9a-f]{16}|\?.*|\d+", "", one) == kind)
        assert site.client.get(address).status_code == 200, address


def test_pictures_are_those_that_were_drawn(site: Site, written: WatchedFolder) -> None:
    round_ = written.rounds.round(2)
    record = round_.records()[4]
    said = site.client.get(f"/runs/demo/pictures/round-2/{record.id}.png")
    with Image.open(io.BytesIO(said.content)) as image:
        assert np.array_equal(np.asarray(image), round_.pixels_of([record])[0])


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/runs/nothing/", 404),
        ("/runs/demo/images/round-0/nothing", 404),
        ("/runs/demo/images/round-99/nothing", 404),
        ("/runs/demo/images/people-0/nothing", 404),
        ("/runs/demo/thumbnails/round-0/nothing.webp", 404),
        ("/runs/demo/images?album=round-x", 404),
        ("/runs/demo/images?low=much", 422),
        ("/runs/demo/images?verdict=good", 422),
        ("/runs/demo/images?unknown=1", 422),
        ("/static/nothing.js", 404),
        ("/static/../pages.py", 404),
    ],
)
def test_what_is_not_there_is_said(site: Site, path: str, status: int) -> None:
    said = site.client.get(path)
    assert said.status_code == status
    assert "<h1>" in said.text


def test_static_files_are_served() -> None:
    assert {"base.css", "icon.svg", "watch.css", "live.js", "grid.js", "image.js"} == STATIC.keys()


def test_prompts_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    folder = WatchedFolder(tmp_path / "bad", rounds=1)
    folder.prompts = [Prompt("p", BAD)]
    round_ = folder.rounds.round(0)
    requests = [replace(r, prompt=Prompt("p", "a red circle on black")) for r in folder.requests(0)[:2]]
    samples = [
        replace(s, prompt=Prompt("p", BAD, {"x": BAD})) for s in folder.draw(folder.rounds.round(5), requests, 0)
    ]
    round_.add_samples(samples)
    site = Site(WatchedRun(folder.uri))
    for path in ("", "images", f"images/round-0/{samples[0].id}", f"images?prompt={BAD.replace('&', '%26')}"):
        said = site.client.get(f"/runs/bad/{path}")
        assert said.status_code == 200
        assert "<script>alert" not in said.text
        assert path == "" or "&lt;script&gt;alert(1)" in said.text


def test_pixels_that_were_not_kept_are_not_asked_for(tmp_path: Path) -> None:
    folder = WatchedFolder(tmp_path / "lean", rounds=1)
    folder.make_round(0).drop_pixels()
    record = folder.rounds.round(0).records()[0]
    site = Site(WatchedRun(folder.uri))
    assert "not kept" in site.client.get(f"/runs/lean/images/round-0/{record.id}").text
    assert site.client.get(f"/runs/lean/thumbnails/round-0/{record.id}.webp").status_code == 404


def test_several_runs_stand_side_by_side(written: WatchedFolder, tmp_path: Path) -> None:
    other = WatchedFolder(tmp_path / "a new run", rounds=1)
    other.evaluate(0)
    runs = [WatchedRun(written.uri), WatchedRun(other.uri)]
    assert list(named(runs)) == ["demo", "run-1"]
    site = Site(*runs)
    page = site.client.get("/")
    assert page.status_code == 200
    assert all(text in page.text for text in ('runs/demo/"', 'runs/run-1/"', "a new run", "Side by side"))
    assert site.client.get("/runs/run-1/").status_code == 200


def test_a_run_in_a_bucket_is_watched(tmp_path: Path, s3_bucket: str) -> None:
    local, remote = tmp_path / "remote", Storage(f"{s3_bucket}/runs/remote")
    WatchedFolder(local, rounds=1, images=4).make()
    for file in local.rglob("*"):
        if file.is_file():
            remote.write(str(file.relative_to(local)), file.read_bytes())
    run = WatchedRun(remote.uri)
    site, image = Site(run), run.album(Key("round", 0)).images[-1]
    where = f"round-0/{image.record.id}"
    for path in ("", "images", "timeline", f"images/{where}", f"thumbnails/{where}.webp", f"pictures/{where}.png"):
        assert site.client.get(f"/runs/remote/{path}").status_code == 200, path


# -- in the report


def test_the_report_has_the_same_pictures(written: WatchedFolder) -> None:
    rows, folder = written.metrics.of, written.storage
    results = results_of(written.config, folder, rows, written.rounds, written.evaluation, None, {})
    section = results.report.partition("What was said of images")[2].partition("</section>")[0]
    assert "24 images of round 2, in the order of their prompts: ✓ desirable, ✗ undesirable." in section
    assert section.count('src="data:image/png') == 24
    assert section.count(html.escape(RULE)) == 24
    assert all(lane in results.report for lane in ("Train", "Store", "Evaluate", "replica 2", "Train workers"))
    sheet = sheet_of(folder, written.config, [0, 1, 2, 3])  # the last one is open
    assert sheet
    assert (sheet.round, len(sheet.images), sheet.of) == (2, 24, 24)


def test_the_report_does_without_what_is_not_there(tmp_path: Path) -> None:
    folder = WatchedFolder(tmp_path / "bare", rounds=1)
    folder.evaluate(0)
    results = results_of(folder.config, folder.storage, folder.metrics.of, folder.rounds, folder.evaluation, None, {})
    assert "Who worked" not in results.report
    assert "What was said of images" not in results.report
    folder.make_round(0).drop_pixels()
    assert sheet_of(folder.storage, folder.config, [0]) is None


# -- in every run


@pytest.mark.parametrize(
    ("overrides", "listens"),
    [
        ([], None),
        (["watch.port=8100"], ("watch", "127.0.0.1:8100")),
        (["label.labeler=human"], ("label.human", "127.0.0.1:8000")),
        (["label.labeler=human", "watch.port=8000"], ("label.human", "127.0.0.1:8000")),
        (["data=liked", "label.labeler=human"], None),  # nobody is asked
        (["data=liked", "label.labeler=human", "watch.port=8100"], ("watch", "127.0.0.1:8100")),
    ],
)
def test_a_run_listens_where_its_pages_are(overrides: list[str], listens: tuple[str, str] | None) -> None:
    address = load(None, overrides).listens
    assert (address and (address.section, str(address))) == listens


@pytest.mark.parametrize("wrong", ["watch.port=8100", "watch.host=0.0.0.0"])
def test_two_pages_on_two_addresses_are_refused(wrong: str) -> None:
    with pytest.raises(UserError) as refused:
        load(None, ["label.labeler=human", "watch.port=8000", wrong])
    found = "127.0.0.1:8100" if "port" in wrong else "0.0.0.0:8000"
    assert f"watch.host and watch.port ({found}) must be label.human.host and label.human.port (127.0.0.1:8000)" in str(
        refused.value
    )


def test_a_run_may_be_watched_elsewhere_when_it_is_continued() -> None:
    changes = require_same(load(None, ["watch.port=8100", "watch.link_days=1"]), load(None, []))
    assert [change.field for change in changes] == ["watch.port", "watch.link_days"]


async def test_a_run_without_a_page_starts_none(tmp_path: Path) -> None:
    page = OwnPage(load(None, []), Storage(str(tmp_path)), Console())
    await page.start()
    page.close()
    assert not ray.is_initialized()
    script = "import sys, kto_ray.watch.own_page\nassert 'kto_ray.watch.web' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_watching_needs_no_ray(written: WatchedFolder) -> None:
    script = (
        "import sys\nfrom kto_ray.watch.reading import WatchedRun\nimport kto_ray.watch.serving\n"
        f"run = WatchedRun({written.uri!r})\nassert len(run.rounds()) == 3\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def taken() -> Iterator[int]:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_the_command_says_what_is_wrong(written: WatchedFolder, tmp_path: Path, taken: int) -> None:
    for words, sentence in (
        ([str(tmp_path)], "is not a run folder"),
        ([written.uri, written.uri + "/"], "RUN: one of them is named twice"),
        ([written.uri, "--port", str(taken)], f"--port: cannot listen on 127.0.0.1:{taken}"),
    ):
        said = CliRunner().invoke(main, ["watch", *words])
        assert said.exit_code == 2, said.output
        assert sentence in said.stderr
