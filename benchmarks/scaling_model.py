"""A run on more machines than anybody measured: a discrete-event model, fed with what benchmarks measured.

    python benchmarks/scaling_model.py      rewrites the tables of docs/scaling.md, and its picture

Costs come from the tables of docs/benchmarks.md, so that the model follows them, and those of answers from its text.
First the machine of the benchmarks itself is modelled, where everybody shares two cores, and compared with what was
measured there; then clusters, where replicas, scorers and people's pages have machines of their own and what is left is
what there is one of: the driver's event loop, the actor that owns the queue of answers. Nothing here starts Ray.
"""

import random
import re
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- begin: written by benchmarks/scaling_model.py -->", "<!-- end -->"

Events = Generator[simpy.Event, Any, None]

CORES = 2
"""Of the machine of the benchmarks."""
BATCH = {64: 32, 512: 16}
"""Images of a request there, by their edge."""
IN_FLIGHT = 3
"""Requests that a replica holds (generate.max_ongoing_requests)."""
WRITES_A_BATCH = 3
"""Of a replica: latents, pixels, records (parts.py), where it draws more slowly than it stores."""
S3_WRITES_PER_S = 3500
"""Under one prefix, as S3's guide says; it spreads a prefix that stays busy over more of them, in its own time."""
ANSWER_MS = {"client": 2.0, "proxy": 7.0, "page": 9.0, "queue": 7.0}
"""Processor time of an answer with its image and its share of leases, by who spends it: docs/benchmarks.md, People."""
CALLS = 2
"""An image, and an answer."""
SEED = 0


# -- what was measured ------------------------------------------------------------------------------------------------


