"""The watch page in a real browser: a run that goes on, 5,000 images, a phone, keys, the dark, and shut doors.

Screenshots go to $KTO_RAY_SCREENSHOTS, if that is set. Times are not looked at: benchmarks/watching.py measures them.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kto_ray.config import WatchPage
from kto_ray.lease import held
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.serving import Server
from tests.browser import CONTRAST, PHONE, OpenContext, Visitor
from tests.watched import WatchedFolder

ROUNDS, IMAGES = 5, 1000
LOADED = "[...document.querySelectorAll('.grid img')].filter((image) => image.complete && image.naturalWidth).length"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@dataclass
class WatchSite:
    """`root`: where the pages' addresses begin, with a slash at its end."""

    link: str

    @property
    def root(self) -> str:
        return self.link.partition("enter/")[0]


@contextlib.contextmanager
def watch_site(*runs: WatchedRun) -> Iterator[WatchSite]:
    server = Server(runs, WatchPage())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield WatchSite(server.link)
    finally:
        server.stop()
        thread.join()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchSite]:
    """A run of 5,000 images that has ended, and is not to be changed."""
    folder = WatchedFolder(tmp_path_factory.mktemp("runs") / "large", rounds=ROUNDS, images=IMAGES).make()
    folder.end()
    with watch_site(WatchedRun(folder.uri)) as site:
        yield site


