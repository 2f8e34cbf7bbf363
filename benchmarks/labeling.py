"""People answering on the page, over HTTP: how many answers a second it takes, and how long they wait for it.

    python benchmarks/labeling.py [--quick]

Queue, page and Ray Serve's proxy are those of a run, on loopback, once with SQLite and once with PostgreSQL (a server
as Debian sets it up, which waits for its disk at every commit, as SQLite does here). Each labeler looks at an image and
answers, and gets the next two images with the reply, as in the page; after every fifth answer, images are asked for in
a call of their own. In a closed loop labelers answer as soon as they can; at human pace, once a second. New images come
in, batch by batch, as old ones are answered. In the end the database must have every answer that was taken, once.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import sqlalchemy as sa
from measuring import Table, median_and_range, run_alone
from rich.console import Console

from kto_ray.cluster import connected
from kto_ray.config import Cluster, RunConfig, load
from kto_ray.people.access import Signer
from kto_ray.people.address import base_url, database_url
from kto_ray.people.labeler import HumanLabeler
from kto_ray.people.tables import answers
from kto_ray.records import PolicyRef, Prompt, Sample
from kto_ray.samples import Samples
from kto_ray.serving import start_serve
from kto_ray.shapes.world import all_scenes, draw_somewhere
from kto_ray.storage import Storage

LABELERS = (1, 8, 32)
DATABASES = ("SQLite", "PostgreSQL")
OPEN = 192
"""So many images wait for labelers, more or less."""
ROUND, BATCH = 96, 8
HELD = 2
LEASE_EVERY = 5
CALLS = ("lease", "image", "answer")


@dataclass
class Figures:
    """What one crowd came to: answers that were taken, over so many seconds; and each call's seconds."""

    answers: int = 0
    seconds: float = 0.0
    calls: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CALLS})


