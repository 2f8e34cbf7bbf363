"""Preparing a set on a Ray of this machine: what dies or stops in the middle changes nothing of what comes."""

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image
from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.data.sources import source_of
from kto_ray.diffusion import source
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.loading import load_family
from kto_ray.offline import planning
from kto_ray.offline.decoding import UnreadableError, decode
from kto_ray.offline.encoding import encoding_of
from kto_ray.offline.planning import HELD_OUT, ONCE
from kto_ray.offline.preparing import Preparing
from kto_ray.prepared import PreparedSet
from kto_ray.storage import Storage
from tests.plugins import CoinScorer

PATIENCE_S = 600  # for what must happen; nothing is read off the clock
IMAGES = 14


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, among them one that is there twice, one that is empty and one that is cut off."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for number in range(IMAGES):
        image = Image.fromarray(rng.integers(0, 256, (16 + number, 24, 3), np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "png")
        data = {3: b"", 4: buffer.getvalue()[:-200]}.get(number, buffer.getvalue())
        file = folder / ("liked" if number % 3 else "disliked") / f"{number:02}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        file.with_suffix(".txt").write_text("a blue square" if number == 5 else f"a circle {number % 2}")
    again = folder / "liked" / "again.png"
    again.write_bytes((folder / "liked" / "01.png").read_bytes())
    again.with_suffix(".txt").write_text("a circle 1")
    return folder


def prepare(labelled: Path, model: Path, folder: Storage, run: str = "run", **more: Any) -> PreparedSet:
    prepared = {"batch_size": 2, "resources": {"num_cpus": 0.5, "threads": 1}}
    data = {"sources": {"kind": "folders", "path": str(labelled)}, "prepare": prepared} | more
    label = {"scorers": {"coin": {"scorer": "tests.plugins:CoinScorer"}}}
    config = RunConfig.model_validate({"run": run, "model": str(model), "data": data, "label": label})
    assert config.data is not None
    family = family_of(model, config.model)
    geometry, digests = family.geometry_of(model), source.component_digests(model, config.model)
    assert geometry.pixels is not None
    encoding = encoding_of(config, geometry.pixels, geometry.multiple, digests["vae"], family.__name__)
    return Preparing(config, source_of(config.data), encoding, ["A blue square"], folder, Console(quiet=True)).prepare()


def shards(folder: Storage) -> dict[str, bytes]:
    return {
        f"{kind}/{name}": folder.read(f"{kind}/{name}")
        for kind in ("latents", "samples")
        for name in folder.names(kind)
    }


def kill_an_encoder(folder: Storage, killed: list[int]) -> None:
    """As soon as there is a shard."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and not killed:
        if folder.names("samples"):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "EncodeShard" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.01)


def test_the_same_shards_come_whatever_dies_and_stops(
    labelled: Path, tiny_sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_IMAGES", 2)
    folder, other = Storage(str(tmp_path / "one")), Storage(str(tmp_path / "other"))
    whole = prepare(labelled, tiny_sd1_folder, folder)
    made = shards(folder)

    # What is in it, and what is not.
    assert len(whole) == IMAGES - 3
    assert whole.manifest["left_out"][ONCE] == whole.manifest["left_out"][HELD_OUT] == 1
    assert [why for why in whole.manifest["left_out"] if "empty" in why or "truncated" in why]
    rows = np.arange(len(whole))
    family = load_family(tiny_sd1_folder, RunConfig().model, torch.device("cpu"), torch.float32, parts="autoencoder")
    files = {row["source_id"]: row for row in whole.storage.read_table("samples.parquet").to_pylist()}
    for record, latents_CHW, row in zip(
        whole.records(rows), whole.latents_of(whole.records(rows)), files.values(), strict=True
    ):
        assert record.id == row["sample_id"]
        file = next(path for path in labelled.rglob("*.png") if path.name in row["source_id"])
        assert row["desirable"] == (file.parent.name == "liked")
        pixels_HWC = decode(file.read_bytes(), 16, 16, (255, 255, 255)).copy()
        images_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = family.encode(images_1CHW)[0].numpy()
        np.testing.assert_allclose(latents_CHW, expected, atol=1e-5)

    # An encoder dies.
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_encoder, args=[other, killed], daemon=True)
    killer.start()
    again = prepare(labelled, tiny_sd1_folder, other)
    killer.join()
    assert killed
    assert shards(other) == made
    assert again.manifest["files"] == whole.manifest["files"]

    # The driver was stopped, with a part of the shards there.
    for name in ("set.json", "samples.parquet"):
        other.delete(f"sets/{again.key}/{name}")
    other.delete("index.parquet")
    for name in other.names("samples")[::2]:
        other.delete(f"samples/{name}")
        other.delete(f"latents/{name}")
    before = set(other.names("samples"))
    continued = prepare(labelled, tiny_sd1_folder, other)
    assert 0 < continued.manifest["encoded"] <= 2 * (len(other.names("samples")) - len(before))
    assert shards(other) == made

    # Another run looks anew; what is encoded is not encoded again.
    (labelled / "liked" / "05.txt").write_text("a circle 1")
    widened = prepare(labelled, tiny_sd1_folder, other, run="another")
    assert widened.key != continued.key
    assert widened.manifest["encoded"] == 1  # the image whose prompt was held out


def test_scorers_give_verdicts_and_leave_out(
    labelled: Path, tiny_sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MOST_IMAGES", 4)
    folder = Storage(str(tmp_path / "scored"))
    filters = {"bright": {"scorer": "tests.plugins:CoinScorer", "at_least": 0.25}}
    scored = prepare(labelled, tiny_sd1_folder, folder, score="all", filters=filters)

    left_out = {row["id"]: row["why"] for row in scored.storage.read_table("left_out.parquet").to_pylist()}
    rows = {row["source_id"]: row for row in scored.storage.read_table("samples.parquet").to_pylist()}
    passed = 0
    for file in labelled.rglob("*.png"):
        name = next((name for name in [*rows, *left_out] if name.endswith(file.name)), "")
        try:
            pixels_HWC = decode(file.read_bytes(), 16, 16, (255, 255, 255))
        except UnreadableError:
            assert "could not be scored" not in left_out[name]
            continue
        (value,) = CoinScorer().score(pixels_HWC[None], [])
        if name in rows:
            passed += 1
            assert json.loads(rows[name]["metadata"])["scores"] == {"coin": value, "bright": value}
            assert rows[name]["desirable"] == (value >= 0.5)
            assert value >= 0.25
        elif left_out[name] not in (ONCE, HELD_OUT):
            assert left_out[name] == "a filter leaves it out: its score by bright is below 0.25"
            assert value < 0.25
    assert passed == len(scored) > 0
