"""A labeling page with a real desk, a server and a browser, for `end_to_end/test_labeling_page.py`."""

import contextlib
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Playwright
from starlette.types import ASGIApp, Receive, Scope, Send

from kto_ray.config.people import Human
from kto_ray.people.access import Signer, link, secret_of
from kto_ray.people.desk import Desk
from kto_ray.people.overview import answers_table
from kto_ray.people.people import Role
from kto_ray.people.tables import items
from kto_ray.people.terms import NewItem
from kto_ray.people.web.app import create_app
from kto_ray.shapes.world import Scene, all_scenes, draw_somewhere

PREFIX = "/shapes"
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
TOO_FAST_MS = 160
"""The page takes no answer on an image sooner than about this."""


def launch(playwright: Playwright) -> Browser:
    """Debian's Chromium, without a window."""
    chromium = shutil.which("chromium")
    assert chromium, "no browser: install Debian's package chromium (tests/system_packages.sh)"
    return playwright.chromium.launch(executable_path=chromium, headless=True, args=list(FLAGS))


# -- images to judge


DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
OpenContext = Callable[..., BrowserContext]


def png_of(scene: Scene, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_somewhere(scene, np.random.default_rng(seed))).save(file, "PNG")
    return file.getvalue()


def pictures(stage: str, count: int, version: int = 0) -> list[NewItem]:
    """Images of the shapes world. Every other one shows what its prompt says, the others something else."""
    scenes = [all_scenes()[(37 * i + 11 * version) % 192] for i in range(count)]
    return [
        NewItem(f"{stage}-{i:03}", f"p{i}", scene.caption, png_of(scenes[(i + i % 2) % count], i), version)
        for i, scene in enumerate(scenes)
    ]


def is_good(sample_id: str) -> bool:
    """Whether the image shows its prompt; see `pictures`."""
    return int(sample_id[-3:]) % 2 == 0


# -- the site


def under(prefix: str, app: ASGIApp) -> ASGIApp:
    """An app under a path, as Ray Serve has it."""

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": prefix}, receive, send)

    return mounted


@dataclass
class LabelingSite:
    """A desk over SQLite and its page. The desk's queue and people are the test's own hands on it.

    `base_url`: of the run's page, without a slash at its end.
    """

    desk: Desk
    signer: Signer
    base_url: str

    def link(self, name: str, role: Role = "labeler") -> str:
        badges = self.desk.people.badges_of(name)
        badge = badges[0] if badges else self.desk.people.admit(name, role)
        return link(self.base_url, self.signer.token(badge))

    def add_round(self, number: int, new: list[NewItem], finished: bool = True) -> None:
        self.desk.intake.add(f"round-{number:05}", number, new)
        if finished:
            self.desk.intake.finish(f"round-{number:05}", number)

    def answers(self) -> list[dict[str, Any]]:
        """All that stand, in order."""
        return [row for row in answers_table(self.desk.engine).to_pylist() if row["void"] is None]

    def sample_of(self, item: str) -> str:
        with self.desk.engine.begin() as connection:
            return str(connection.scalar(sa.select(items.c.sample_id).where(items.c.id == item)))


@contextlib.contextmanager
def labeling_site(folder: Path, settings: Human) -> Iterator[LabelingSite]:
    desk = Desk(f"sqlite:///{folder}/people.sqlite", "test", settings, max_policy_lag=1)
    signer = Signer(secret_of(desk.engine))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = under(PREFIX, create_app(desk, settings, signer))
        server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield LabelingSite(desk, signer, f"http://127.0.0.1:{listening.getsockname()[1]}{PREFIX}")
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            desk.engine.dispose()


# -- somebody at the page

ON_SCREEN = """(() => {
  const find = (selector) => document.querySelector(selector);
  const [image, pause] = [find("#card:not([hidden]) #stage img"), find("#pause:not([hidden]) h1")];
  return image?.src ?? (pause && pause.innerText !== "One moment" ? "" : null);
})()"""
"""Address of the image, "" while there is none, null while that is not known."""


class Visitor:
    """Somebody who came in by a link, and what the page's console complained of."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.page = context, context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.goto(url)

    @property
    def item(self) -> str | None:
        """Of the image on screen; None: the page has none, and says why. Waits until it is one or the other."""
        found: list[str | None] = []

        def is_settled() -> bool:
            found.append(self.page.evaluate(ON_SCREEN))
            return found[-1] is not None

        self.until(is_settled)
        match = re.search(r"/api/images/(\w+)\.png$", found[-1] or "")
        return match[1] if match else None

    def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Wait for something that comes true with time. Raises AssertionError when it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "this did not come true"
            self.page.wait_for_timeout(25)  # meanwhile Playwright goes on; time.sleep would hold it up

    def come_back(self) -> None:
        """As from another tab: the page asks at once how things are, instead of in a few seconds."""
        self.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    def press(self, key: str) -> None:
        """Answer the image on screen, and wait for the next."""
        before = self.item
        self.page.wait_for_timeout(TOO_FAST_MS)
        self.page.keyboard.press(key)
        self.until(lambda: self.item != before)

    def wait_for_image(self) -> str:
        self.page.wait_for_selector("#card:not([hidden]) #stage img")
        item = self.item
        assert item is not None
        return item

    def expect(self, text: str) -> None:
        """Wait until a text is to be seen. Raises TimeoutError."""
        self.page.get_by_text(text).first.wait_for()

    def swipe(self, distance: float, halfway: Callable[[], None] = lambda: None) -> None:
        """Draw a finger across the image, to the right where the distance is positive."""
        box = self.page.locator("#stage").bounding_box()
        assert box
        x, y = box["x"] + box["width"] / 2 - distance / 2, box["y"] + box["height"] / 2
        touch = self.context.new_cdp_session(self.page)

        def send(kind: str, at: float | None) -> None:
            points = [] if at is None else [{"x": x + at, "y": y}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        send("touchStart", 0)
        for step in range(1, 11):
            send("touchMove", distance * step / 10)
        halfway()
        send("touchEnd", None)


# What a page's styles make of an element: text against the first background behind it that is not see-through.
CONTRAST = """(selector) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgba(color).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = element;
  while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const [text, ground] = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}"""
