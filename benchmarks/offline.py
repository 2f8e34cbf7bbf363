"""Labelled images prepared and trained on from the disk: beside the autoencoder alone, and beside images in memory.

    python benchmarks/offline.py [--quick]

Sets of JPEG files in Parquet rows: pictures of the embedded world, each shifted otherwise, so that none is there twice.

- Preparing is the pipeline of a run, on a Ray of this machine: list, decode, encode, seal. *Bare* is a loop in one
  process that decodes the same files and encodes them with the same autoencoder, batch size and threads, before and
  after: nothing is written, nothing hashed.
- Training is the same learner over intervals of the prepared set, whose shards the kernel has not in memory, over as
  many steps on latents in memory, and as the authors' released script takes them (`kto_step.py`).
- Memory is what each process holds at its peak, for a small set and for the whole one: the driver, the encoder, the
  other tasks of Ray Data, and a process that trains. What processes share, as Ray's object store, counts for each.
"""

import io
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from kto_step import ReleasedLike, make_round
from measuring import Table, in_a_process, median_and_range, ratios, run_alone, threads
from measuring import interleaved as taking_turns
from PIL import Image
from rich.console import Console

from kto_ray.cluster import connected
from kto_ray.config import RunConfig, load
from kto_ray.data.sources import source_of
from kto_ray.diffusion import source
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.loading import load_family
from kto_ray.offline.decoding import decode
from kto_ray.offline.encoding import encoding_of
from kto_ray.offline.preparing import Preparing, prepared_folder
from kto_ray.prepared import PreparedSet
from kto_ray.shapes.world import IMAGE_SIZE, all_scenes, draw_somewhere
from kto_ray.storage import Storage
from kto_ray.train.streaming import Stream
from kto_ray.train.worker import build_learner

SETS = {64: (5_000, 100_000), 512: (100, 500)}
"""Numbers of images, of a small set and of the whole one, by their edge."""
QUICK = {64: (200, 400), 512: (8, 16)}
SHIFTS = 16
"""Pixels, in either direction: so many times as many different pictures as were drawn, squared."""
FILE_ROWS = 10_000
ENCODED_AT_ONCE = {64: 64, 512: 4}
STEPS = {64: (72, 6), 512: (4, 2)}
"""Batch, and optimizer steps of an interval."""
WORKERS = {"encoder": "EncodeShard", "task": "ray::"}
"""How Ray names processes; the first that fits."""


def measure(quick: bool) -> list[Table]:
    sets, repeats = QUICK if quick else SETS, 2 if quick else 3
    prepared, trained, held = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for pixels, counts in sets.items():
            for images in counts:
                here: dict[str, Any] = {"folder": f"{scratch}/{pixels}-{images}", "pixels": pixels}
                write_pictures(Path(here["folder"]) / "pictures", pixels, images)
                row = compared(here, images)
                whole = images == counts[-1]
                taken = in_a_process(__file__, what="train", **here, repeats=repeats if whole else 0)
                prepared.append(row)
                held.append((f"{images:,} of {pixels} x {pixels}", *in_mb(row["held"] | {"trainer": taken["held"]})))
                trained += trained_rows(pixels, taken["seconds"]) if whole else []
                shutil.rmtree(here["folder"])
    return [
        Table(
            "Preparing labelled images",
            (
                *("images", "encoding / bare", "lowest - highest", "images/s: bare", "encoding", "all"),
                *("CPU ms an image: bare", "encoder", "all else"),
            ),
            [prepared_row(row) for row in prepared],
            "Encoding: from the first task to the last shard on disk, with the encoder's start. All: also looking at "
            "every file first, planning and sealing. The range is that of the bare loops before and after. CPU: of "
            "all cores; all else is driver and tasks, with their start.",
        ),
        Table(
            "Steps on a prepared set",
            ("steps", "ratio", "lowest - highest", "seconds a step"),
            trained,
            f"Speed, as the second's seconds over the first's. Median of {repeats} repeats of "
            + " and ".join(f"{steps} steps of {batch} images at {side}" for side, (batch, steps) in STEPS.items())
            + ", with adapters.",
        ),
        Table(
            "Memory of preparing and training",
            ("set", *(f"{name}, MB" for name in ("driver", "encoder", "tasks", "trainer"))),
            held,
            "At the peak; each worker by itself, the largest. Libraries are some 500 MB of each.",
        ),
    ]


