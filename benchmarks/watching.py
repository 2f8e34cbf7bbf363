"""What it takes to watch a run of 5,000 images: seconds of a page, and what is asked for most.

    python benchmarks/watching.py [--quick]

A run's folder is written as a run writes it (tests/watched.py), and pages are asked for in this process, as a browser
would, without a network in between. First look: the first of all, which reads the folder; the others find it read.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measuring import Table, run_alone
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent.parent))

from kto_ray.config import WatchPage
from kto_ray.people.access import Signer
from kto_ray.people.people import Badge
from kto_ray.people.web.entrance import Entrance
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.web.app import create_app
from tests.watched import WatchedFolder

ROUNDS = 10
"""One more image a round than a page has would do; this many is what small runs have."""


def measure(quick: bool) -> Table:
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


def figures(seconds: Sequence[float]) -> tuple[str, str]:
    return f"{1000 * statistics.median(seconds):.1f}", f"{1000 * statistics.quantiles(seconds, n=20)[-1]:.1f}"


if __name__ == "__main__":
    run_alone(measure, __doc__)
