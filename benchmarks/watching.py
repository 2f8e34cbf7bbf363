"""What it takes to watch a run: seconds of a page with 5,000 images, and what a run loses that is looked at.

    python benchmarks/watching.py [--quick]

Pages: a run's folder is written as a run writes it (tests/watched.py), and they are asked for in this process, as a
browser would, without a network in between. First look: the first of all, which reads the folder; the others find it
read.

Rounds: one run of the embedded world with `watch.port`. While every other round is made, the overview and the grid are
open: both are asked for every three seconds, as their script does, and with them each small picture that is new.
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx2
import psutil
from measuring import Table, median_and_range, ratios, run_alone
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent.parent))

from kto_ray.config import WatchPage
from kto_ray.people.access import Signer
from kto_ray.people.people import Badge
from kto_ray.people.web.entrance import Entrance
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.web.app import create_app
from tests.ports import free_ports
from tests.watched import WatchedFolder

ROOT = Path(__file__).parent.parent
ROUNDS = 10
"""One more image a round than a page has would do; this many is what small runs have."""
EVERY_S = 3.0
"""An open page asks so often, see `live.js`."""


def measure(quick: bool) -> list[Table]:
    return [pages(quick), watched_rounds(quick)]


def pages(quick: bool) -> Table:
    """Ask for every kind of page again and again."""
    images, repeats = (100, 5) if quick else (500, 100)
    with tempfile.TemporaryDirectory() as folder:
        written = WatchedFolder(Path(folder) / "run", rounds=ROUNDS, images=images).make()
        run, signer = WatchedRun(written.uri), Signer("secret")
        token = signer.token(Badge("benchmark", time.time() + 1e6))
        entrance = Entrance(signer, WatchPage(requests_per_minute=10**9), {"operator": "benchmark"})
        client = TestClient(create_app({"run": run}, entrance), headers={"Authorization": f"Bearer {token}"})
        ids = [image.record.id for image in run.album(run.now().keys["round"][-1]).images]
        run = WatchedRun(written.uri)
        client = TestClient(create_app({"run": run}, entrance), headers={"Authorization": f"Bearer {token}"})
        sides = {
            "overview": [""] * repeats,
            "grid": [f"images?page={1 + n % (ROUNDS * images // 120)}" for n in range(repeats)],
            "grid, filtered": [f"images?prompt=red&low=0.{n % 10}&order=highest" for n in range(repeats)],
            "an image": [f"images/round-{ROUNDS - 1}/{ids[n % len(ids)]}?order=highest" for n in range(repeats)],
            "timeline": ["timeline"] * repeats,
            "a thumbnail, made": [f"thumbnails/round-{ROUNDS - 1}/{id_}.webp" for id_ in ids[:repeats]],
            "a thumbnail, kept": [f"thumbnails/round-{ROUNDS - 1}/{id_}.webp" for id_ in ids[:repeats]],
        }
        rows = []
        for name, addresses in sides.items():
            seconds = []
            for address in addresses:
                began = time.perf_counter()
                response = client.get(f"/runs/run/{address}")
                seconds.append(time.perf_counter() - began)
                assert response.status_code == 200, response.text
            rows.append((name, *figures(seconds[1:]), f"{1000 * seconds[0]:.0f}"))
    return Table(
        title="The watch page",
        columns=("page", "median, ms", "p95, ms", "first look, ms"),
        rows=rows,
        note=f"{ROUNDS * images:,} images in {ROUNDS} rounds, {repeats} requests of each kind.",
    )


def watched_rounds(quick: bool) -> Table:
    """Compare each round that is watched with those before and after it, which are not."""
    rounds, images = (7, 48) if quick else (16, 288)
    with tempfile.TemporaryDirectory() as folder:
        log, metrics = Path(folder, "log"), Path(folder, "run", "metrics.jsonl")
        words = [f"runs_folder={folder}", "run=run", f"watch.port={free_ports(1)[0]}", f"rounds={rounds}"]
        words += [f"generate.images_per_round={images}", f"evaluate.every={rounds}", "evaluate.max_prompts=4"]
        with log.open("w") as output:
            command = [sys.executable, "jobs/online_kto.py", "--recipe", "shapes_demo", *words]
            run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        browser, spent, asked_at = None, dict[int, tuple[float, float]](), 0.0
        while run.poll() is None:
            done = sum(row["kind"] == "round" for row in rows_of(metrics))
            if done not in spent:
                spent[done] = processor_seconds(run.pid)
            if done % 2 and time.monotonic() - asked_at > EVERY_S:
                asked_at = time.monotonic()
                browser = browser or OpenPages(re.findall(r"watch the run: (\S+)", log.read_text())[0])
                browser.refresh()
            time.sleep(0.2)
        assert run.returncode == 0, log.read_text()
        seconds = [row["seconds/round"] for row in rows_of(metrics) if row["kind"] == "round"]
    watched = range(3, rounds - 2, 2)  # the first rounds are those of a cold start, the last one has an evaluation
    everything = [spent[number + 1][0] - spent[number][0] for number in range(rounds - 1)]
    by_pages = [spent[number + 1][1] - spent[number][1] for number in range(rounds - 1)]

    def row(what: str, each: Sequence[float]) -> tuple[str, str, str, str, str]:
        ours = [each[number] for number in watched]
        others = [(each[number - 1] + each[number + 1]) / 2 for number in watched]
        texts = (f"{statistics.median(side):.2f}" for side in (ours, others))
        return (what, *texts, *median_and_range(ratios(ours, others)))

    assert browser
    share = statistics.median(by_pages[number] / everything[number] for number in watched)
    return Table(
        title="A run that is watched",
        columns=("seconds of a round", "watched", "unwatched", "ratio", "lowest - highest"),
        rows=[row("wall clock", seconds), row("processor, all of the run", everything)],
        note=(
            f"{images} images a round, {len(watched)} watched rounds between others; {browser.asked:,} requests, which "
            f"took {100 * share:.1f} % of the run's processor time."
        ),
    )


def processor_seconds(pid: int) -> tuple[float, float]:
    """Of all processes of a run so far, and of the one that serves its pages."""
    all_of_them, pages = 0.0, 0.0
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            used = process.cpu_times()
            all_of_them += used.user + used.system
            pages += used.user + used.system if "WatchReplica" in " ".join(process.cmdline()) else 0
    return all_of_them, pages


def rows_of(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


class OpenPages:
    """Overview and grid in a browser's tabs."""

    def __init__(self, link: str) -> None:
        self.client = httpx2.Client(follow_redirects=True, timeout=60)
        self.overview = str(self.client.get(link).raise_for_status().url)
        self.tags: dict[str, str] = {}
        self.pictures: set[str] = set()
        self.asked = 1

    def refresh(self) -> None:
        """Ask for what is new."""
        for path in ("", "images"):
            address = f"{self.overview}{path}"
            response = self.client.get(address, headers={"If-None-Match": self.tags.get(path, "")})
            self.asked += 1
            if response.status_code == HTTPStatus.NOT_MODIFIED:
                continue
            self.tags[path] = response.raise_for_status().headers["ETag"]
            new = {urljoin(address, source) for source in re.findall(r'src="([^"]+\.webp)"', response.text)}
            for picture in sorted(new - self.pictures):
                self.client.get(picture).raise_for_status()
            self.asked += len(new - self.pictures)
            self.pictures |= new


def figures(seconds: Sequence[float]) -> tuple[str, str]:
    return f"{1000 * statistics.median(seconds):.1f}", f"{1000 * statistics.quantiles(seconds, n=20)[-1]:.1f}"


if __name__ == "__main__":
    run_alone(measure, __doc__)
