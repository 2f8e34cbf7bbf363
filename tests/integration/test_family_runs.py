"""Whole runs of two rounds on a local Ray, of model families: Serve draws, Ray Train trains, policies go back.

Of one, which stands for the others, and one in shards; with KTO_RAY_ALL_FAMILIES=1 in the environment of every one,
which takes minutes. Without Ray every family goes through two rounds in `tests/unit/test_family_training.py`.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from kto_ray import loop
from kto_ray.cluster import connected
from kto_ray.config import Cluster, Model, load
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.policies import PolicyStore
from kto_ray.storage import Storage
from tests.end_to_end.jobs import SMALL
from tests.tiny_models import NAMES, side_of, write_model

# Ray's own: it ends with its processes unawaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FULL = ("pixart_sigma", "sdxl", "z_image")


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """One for all runs, which would start one each."""
    with pytest.MonkeyPatch.context() as patch, connected(Cluster(address="local")):
        patch.setattr(loop, "connected", lambda *_: nullcontext())
        yield


ALL = [*((name, "lora") for name in NAMES if name != "pixart_sigma"), *((name, "full") for name in FULL)]
# The farthest from the Stable Diffusion of all other tests: a flow, tokens of latents, guidance that is told.
SOME = [("flux", "lora")]
CASES = ALL if os.environ.get("KTO_RAY_ALL_FAMILIES") else SOME


@pytest.mark.filterwarnings("ignore:`use_")  # Ray Data, of itself, in this process
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_rounds_of_every_family(tmp_path: Path, name: str, kind: str) -> None:
    folder, side = write_model(tmp_path / "model", name), side_of(name)
    overrides = [
        *SMALL,
        f"runs_folder={tmp_path / 'runs'}",
        "run=tiny",
        f"model={folder}",
        "generate.images_per_round=8",
        f"generate.height={side}",
        f"generate.width={side}",
        f"generate.guidance_scale={1 if name == 'flux_schnell' else 3}",
        "train.objective.beta=100",
        f"train.adapter.kind={kind}",
        "train.adapter.rank=2",
        "evaluate.max_prompts=2",
    ]
    summary = loop.run_online_kto(load("shapes_demo", overrides), Console(quiet=True))
    assert summary["ledger"]["generated"] == 16
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "round"] == [0, 1]

    family = load_family(folder, Model(), torch.device("cpu"), torch.float32)
    policies = PolicyStore(Storage(str(run)))
    tensors = policies.load(policies.resolve(2))
    policy = make_policy(family, load(str(run / "config.yaml")).train.adapter)
    policy.load(tensors)
    assert policy.proves(tensors)
    if kind == "lora":
        again: Any = load_family(folder, Model(), torch.device("cpu"), torch.float32).pipeline
        again.load_lora_weights(run / "policies" / "00002", weight_name="policy.safetensors")


def kill_a_train_worker(once: Path, killed: list[int]) -> None:
    """SIGKILL to one of them as soon as a file is there."""
    while not once.exists():
        time.sleep(0.1)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return


@pytest.mark.filterwarnings("ignore:`use_")
def test_a_run_in_shards_outlives_a_worker_and_goes_on_with_more(tmp_path: Path) -> None:
    folder, side = write_model(tmp_path / "model", "pixart_sigma"), side_of("pixart_sigma")
    run, killed = tmp_path / "runs" / "tiny", list[int]()

    def go_on(rounds: int, workers: int) -> dict[str, Any]:
        overrides = [
            *(*SMALL, f"runs_folder={tmp_path / 'runs'}", "run=tiny", f"model={folder}", f"rounds={rounds}"),
            *("generate.images_per_round=8", f"generate.height={side}", f"generate.width={side}", "train.epochs=1"),
            *("train.objective.beta=100", "train.adapter.kind=full", "train.strategy=fsdp", f"train.workers={workers}"),
            *(
                "train.objective.noise_parts=2",
                "train.global_batch=6",
                "train.micro_batch=1",
                "train.resources.num_cpus=0.2",
                "evaluate.max_prompts=2",
            ),
        ]
        return loop.run_online_kto(load("shapes_demo", overrides), Console(quiet=True))

    threading.Thread(target=kill_a_train_worker, args=(run / "policies/00001/policy.json", killed), daemon=True).start()
    go_on(rounds=2, workers=2)
    assert killed
    ledger = go_on(rounds=3, workers=3)["ledger"]
    assert (ledger["generated"], ledger["balances"], ledger["trained_twice"]) == (24, True, 0)
    policies = PolicyStore(Storage(str(run)))
    weights = [policies.load(policies.resolve(version)) for version in range(1, 4)]
    moved = [not torch.equal(a["proj_out.weight"], b["proj_out.weight"]) for a, b in pairwise(filter(None, weights))]
    assert moved == [True] * 2