def rows_of(document: str, title: str) -> list[list[str]]:
    """The cells of a table of docs/benchmarks.md, without its head. Raises ValueError: there is none of that title."""
    section = re.search(rf"^### {re.escape(title)}\n\n((?:\|.*\n)+)", document, re.MULTILINE)
    if section is None:
        raise ValueError(f"docs/benchmarks.md has no table {title!r}")
    lines = section[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@dataclass(frozen=True)
class Measured:
    """Of "Through one driver": images a second, and the driver's CPU milliseconds an image, by (replicas, edge)."""

    images_per_s: dict[tuple[int, int], float]
    driver_ms: dict[tuple[int, int], float]
    stored_ms: dict[int, float]
    """Of "Storage of a round": milliseconds that a replica stores an image for, by edge."""
    answers_per_s: dict[tuple[int, bool], float]
    """Of "People answering over HTTP", with SQLite, by (labelers, whether at human pace)."""

    @classmethod
    def read(cls, document: str) -> "Measured":
        speed, driver = {}, {}
        for name, images_per_s, cpu_ms, *_ in rows_of(document, "Through one driver"):
            replicas, edge = map(int, name.split(" x "))
            speed[replicas, edge], driver[replicas, edge] = float(images_per_s), float(cpu_ms)
        stored = {}
        for name, _, _, replicas_s, *_ in rows_of(document, "Storage of a round"):
            if found := re.fullmatch(r"(\d+) of (\d+) x \d+, local", name):
                stored[int(found[2])] = 1000 * float(replicas_s) / int(found[1])
        answers = {}
        for name, per_s, *_ in rows_of(document, "People answering over HTTP"):
            labelers, pace, database = (part.strip() for part in name.split(","))
            if database == "SQLite":
                answers[int(labelers), pace == "human pace"] = float(per_s)
        return cls(speed, driver, stored, answers)


@dataclass(frozen=True)
class Costs:
    """CPU milliseconds, taken from what was measured."""

    batch_ms: float
    """Of the driver, for each batch."""
    image_ms: float
    """Of the driver, for each image besides."""
    idle_core: float
    """Cores that a replica takes while it has nothing to do."""

    @classmethod
    def of(cls, measured: Measured) -> "Costs":
        """The driver's from 8 replicas of two sizes of batch, since images of any size are only records to it."""
        small, large = BATCH[512], BATCH[64]
        few, many = measured.driver_ms[8, 512], measured.driver_ms[8, 64]
        batch_ms = (few - many) / (1 / small - 1 / large)
        # What 64 replicas take off the two cores compared with one, all else equal: (2 - 64 u) / (2 - u).
        share = measured.images_per_s[64, 64] / measured.images_per_s[1, 64]
        return cls(batch_ms, many - batch_ms / large, CORES * (1 - share) / (64 - share))

    def driver_s(self, images: int) -> float:
        return (self.batch_ms + self.image_ms * images) / 1000


# -- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """What came of it."""

    images_per_s: float
    driver: float
    """Cores that all drivers' event loops are at work on."""
    idle: float
    """Share of the replicas' time in which they have nothing to draw: what they draw, of what they could."""


def draw(
    replicas: int,
    batch: int,
    draw_s: float,
    driver_s: float,
    *,
    store_s: float = 0.0,
    score_s: float = 0.0,
    drivers: int = 1,
    cores: int | None = None,
    seconds: float = 60.0,
) -> Drawing:
    """Replicas draw, store and hand over, each holding three requests; a driver that has handled one asks for the next.

    Args:
        draw_s, store_s, driver_s, score_s: seconds of a batch; a replica draws one while it stores another.
        drivers: event loops that share the replicas.
        cores: everybody shares so many; None: all have their own.
    """
    env, dice = simpy.Environment(), random.Random(SEED)
    loops = [simpy.Resource(env) for _ in range(drivers)]
    shared = simpy.Resource(env, cores) if cores else None
    warm, done = seconds / 4, 0

    def work(duration: float) -> Events:
        if shared is None or not duration:
            yield env.timeout(duration)
            return
        with shared.request() as core:
            yield core
            yield env.timeout(duration)

    def hand_over(loop: simpy.Resource, storing: simpy.Resource, held: simpy.Container) -> Events:
        nonlocal done
        if store_s:
            with storing.request() as turn:
                yield turn
                yield from work(store_s)
        with loop.request() as turn:
            yield turn
            yield from work(driver_s)
        held.put(1)
        if score_s:
            yield from work(score_s)
        done += batch * (env.now > warm)

    def replica(loop: simpy.Resource) -> Events:
        held, storing = simpy.Container(env, IN_FLIGHT, IN_FLIGHT), simpy.Resource(env)
        yield env.timeout(dice.uniform(0, draw_s))
        while True:
            yield held.get(1)
            yield env.timeout(draw_s)
            env.process(hand_over(loop, storing, held))

    for place in range(replicas):
        env.process(replica(loops[place % drivers]))
    env.run(seconds)
    images_per_s = done / (seconds - warm)
    could = replicas * batch / draw_s if draw_s else float("inf")
    return Drawing(images_per_s, images_per_s / batch * driver_s, max(0.0, 1 - images_per_s / could))


def on_two_cores(measured: Measured, costs: Costs, replicas: int, edge: int) -> float:
    """Images a second on the machine of the benchmarks, where nobody draws and everybody shares the cores.

    What all of them do for an image, besides the driver, is taken from the row of 8 replicas; replicas that idle slow
    everybody down.
    """
    driver_ms, batch = measured.driver_ms[8, edge], BATCH[edge]
    all_ms = 1000 * (CORES - 8 * costs.idle_core) / measured.images_per_s[8, edge]
    store_ms = min(measured.stored_ms[edge], all_ms - driver_ms)
    slower = CORES / (CORES - replicas * costs.idle_core) * batch / 1000
    parts = {"store_s": store_ms * slower, "score_s": (all_ms - driver_ms - store_ms) * slower}
    return draw(replicas, batch, 0.0, driver_ms * slower, cores=CORES, **parts).images_per_s


# -- people -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answering:
    """What came of it."""

    answers_per_s: float
    typical_ms: float
    slow_ms: float
    """Of an answer's call: median, and 99th percentile."""


def answer(
    labelers: int, think_s: float, *, pages: int = 1, queues: int = 1, cores: int | None = None, seconds: float = 60.0
) -> Answering:
    """People get an image, think and answer; a call goes through a proxy, a page's replica and the queue's actor.

    Args:
        think_s: on average; 0: a closed loop.
        pages: replicas of the page, and proxies.
        queues: actors, each with its share of the images.
        cores: everybody shares so many; None: all have their own.
    """
    env, dice, calls_ms, answered = simpy.Environment(), random.Random(SEED), list[float](), 0
    shared = simpy.Resource(env, cores) if cores else None
    stations = {
        "proxy": [simpy.Resource(env) for _ in range(pages)],
        "page": [simpy.Resource(env) for _ in range(pages)],
        "queue": [simpy.Resource(env) for _ in range(queues)],
    }
    warm = seconds / 4

    def work(name: str) -> Events:
        duration = ANSWER_MS[name] / CALLS / 1000
        if shared is None:
            yield env.timeout(duration)
            return
        with shared.request() as core:
            yield core
            yield env.timeout(duration)

    def call() -> Events:
        yield from work("client")
        for name, servers in stations.items():
            with dice.choice(servers).request() as turn:
                yield turn
                yield from work(name)

    def labeler() -> Events:
        nonlocal answered
        yield env.timeout(dice.uniform(0, think_s))
        while True:
            yield from call()
            if think_s:
                yield env.timeout(dice.expovariate(1 / think_s))
            began = env.now
            yield from call()
            if env.now > warm:
                answered += 1
                calls_ms.append(1000 * (env.now - began))

    for _ in range(labelers):
        env.process(labeler())
    env.run(seconds)
    percentiles = statistics.quantiles(calls_ms, n=100)
    return Answering(answered / (seconds - warm), percentiles[49], percentiles[98])


# -- the document -----------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, rule, *rows)]
    return "\n".join([f"### {title}", "", *lines, "", note])


def compared(measured: Measured, costs: Costs) -> str:
    rows: list[Sequence[object]] = []

    def add(name: str, was: float, model: float, used: bool) -> None:
        rows.append((name, f"{was:.0f}", f"{model:.0f}", "taken from it" if used else f"{model / was - 1:+.0%}"))

    for (replicas, edge), was in measured.images_per_s.items():
        used = replicas == 8 or (replicas, edge) == (64, 64)
        add(f"{replicas} x {edge}, images/s", was, on_two_cores(measured, costs, replicas, edge), used)
    for (labelers, human), was in measured.answers_per_s.items():
        pace = "at human pace" if human else "in a closed loop"
        model = answer(labelers, 1.0 if human else 0.0, cores=CORES).answers_per_s
        add(f"{labelers} labeler{'s' * (labelers > 1)} {pace}, answers/s", was, model, False)
    return table(
        "The model and what was measured, on two cores",
        ("", "measured", "model", "off by"),
        rows,
        "Rows from which the model takes a cost are no check of it.",
    )


REPLICAS = 64, 256, 1_000, 4_000, 10_000
BATCHES = 8, 32, 64


def one_driver(costs: Costs, images_per_s: float) -> str:
    rows = []
    for replicas in REPLICAS:
        cells: list[object] = [f"{replicas:,}", f"{replicas * images_per_s:,.0f}"]
        for batch in BATCHES:
            found = draw(replicas, batch, batch / images_per_s, costs.driver_s(batch), seconds=8 * batch / images_per_s)
            cells.append(f"{found.images_per_s:,.0f} ({found.idle:.0%})")
        rows.append(cells)
    return table(
        f"One driver, replicas that draw {images_per_s:g} images a second",
        ("replicas", "they could draw", *(f"batches of {batch}" for batch in BATCHES)),
        rows,
        "Images a second, and in brackets the share of the replicas' time that is idle.",
    )


def many_drivers(costs: Costs) -> str:
    rows = []
    for drivers in (1, 4, 8, 16, 32):
        cells: list[object] = [drivers]
        for batch in BATCHES:
            found = draw(10_000, batch, batch / 2, costs.driver_s(batch), drivers=drivers, seconds=4 * batch)
            cells.append(f"{found.images_per_s:,.0f} ({found.idle:.0%})")
        rows.append(cells)
    return table(
        "10,000 replicas of 2 images a second, shared by several event loops",
        ("event loops", *(f"batches of {batch}" for batch in BATCHES)),
        rows,
        "As above. The project has one event loop; this is what it would take.",
    )


def people() -> str:
    rows = []
    for labelers, pages, queues in (
        *((32, 1, 1), (100, 1, 1), (100, 2, 1), (130, 2, 1), (300, 4, 1), (300, 4, 4)),
        *((1_000, 10, 1), (1_000, 10, 8), (1_000, 16, 12)),
    ):
        found = answer(labelers, 1.0, pages=pages, queues=queues, seconds=40.0)
        rows.append(
            (
                f"{labelers:,}",
                pages,
                queues,
                f"{found.answers_per_s:.0f}",
                f"{found.typical_ms:,.0f} / {found.slow_ms:,.0f}",
            )
        )
    return table(
        "People at one answer a second each, on machines of their own",
        ("labelers", "page replicas and proxies", "queue actors", "answers/s", "an answer, ms"),
        rows,
        "Median / 99th percentile. More than one queue actor is not there yet.",
    )


def write_requests(costs: Costs) -> str:
    rows = []
    for batch in BATCHES:
        drivers = 20_000 / batch * costs.driver_s(batch)
        writes = 20_000 / batch * WRITES_A_BATCH
        rows.append(
            (
                batch,
                f"{batch / costs.driver_s(batch):,.0f}",
                f"{drivers:.0f}",
                f"{writes:,.0f}",
                f"{writes / S3_WRITES_PER_S:.1f}",
            )
        )
    return table(
        "What 20,000 images a second ask for",
        (
            "batches of",
            "images/s of one driver",
            "drivers' cores",
            "writes/s of replicas",
            "of what S3 says of a prefix",
        ),
        rows,
        "10,000 replicas of 2 images a second, by multiplication.",
    )


def picture(costs: Costs, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    counts = [16, 64, 128, 256, 512, 1_000, 2_000, 4_000, 10_000]
    left.plot(counts, [2 * count for count in counts], "--", color="gray", label="no ceiling")
    for batch in BATCHES:
        found = [draw(n, batch, batch / 2, costs.driver_s(batch), seconds=4 * batch).images_per_s for n in counts]
        left.plot(counts, found, marker="o", label=f"batches of {batch}")
    left.set(xscale="log", yscale="log", xlabel="replicas of 2 images a second", ylabel="images a second, one driver")
    people_counts = [8, 32, 64, 100, 120, 130, 140, 150, 200, 300]
    for queues in (1, 4):
        slow = [answer(n, 1.0, pages=4, queues=queues, seconds=40.0).slow_ms for n in people_counts]
        right.plot(people_counts, slow, marker="o", label=f"{queues} queue actor{'s' * (queues > 1)}")
    right.set(xlabel="labelers, one answer a second each", ylabel="99th percentile of an answer, ms", yscale="log")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def between_markers(document: str, body: str) -> str:
    """The document with `body` between its markers. Raises ValueError when they are not there."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/scaling.md needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def main() -> None:
    measured = Measured.read((DOCS / "benchmarks.md").read_text())
    costs = Costs.of(measured)
    found = (
        f"Taken from the tables: a batch costs the driver {costs.batch_ms:.1f} ms and each of its images "
        f"{costs.image_ms:.2f} ms more; a replica that idles takes {costs.idle_core:.3f} of a core."
    )
    sections: list[Callable[[], str]] = [
        lambda: compared(measured, costs),
        lambda: one_driver(costs, 2.0),
        lambda: one_driver(costs, 0.2),
        lambda: many_drivers(costs),
        lambda: write_requests(costs),
        people,
    ]
    texts = [found]
    for section in sections:
        texts.append(section())
        print(texts[-1], end="\n\n", flush=True)
    picture(costs, DOCS / "scaling.png")
    document = DOCS / "scaling.md"
    document.write_text(between_markers(document.read_text(), "\n\n".join(texts)))


if __name__ == "__main__":
    main()
