"""How long replicas of one node take for a new policy: from storage each, or once for all of them.

    python benchmarks/pulling.py [--quick]

A policy behind a link that all of a cluster share, on 1 and on 16 replicas: plain actors that take it up as a replica
does, digest and all, without a model to put it into. Link: a reader of storage waits as if the bytes came at that pace,
one reader after the other. What is read from Ray's object store is really there.
"""

import asyncio
import fcntl
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import Table, in_a_process, interleaved, median_and_range, ratios, run_alone

from kto_ray.generate.pulling import Offering, pulled
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef
from kto_ray.storage import Storage

REPLICAS = 16
LINK_MB_S = 100


class FarStore(PolicyStore):
    """A policy store behind the link."""

    def read(self, policy: PolicyRef) -> bytes:
        data = super().read(policy)
        with (Path(tempfile.gettempdir()) / "kto-ray-bench-link").open("w") as link:
            fcntl.flock(link, fcntl.LOCK_EX)
            time.sleep(len(data) / (LINK_MB_S * 1e6))
        return data


class Replica:
    """Takes up policies, and forgets them."""

    def __init__(self, run: Storage) -> None:
        self.store = FarStore(run)

    def take(self, policy: PolicyRef, offered: list[Any]) -> None:
        weights = pulled(self.store, policy, offered)
        assert weights is not None


def measure(quick: bool) -> Table:
    row = in_a_process(__file__, megabytes=20 if quick else 200, repeats=2 if quick else 5)
    return Table(
        f"A policy of {row['megabytes']} MB on {REPLICAS} replicas of a node",
        ("replicas", "seconds", "times one replica's", ""),
        [(name, *seconds, *ratio) for name, seconds, ratio in row["rows"]],
        f"Storage at {LINK_MB_S} MB/s for all together. Median, and lowest to highest ratio. Each replica hashes and "
        "decodes what it got: with fewer cores than replicas that adds up, however it came.",
    )


def one(megabytes: int, repeats: int) -> dict[str, Any]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 10**9)
    with tempfile.TemporaryDirectory() as folder:
        run = Storage(folder)
        store = FarStore(run)
        policy = store.publish(1, {"weight": torch.zeros(megabytes * 10**6 // 4)}, {})
        replicas = [ray.remote(num_cpus=0)(Replica).remote(run) for _ in range(REPLICAS)]

        def take(count: int, shared: bool) -> None:
            offered = asyncio.run(Offering(store)(policy)) if shared else []
            ray.get([replica.take.remote(policy, offered) for replica in replicas[:count]])

        contenders = {
            "1, from storage": lambda: take(1, False),
            "1, from the object store": lambda: take(1, True),
            f"{REPLICAS}, each from storage": lambda: take(REPLICAS, False),
            f"{REPLICAS}, from the object store": lambda: take(REPLICAS, True),
        }
        seconds = interleaved(contenders, repeats)
    ray.shutdown()
    alone = seconds["1, from the object store"]
    return {
        "megabytes": megabytes,
        "rows": [
            (name, [median_and_range(taken)[0]], median_and_range(ratios(taken, alone)))
            for name, taken in seconds.items()
        ],
    }


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(one(**json.loads(sys.argv[-1]))))
    else:
        run_alone(measure, __doc__)