def compared(here: dict[str, Any], images: int) -> dict[str, Any]:
    """Preparing, between two bare loops over a share of the pictures."""
    some = max(1, images // 20)
    before = in_a_process(__file__, what="bare", **here, images=some)
    row = in_a_process(__file__, what="prepare", **here)
    after = in_a_process(__file__, what="bare", **here, images=some)
    bare = {
        "bare": [one["images_per_s"] for one in (before, after)],
        "bare_ms": [one["cpu_ms"] for one in (before, after)],
    }
    return row | {"pixels": here["pixels"], **bare}


def prepared_row(row: dict[str, Any]) -> tuple[str, ...]:
    encoding, whole, bare = row["images"] / row["encoding_s"], row["images"] / row["seconds"], mean(row["bare"])
    encoder_s = row["cpu_s"].pop("encoder")
    cpu_ms = [1000 * seconds / row["images"] for seconds in (encoder_s, sum(row["cpu_s"].values()))]
    return (
        f"{row['images']:,} of {row['pixels']} x {row['pixels']}",
        f"{encoding / bare:.2f}",
        f"{encoding / max(row['bare']):.2f} - {encoding / min(row['bare']):.2f}",
        *(f"{rate:.0f}" for rate in (bare, encoding, whole)),
        *(f"{ms:.2f}" for ms in (mean(row["bare_ms"]), *cpu_ms)),
    )


def trained_rows(pixels: int, seconds: dict[str, list[float]]) -> list[tuple[str, ...]]:
    steps = STEPS[pixels][1]

    def row(above: str, below: str) -> tuple[str, ...]:
        takes = [median_and_range([one / steps for one in seconds[name]], "{:.3f}")[0] for name in (above, below)]
        quotients = ratios(seconds[below], seconds[above])
        return f"{pixels} x {pixels}: {above} / {below}", *median_and_range(quotients), " / ".join(takes)

    return [row("from shards", "from memory"), row("from shards", "released-like")]


def in_mb(held: dict[str, float]) -> list[str]:
    return [f"{held[name] / 1e6:.0f}" for name in ("driver", "encoder", "task", "trainer")]


# -- pictures ---------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, pixels: int, images: int) -> None:
    """Rows of prompt, image and label, in files of `FILE_ROWS`; no two images are alike."""
    folder.mkdir(parents=True)
    rng, drawn = np.random.default_rng(0), -(-images // SHIFTS**2)
    scenes = [all_scenes()[number] for number in rng.choice(len(all_scenes()), drawn)]
    pictures = [draw_somewhere(scene, rng) for scene in scenes]
    for start in range(0, images, FILE_ROWS):
        numbers = range(start, min(start + FILE_ROWS, images))
        table = {
            "prompt": [scenes[number % drawn].caption for number in numbers],
            "image": [jpeg(pictures[number % drawn], number // drawn, pixels) for number in numbers],
            "label": rng.random(len(numbers)) < 0.5,
        }
        pq.write_table(pa.table(table), folder / f"{start:07}.parquet", row_group_size=1000)


def jpeg(picture_HWC: np.ndarray[Any, Any], shift: int, pixels: int) -> bytes:
    shifted_HWC = np.roll(picture_HWC, divmod(shift, SHIFTS), (0, 1))
    times, file = pixels // IMAGE_SIZE, io.BytesIO()
    Image.fromarray(shifted_HWC.repeat(times, 0).repeat(times, 1)).save(file, "jpeg", quality=90)
    return file.getvalue()


def config_of(folder: str, pixels: int, *overrides: str) -> RunConfig:
    resources = f"data.prepare.resources={{num_cpus: 1, threads: {threads()}}}"
    size = (f"generate.height={pixels}", f"generate.width={pixels}")
    data = (f"data.sources={folder}/pictures", f"data.prepare.batch_size={ENCODED_AT_ONCE[pixels]}", resources)
    return load("shapes_offline", [*data, *size, f"runs_folder={folder}/runs", *overrides])


# -- what runs in a process of its own --------------------------------------------------------------------------------


def bare(folder: str, pixels: int, images: int) -> dict[str, Any]:
    """The autoencoder over the first pictures, as the files lie there."""
    config = config_of(folder, pixels)
    assert config.data is not None
    prepare, device = config.data.prepare, torch.device("cpu")
    family = load_family(source.resolve(config.model), config.model, device, torch.float32, parts="autoencoder")

    def encode(files: list[bytes]) -> None:
        pixels_BHWC = np.stack([decode(file, pixels, pixels, prepare.background) for file in files])
        with torch.inference_mode():
            family.encode(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1, None)

    tables = source_of(config.data).tables()
    files = itertools.islice((file for table in tables for file in table["image"].to_pylist()), images)
    batches = list(iter(lambda: list(itertools.islice(files, prepare.batch_size)), []))
    encode(batches[0])  # the first one is slower
    began, before = time.perf_counter(), time.process_time()
    for batch in batches:
        encode(batch)
    cpu_ms = 1000 * (time.process_time() - before) / images
    return {"images_per_s": images / (time.perf_counter() - began), "cpu_ms": cpu_ms}


def prepare(folder: str, pixels: int) -> dict[str, Any]:
    config = config_of(folder, pixels)
    assert config.data is not None
    model = source.resolve(config.model)
    family = family_of(model, config.model)
    autoencoder = source.component_digests(model, config.model)["vae"]
    multiple = family.geometry_of(model).multiple
    encoding = encoding_of(config, (pixels, pixels), multiple, autoencoder, family.__name__)
    kept = prepared_folder(config) / encoding.key
    os.environ.update(RAY_worker_niceness="0")  # the bare loop yields to nobody either
    with connected(config.cluster), watched() as found:
        began = time.perf_counter()
        preparing = Preparing(config, source_of(config.data), encoding, [], kept, Console(stderr=True))
        prepared = preparing.prepare()
        seconds = time.perf_counter() - began
    Storage(folder).write_json("set.json", {"folder": kept.uri, "key": prepared.key})
    facts = prepared.manifest
    return {"images": facts["encoded"], "seconds": seconds, "encoding_s": facts["seconds/encode"], **found}


@contextmanager
def watched() -> Iterator[dict[str, dict[str, float]]]:
    """By role, what one process holds at most, in bytes, as "held"; and seconds of processor time of all, "cpu_s".

    The roles are those of `WORKERS`, Ray's workers under this process, and the driver, itself.
    """
    roles = ("driver", *WORKERS)
    found, seconds = {"held": dict.fromkeys(roles, 0.0), "cpu_s": dict.fromkeys(roles, 0.0)}, dict[int, float]()
    driver, done = psutil.Process(), threading.Event()
    before = spent(driver)

    def look() -> None:
        for process in (driver, *driver.children(recursive=True)):
            try:
                title, resident, now = " ".join(process.cmdline()), process.memory_info().rss, spent(process)
            except psutil.Error:
                continue
            role = next((role for role, name in WORKERS.items() if title.startswith("ray::") and name in title), None)
            if role := "driver" if process == driver else role:
                found["held"][role] = max(found["held"][role], resident)
                found["cpu_s"][role] += now - seconds.get(process.pid, before if process == driver else 0.0)
                seconds[process.pid] = now

    def keep_looking() -> None:
        while not done.wait(0.5):
            look()

    watcher = threading.Thread(target=keep_looking)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def train(folder: str, pixels: int, repeats: int) -> dict[str, Any]:
    """Seconds of each contender; without repeats, only what an interval from shards takes in memory."""
    batch, steps = STEPS[pixels]
    # Timed steps must not carry the weights to where arithmetic is slower or faster.
    small = ("train.learning_rate=1e-6", f"train.global_batch={batch}", f"train.micro_batch={batch}", "train.epochs=1")
    config = config_of(
        folder, pixels, *small, f"data.stream.steps={steps}", f"generate.images_per_round={batch * steps}"
    )
    assert config.data is not None
    found = Storage(folder).read_json("set.json")
    prepared = PreparedSet(Storage(found["folder"]), found["key"])
    stream = Stream(prepared, config.train, config.data.stream, config.seed)
    learner, intervals = build_learner(config), itertools.count()

    def from_shards() -> None:
        forget(prepared)
        learner.train_round(stream.interval(next(intervals)))

    from_shards()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before what the others hold
    if not repeats:
        return {"held": held}
    pixels_NHWC, data = make_round(learner.family, batch * steps, pixels)
    released = ReleasedLike(build_learner(config), pixels_NHWC, data)
    contenders = {
        "from shards": from_shards,
        "from memory": lambda: learner.train_round(data),
        "released-like": lambda: released.train_round(steps),
    }
    return {"seconds": taking_turns(contenders, repeats), "held": held}


def forget(prepared: PreparedSet) -> None:
    """Have the kernel read latents from the disk again."""
    local = prepared.folder.local
    assert local is not None
    for file in (local / "latents").iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        torch.set_num_threads(threads())
        arguments = json.loads(sys.argv[2])
        parts: dict[str, Callable[..., dict[str, Any]]] = {"bare": bare, "prepare": prepare, "train": train}
        print(json.dumps(parts[arguments.pop("what")](**arguments)))
    else:
        run_alone(measure, __doc__)