def shoot(visitor: Visitor, name: str) -> None:
    if folder := os.environ.get("KTO_RAY_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        visitor.page.screenshot(path=Path(folder) / f"{name}.png")


def see(site: WatchSite, visitor: Visitor, path: str) -> None:
    visitor.page.goto(f"{site.root}runs/large/{path}", wait_until="domcontentloaded")


def arrive(visitor: Visitor, address: str | Callable[[str], bool]) -> None:
    """Wait until the page has this address, and its scripts have run; pictures may still be on their way."""
    visitor.page.wait_for_url(address, wait_until="domcontentloaded")


def focused(visitor: Visitor) -> str:
    return str(visitor.page.evaluate("document.activeElement.getAttribute('href') ?? document.activeElement.id"))


def count(visitor: Visitor, selector: str) -> int:
    return visitor.page.locator(selector).count()


def test_a_run_is_seen_to_grow(tmp_path: Path, new_context: OpenContext) -> None:
    folder = WatchedFolder(tmp_path / "growing", rounds=3, images=32)
    with held(folder.storage, 10, 60), watch_site(WatchedRun(folder.uri)) as site:
        start, grid = Visitor(new_context(), site.link), None
        start.expect("It is starting")
        folder.evaluate(0)
        round_ = folder.rounds.round(0)
        samples = folder.draw(round_, folder.requests(0)[:20], 0)
        start.expect("Round 0 is being drawn and scored")
        start.expect("20 of 32")
        grid = Visitor(start.context, f"{site.root}runs/growing/images")
        assert count(grid, ".tile.pending") == 20
        samples += folder.draw(round_, folder.requests(0)[20:], 0)
        folder.score(round_, samples, 0)
        folder.judge(round_)
        grid.until(lambda: count(grid, ".tile.desirable") > 0 and count(grid, ".tile.pending") == 0)
        assert count(grid, ".tile") == 32
        folder.seal(0, round_)
        start.expect("The model learns from round 0")
        before = count(start, ".curve")
        folder.train(0, round_)
        folder.evaluate(1)
        start.until(lambda: count(start, ".curve") > before)
        folder.train(1, folder.make_round(1))
        start.expect("Round 1")
        start.until(lambda: count(start, ".rounds > li") == 2)
        # Whoever looks further down is not moved, but told.
        tile = grid.page.locator(".tile").nth(9)
        tile.focus()
        here = focused(grid)
        folder.make_round(2)
        grid.expect("new: show")
        assert focused(grid) == here
        grid.page.locator("#news").click()
        grid.until(lambda: count(grid, ".tile") == 96)
        assert start.complaints == grid.complaints == []


def test_thousands_of_images_come_as_one_scrolls(large: WatchSite, new_context: OpenContext) -> None:
    visitor = Visitor(new_context(), large.link)
    see(large, visitor, "images")
    visitor.expect("5,000 images")
    assert count(visitor, ".tile") == 120
    visitor.until(lambda: visitor.page.evaluate(LOADED) >= 30, 60)
    assert visitor.page.evaluate(LOADED) < 120  # those below are not asked for
    shoot(visitor, "watching_grid")
    for more in (240, 360):
        visitor.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        visitor.until(lambda more=more: count(visitor, ".tile") >= more, 60)  # type: ignore[misc]
    addresses = visitor.page.eval_on_selector_all(".tile", "(all) => all.map((one) => one.href)")
    assert len(set(addresses)) == len(addresses)
    assert visitor.complaints == []


def test_images_are_filtered_by_what_is_asked(large: WatchSite, new_context: OpenContext) -> None:
    visitor = Visitor(new_context(), large.link)
    see(large, visitor, "images")
    visitor.page.keyboard.press("/")
    assert focused(visitor) == "prompt"
    visitor.page.keyboard.type("red ring")
    arrive(visitor, "**?prompt=red+ring")
    assert focused(visitor) == "prompt"  # one can go on typing
    assert all("red ring" in str(tile.get_attribute("title")) for tile in visitor.page.locator(".tile").all()[:20])
    see(large, visitor, "images")
    visitor.page.select_option("select[name=verdict]", "failed")
    arrive(visitor, "**?verdict=failed")
    visitor.expect("it ran out of memory")
    visitor.expect("3 images")
    visitor.page.locator("#clear").click()
    visitor.expect("5,000 images")
    assert visitor.complaints == []


def test_keys_lead_through_grid_image_and_policies(large: WatchSite, new_context: OpenContext) -> None:
    visitor = Visitor(new_context(), large.link)
    see(large, visitor, "images?album=evaluation-3")
    tiles = visitor.page.eval_on_selector_all(".tile", "(all) => all.map((one) => one.getAttribute('href'))")
    for key, place in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowDown", 10), ("ArrowLeft", 9), ("ArrowUp", 0)):
        visitor.page.keyboard.press(key)
        assert focused(visitor) == tiles[place], key
    visitor.page.keyboard.press("Enter")
    arrive(visitor, "**/images/evaluation-3/**")
    source = "document.getElementById('picture').getAttribute('src')"
    assert "/evaluation-3/" in visitor.page.evaluate(source)
    visitor.page.keyboard.press("ArrowRight")
    assert "/evaluation-4/" in visitor.page.evaluate(source)
    arrive(visitor, "**/images/evaluation-4/**")
    visitor.expect("Policy 4, held out")
    for _ in range(4):
        visitor.page.keyboard.press("ArrowLeft")
    assert "/evaluation-0/" in visitor.page.evaluate(source)
    arrive(visitor, "**/images/evaluation-0/**")
    assert visitor.page.locator("#version").inner_text() == "0"
    visitor.page.keyboard.press("j")
    arrive(visitor, lambda address: "/evaluation-3/" in address and not address.endswith(tiles[0]))
    visitor.page.keyboard.press("Escape")
    arrive(visitor, "**/images?album=evaluation-3")
    assert visitor.complaints == []


def test_it_fits_a_phone(large: WatchSite, new_context: OpenContext) -> None:
    visitor = Visitor(new_context(**PHONE), large.link)
    for path in ("", "images", "timeline"):
        see(large, visitor, path)
        assert visitor.page.evaluate(TOO_WIDE) <= 0, path
        shoot(visitor, f"watching_phone_{path or 'overview'}")
    see(large, visitor, "images?verdict=desirable")
    visitor.page.locator(".tile").first.tap()
    arrive(visitor, "**/images/round-4/**")
    assert visitor.page.evaluate(TOO_WIDE) <= 0
    assert visitor.complaints == []


def test_it_can_be_read_in_the_dark(large: WatchSite, new_context: OpenContext) -> None:
    for scheme in ("light", "dark"):
        visitor = Visitor(new_context(color_scheme=scheme), large.link)
        for path, selectors in (
            ("", ("h1", ".chip", ".facts dt", ".health li", ".curve figcaption p", ".counts .undesirable")),
            ("images", (".found", ".desirable .says b", ".undesirable .says b", ".says span")),
            ("timeline", (".lead", ".lane .idle", ".key")),
        ):
            see(large, visitor, path)
            for selector in selectors:
                assert visitor.page.evaluate(CONTRAST, selector) >= 4.5, (scheme, path, selector)
        see(large, visitor, "")
        shoot(visitor, f"watching_{scheme}")


def test_the_door_is_shut_without_a_badge(large: WatchSite, new_context: OpenContext) -> None:
    stranger = new_context().new_page()
    for path in ("", "runs/large/", "runs/large/images", "runs/large/timeline"):
        said = stranger.goto(f"{large.root}{path}")
        assert said
        assert said.status == 401
        assert "large" not in stranger.content()
        assert stranger.get_by_role("heading", name="A link is needed").is_visible()
    said = stranger.goto(f"{large.root}enter/forged")
    assert said
    assert said.status == 401
