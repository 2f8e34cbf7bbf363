"""A run on labelled images, as a process with two train workers: whatever dies, shards and draws are the same."""

import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kto_ray.config import RunConfig
from kto_ray.diffusion.loading import load_family
from kto_ray.offline.decoding import decode
from kto_ray.prepared import set_of
from kto_ray.relabel import saved_config
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.train.streaming import Stream
from tests.end_to_end import jobs

IMAGES = 96
PROGRAM = ("jobs/offline_kto.py", "--recipe", "shapes_offline")


def write_labelled(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        file = folder / ("liked" if number % 3 else "disliked") / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"a circle {number % 7}")


def test_driver_and_train_rank_may_die(tmp_path: Path, tiny_sd1_folder: Path) -> None:
    labelled = tmp_path / "labelled"
    write_labelled(labelled)
    overrides = [
        *(f"model={tiny_sd1_folder}", f"data={labelled}", "rounds=3", "data.stream.steps=8"),
        *("train.workers=2", "train.micro_batch=4", "train.adapter.rank=2", "train.resources.num_cpus=0.2"),
        *("data.prepare.batch_size=1", "data.prepare.resources.num_cpus=0.2", "evaluate.max_prompts=2"),
    ]
    job = jobs.start(tmp_path, "run", overrides, program=PROGRAM)
    job.wait_until(lambda: list(tmp_path.glob("_prepared/*/samples/*.parquet")))
    job.kill()

    job = jobs.start(tmp_path, "run", overrides, program=PROGRAM)
    job.wait_until(lambda: (job.run / "rounds/00000/training.json").exists())
    os.kill(job.wait_until(lambda: job.actors("RayTrainWorker"))[-1].pid, signal.SIGKILL)
    assert job.wait() == 0, job.output()
    assert "the train workers failed" in job.output()

    # What was drawn is what the set, the seed and the number of the interval say.
    run = Storage(str(job.run))
    config, prepared = saved_config(run), set_of(run)
    assert config.data is not None
    assert len(prepared) == IMAGES
    stream = Stream(prepared, config.train, config.data.stream, config.seed)
    for index in range(3):
        table = RoundStore(run).round(index).storage.read_table("training.parquet")
        interval = stream.interval(index)
        expected = dict(zip(interval.ids, interval.draws_N.tolist(), strict=True))
        assert dict(zip(table["sample_id"].to_pylist(), table["draws"].to_pylist(), strict=True)) == expected
    assert jobs.summary(job.run)["ledger"]["balances"]

    # What was encoded is what an autoencoder of this process makes of each file, to the last bit.
    family = load_family(tiny_sd1_folder, RunConfig().model, torch.device("cpu"), torch.float32, parts="autoencoder")
    names = prepared.storage.read_table("samples.parquet")["source_id"].to_pylist()
    records = prepared.records(np.arange(len(prepared)))
    for name, latents_CHW in zip(names, prepared.latents_of(records), strict=True):
        (file,) = labelled.rglob(f"{name.rpartition('/')[2]}")
        pixels_HWC = decode(file.read_bytes(), 16, 16, (255, 255, 255)).copy()
        images_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            np.testing.assert_array_equal(latents_CHW, family.encode(images_1CHW)[0].numpy())
