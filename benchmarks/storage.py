"""What a round costs in storage: bytes and seconds, beside the bytes that must move.

    python benchmarks/storage.py [--quick]

Of a round of ready-made samples: what replicas write, what the driver writes and seals with scores of two scorers, and
what train workers read of it, 1 and 4 of them at the same time, each its own share. That must move: pixels and latents
once, and the latents once more, to whoever trains on them. On a local disk, and on an S3 server of this machine, which
shares its cores. And what a run reads before it goes on, when it is continued in round 200.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from measuring import Table, in_a_process, run_alone

from kto_ray.parts import PART_SIZE, write_part
from kto_ray.pictures import look
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest, Score, Verdict
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.train.batches import StoredLatents

BASE = PolicyRef(0, "0" * 64)
SCORERS = ("one", "other")
ROUNDS = 200


def measure(quick: bool) -> list[Table]:
    sizes = ((64, 512), (512, 128)) if quick else ((64, 512), (512, 512), (1024, 128))
    places = ("local", "s3")
    rows = [
        in_a_process(__file__, where=where, pixels=pixels, images=images)
        for pixels, images in sizes
        for where in places
    ]
    resumed = [in_a_process(__file__, where=where, resume=10 if quick else ROUNDS) for where in places]
    return [
        Table(
            "Storage of a round",
            (
                "images, storage",
                "MB that must move",
                "bytes",
                "replicas, s",
                "driver, s",
                "1 reader, s",
                "4 readers, s",
            ),
            [
                (
                    f"{row['images']} of {row['pixels']} x {row['pixels']}, {row['where']}",
                    f"{row['must_mb']:.0f}",
                    f"{row['ratio']:.2f}x, {row['ratio_4']:.2f}x",
                    *(f"{row[name]:.2f}" for name in ("replicas", "driver", "readers_1", "readers_4")),
                )
                for row in rows
            ],
            "Bytes: written and read, by those that must move, with 1 and with 4 readers. Replicas: seconds of all "
            "together, in one thread. Readers: until the last has what it trains on.",
        ),
        Table(
            "Going on in a later round",
            ("storage", "rounds before", "seconds", "MB read", "files read"),
            [
                (row["where"], str(row["rounds"]), f"{row['seconds']:.2f}", f"{row['mb']:.1f}", str(row["files"]))
                for row in resumed
            ],
            "Rounds of 512 images; the last one is open, and half of its 512 x 512 images are drawn. That processes "
            "start anew is not counted.",
        ),
    ]


def one(where: str, pixels: int = 64, images: int = 512, resume: int = 0) -> dict[str, Any]:
    with ExitStack() as stack:
        run = Storage(_folder(where, stack))
        return {"where": where} | (_resume(run, resume) if resume else _round(run, pixels, images))


def _folder(where: str, stack: ExitStack) -> str:
    if where == "local":
        return stack.enter_context(tempfile.TemporaryDirectory())
    import logging
    import os

    from tests.s3 import make_bucket, s3_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    environment = stack.enter_context(s3_server())
    os.environ.update(environment)
    return make_bucket(environment, "bench")


def _samples(stage: str, pixels: int, images: int) -> list[Sample]:
    """Smooth pictures with some noise; 16 different ones."""
    rng = np.random.default_rng(0)
    ramp_HWC = np.linspace(0, 200, pixels * pixels * 3).reshape(pixels, pixels, 3)
    pictures = [np.clip(ramp_HWC + rng.normal(0, 6, ramp_HWC.shape), 0, 255).astype(np.uint8) for _ in range(16)]
    looks = [look(picture_HWC) for picture_HWC in pictures]
    requests = [SampleRequest.make(0, stage, Prompt(f"p{place}", f"prompt {place}"), 0) for place in range(images)]
    return [
        Sample(
            *(r.id, r.stage, r.prompt, r.index, r.seed, BASE),
            latents_CHW=rng.normal(size=(4, pixels // 8, pixels // 8)).astype(np.float32),
            pixels_HWC=pictures[place % 16],
            look=looks[place % 16],
        )
        for place, r in enumerate(requests)
    ]


def _scores(samples: Sequence[Sample]) -> list[Score]:
    return [Score(sample.id, name, "1", 0.5) for sample in samples for name in SCORERS]


def _verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    return [
        Verdict(sample.id, "desirable" if place % 2 else "undesirable", "threshold", "every other one")
        for place, sample in enumerate(samples)
    ]


def _round(run: Storage, pixels: int, images: int) -> dict[str, Any]:
    from tests.counting import counted

    store, size = RoundStore(run), 16
    samples = _samples(store.stage(0), pixels, images)
    round_, seconds = store.round(0), {}
    with counted() as made:
        began = time.perf_counter()
        parts = [write_part(round_.storage, samples[start : start + size]) for start in range(0, images, size)]
        seconds["replicas"] = time.perf_counter() - began
        began = time.perf_counter()
        for start, records in zip(range(0, images, size), parts, strict=True):
            round_.know_samples(records)
            round_.add_scores(_scores(samples[start : start + size]))
        round_.add_verdicts(_verdicts(samples))
        round_.seal()
        round_.tidy()
        seconds["driver"] = time.perf_counter() - began
    latents = sum(sample.latents_CHW.nbytes for sample in samples)
    must = sum(sample.pixels_HWC.nbytes for sample in samples) + 2 * latents
    moved = {}
    for readers in (1, 4):
        with counted() as read:
            began = time.perf_counter()
            with ThreadPoolExecutor(readers) as pool:
                list(pool.map(lambda rank, ranks=readers: _read_share(run, rank, ranks), range(readers)))
            seconds[f"readers_{readers}"] = time.perf_counter() - began
        moved[readers] = made.read + made.written + read.read
    ratios = {"ratio": moved[1] / must, "ratio_4": moved[4] / must}
    return {"pixels": pixels, "images": images, "must_mb": must / 1e6, **ratios, **seconds}


def _read_share(run: Storage, rank: int, ranks: int) -> None:
    """As a train worker reads a round, of which every rank draws other samples."""
    store = RoundStore(run)
    records, _ = store.trainable(0, 0, 0)
    share = np.array_split(np.random.default_rng(0).permutation(len(records)), ranks)[rank]
    StoredLatents(store, records).prepare(share)


def _resume(run: Storage, rounds: int) -> dict[str, Any]:
    from tests.counting import counted

    store = RoundStore(run)
    for index in range(rounds):
        samples, round_ = _samples(store.stage(index), 16, 512), store.round(index)
        for start in range(0, len(samples), PART_SIZE):
            round_.know_samples(write_part(round_.storage, samples[start : start + PART_SIZE]))
        round_.add_scores(_scores(samples))
        round_.add_verdicts(_verdicts(samples))
        round_.seal(labeler={})
        round_.record_training({sample.id: 1 for sample in samples}, {"figures": {}})
        round_.tidy()
    half, open_round = _samples(store.stage(rounds), 512, 256), store.round(rounds)
    for start in range(0, 256, 16):
        write_part(open_round.storage, half[start : start + 16])
        open_round.add_scores(_scores(half[start : start + 16]))
    again = RoundStore(Storage(run.uri))
    with counted() as moved:
        began = time.perf_counter()
        newest = next(round_ for round_ in reversed(again.rounds()) if round_.sealed)
        assert newest.manifest["labeler"] == {}
        going_on = again.round(rounds)
        going_on.open()
        assert len(going_on.sample_ids) == 256
        seconds = time.perf_counter() - began
    return {"rounds": rounds, "seconds": seconds, "mb": moved.read / 1e6, "files": moved.files_read}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(**json.loads(sys.argv[2]))))
    else:
        run_alone(measure, __doc__)