class Page:
    """A run's labeling, without the run: a queue that does not run dry, a page, and people with badges."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.run = config, Storage(f"{config.runs_folder}/{config.run}")
        self.labeler = HumanLabeler(config, self.run, Console(quiet=True))
        self.tokens: list[str] = []
        self.client = httpx2.AsyncClient(base_url=f"{base_url(config.label.human, self.run)}/", timeout=60)
        self.taken: Counter[tuple[str, str]] = Counter()  # item and verdict, of every answer that got a 200
        self.asked = 0

    async def open(self) -> None:
        await self.labeler.start({})
        signer = Signer(await self.labeler.desk.secret())
        badges = [await self.labeler.desk.badge_of(f"labeler-{number}") for number in range(max(LABELERS))]
        self.tokens = [signer.token(badge) for badge in badges]

    async def close(self) -> None:
        await self.client.aclose()
        await self.labeler.close()

    async def fill(self) -> None:
        """Draw images until enough are open."""
        while self.asked - len(self.taken) < OPEN:
            number, place = divmod(self.asked, ROUND)
            stage = f"round-{number:05}"
            samples = [make_sample(stage, place + offset) for offset in range(BATCH)]
            await self.labeler.submit(Samples.of(samples))
            self.asked += BATCH
            if place + BATCH == ROUND:
                await self.labeler.finish(stage)

    async def play(self, labelers: int, pace_s: float, seconds: float) -> Figures:
        """Let people answer for so long.

        Args:
            pace_s: from one answer of a labeler to the next; 0: as fast as it goes.
        """
        await self.fill()
        figures, began = Figures(), time.perf_counter()
        people = [self._answer(token, pace_s, began + seconds, figures) for token in self.tokens[:labelers]]
        playing = asyncio.gather(*people)
        while not playing.done():
            await asyncio.wait([playing], timeout=0.05)
            await self.fill()
        playing.result()
        figures.seconds = time.perf_counter() - began
        return figures

    async def _answer(self, token: str, pace_s: float, until: float, figures: Figures) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        rng = random.Random(token)

        async def call(name: str, path: str, body: Any = None) -> httpx2.Response:
            began = time.perf_counter()
            response = await self.client.request("GET" if body is None else "POST", path, json=body, headers=headers)
            figures.calls[name].append(time.perf_counter() - began)
            response.raise_for_status()
            return response

        await asyncio.sleep(pace_s * rng.random())  # people do not come all at once
        due = time.perf_counter() + pace_s
        offers: list[Any] = []
        while time.perf_counter() < until:
            if not offers:
                offers = (await call("lease", "api/lease", {"count": HELD})).json()["offers"]
                continue
            await call("image", offers[0]["image"])
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due = max(due + pace_s, time.perf_counter())
            item, verdict = offers[0]["item"], rng.choice(("desirable", "undesirable"))
            count = 0 if len(figures.calls["answer"]) % LEASE_EVERY == 0 else HELD
            said = {"item": item, "verdict": verdict, "seconds": 1.0, "count": count}
            offers = (await call("answer", "api/answer", said)).json()["offers"]
            self.taken[item, verdict] += 1
            figures.answers += 1

    def faults(self) -> int:
        """Answers that were taken and are not in the database, or are there and were not taken, or twice."""
        engine = sa.create_engine(database_url(self.config.label.human, self.run))
        with engine.connect() as connection:
            rows = connection.execute(sa.select(answers.c.item, answers.c.verdict))
            stored = Counter((row.item, row.verdict) for row in rows)
        engine.dispose()
        return ((stored - self.taken) + (self.taken - stored)).total()


def make_sample(stage: str, place: int) -> Sample:
    scenes = all_scenes()
    scene = scenes[place % len(scenes)]
    pixels_HWC = draw_somewhere(scene, np.random.default_rng(place))
    prompt, policy = Prompt(scene.caption, scene.caption), PolicyRef(0, "0" * 64)
    return Sample(f"{stage}-{place:04}", stage, prompt, 0, 0, policy, np.zeros((4, 8, 8), np.float32), pixels_HWC)


def measure(quick: bool) -> Table:
    """Let crowds of each size answer in turn on a page of each database."""
    seconds, repeats = (2.0, 1) if quick else (10.0, 3)
    cases = [(database, size, pace_s) for pace_s in (0.0, 1.0) for size in LABELERS for database in DATABASES]
    with tempfile.TemporaryDirectory() as folder, postgres() as server:
        urls = {"SQLite": "null", "PostgreSQL": server}
        found = asyncio.run(measure_all(folder, urls, cases, seconds, repeats))
    rows = []
    for (database, size, pace_s), repeated in found.items():
        rate = median_and_range([figures.answers / figures.seconds for figures in repeated], "{:.0f}")
        calls = {name: [value for figures in repeated for value in figures.calls[name]] for name in CALLS}
        who = f"{size}, {'human pace' if pace_s else 'closed loop'}, {database}"
        rows.append((who, *rate, *(milliseconds(calls[name]) for name in CALLS)))
    return Table(
        title="People answering over HTTP",
        columns=("labelers", "answers/s", "lowest - highest", *(f"{name}, ms" for name in CALLS)),
        rows=rows,
        note=f"{repeats} repeats of {seconds:.0f} s. Milliseconds of a call: median / 99th percentile (of fewer than "
        "100 calls, the slowest). Every answer that was taken was in the database once.",
    )


Case = tuple[str, int, float]


async def measure_all(
    folder: str, urls: Mapping[str, str], cases: Sequence[Case], seconds: float, repeats: int
) -> dict[Case, list[Figures]]:
    """Raises RuntimeError when an answer is lost or doubled."""
    human = {"port": free_port(), "requests_per_minute": 10**6}
    shared = [f"runs_folder={folder}", *(f"label.human.{name}={value}" for name, value in human.items())]
    configs = {
        name: load("shapes_human", [*shared, f"run={name.lower()}", f"label.human.database={url}"])
        for name, url in urls.items()
    }
    for config in configs.values():
        Path(folder, config.run).mkdir()
    pages = {name: Page(config) for name, config in configs.items()}
    found: dict[Case, list[Figures]] = {case: [] for case in cases}
    with connected(Cluster(address="local")):
        await asyncio.to_thread(start_serve, configs["SQLite"].listens)
        try:
            for page in pages.values():
                await page.open()
                await page.play(2, 0, 1)  # the first calls are slow
            for repeat in range(repeats):
                for case in cases if repeat % 2 else reversed(cases):
                    database, size, pace_s = case
                    found[case].append(await pages[database].play(size, pace_s, seconds))
        finally:
            for page in pages.values():
                await page.close()
        for name, page in pages.items():
            if faults := page.faults():
                raise RuntimeError(f"{name}: {faults} answers lost or doubled")
    return found


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and 99th percentile."""
    if not seconds:
        return "-"
    return f"{1000 * statistics.median(seconds):.0f} / {1000 * np.quantile(seconds, 0.99, method='higher'):.0f}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A server from Debian's package in a folder of its own; gives the URL of its database."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None)
    if programs is None:
        raise SystemExit("this benchmark needs a PostgreSQL server: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # sockets have short paths only
    root: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if root:
        shutil.chown(folder, "postgres", "postgres")
    common: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **root}
    subprocess.run([programs / "initdb", "-D", folder / "data", "--auth=trust", "--username=me"], check=True, **common)
    settings = ["-c", f"unix_socket_directories={folder}", "-c", "listen_addresses="]
    process = subprocess.Popen([programs / "postgres", "-D", folder / "data", *settings], **common)
    try:
        while subprocess.run([programs / "pg_isready", "-h", folder], **common).returncode:
            if process.poll() is not None:
                raise RuntimeError("the PostgreSQL server does not start")
            time.sleep(0.1)
        yield f"postgresql+psycopg://me@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_alone(measure, __doc__)
