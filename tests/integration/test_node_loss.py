"""A node that goes: two nodes on this machine, each a raylet with processes of its own, one of which is killed."""

import asyncio
import contextlib
from collections.abc import Generator as Yields
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from kto_ray.config import RunConfig
from kto_ray.diffusion import source
from kto_ray.generate.client import Generators
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest
from kto_ray.serving import start_serve
from kto_ray.storage import Storage

PATIENCE_S = 300


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head for the driver, which runs nothing that asks for a CPU, and a node that does."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_node(cluster: Cluster) -> None:
    """SIGKILL the one node beside the head, its raylet first and then what that has started; bring up another."""
    (node,) = cluster.worker_nodes
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    family = [raylet, *raylet.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


class Fateful:
    """The handle of the generators; the node of the first answer goes when that is given, but not yet fetched."""

    def __init__(self, handle: Any, cluster: Cluster) -> None:
        self.handle, self.cluster, self.draw = handle, cluster, self
        self.asked: list[Sequence[SampleRequest]] = []

    def remote(self, batch: Sequence[SampleRequest], policy: PolicyRef) -> "FatefulResponse":
        self.asked.append(batch)
        response = self.handle.draw.remote(batch, policy)
        return FatefulResponse(response, self.cluster if len(self.asked) == 1 else None)


class FatefulResponse:
    def __init__(self, response: Any, cluster: Cluster | None) -> None:
        self.response, self.cluster, self.cancel = response, cluster, response.cancel

    def __await__(self) -> Yields[Any, None, Any]:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self.cluster:
            reference = await self.response._to_object_ref()
            given, _ = await asyncio.to_thread(ray.wait, [reference], timeout=PATIENCE_S, fetch_local=False)
            assert given
            await asyncio.to_thread(kill_node, self.cluster)
        return await self.response


async def test_images_whose_node_goes_before_they_are_fetched_are_drawn_again(
    nodes: Cluster, tmp_path: Path, tiny_sd1_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Storage(str(tmp_path / "run"))
    # 8 images of 128 x 128 are 400 kB, which Ray keeps in the object store of the node that made them.
    generate = {"steps": 1, "height": 128, "width": 128, "batch_size": 8, "resources": {"num_cpus": 1, "threads": 1}}
    config = RunConfig.model_validate({"run": "loss", "model": str(tiny_sd1_folder), "generate": generate})
    policy = PolicyStore(run).publish_base(source.reference_digest(tiny_sd1_folder))
    requests = [SampleRequest.make(0, "round-00000", Prompt(f"p{i}", "a red circle on black"), 0) for i in range(16)]
    start_serve(None)
    generators = Generators(config, run)
    try:
        await asyncio.wait_for(generators.start(), PATIENCE_S)
        handle = Fateful(generators._handle, nodes)
        generators._handle = handle  # type: ignore[assignment]
        samples = await asyncio.wait_for(drawn(generators, requests, policy), PATIENCE_S)
        assert [batch for batch in handle.asked[2:] if batch == handle.asked[0]]
        again = await asyncio.wait_for(drawn(generators, requests[:8], policy), PATIENCE_S)
    finally:
        generators.close()
        serve.shutdown()
    assert [(sample.id, sample.seed) for sample in samples] == [(r.id, r.seed) for r in requests]
    assert all(np.array_equal(a.pixels_HWC, b.pixels_HWC) for a, b in zip(samples, again, strict=False))
    assert "or its node (ObjectLostError: " in caplog.text
    assert "its 8 images are asked for again" in caplog.text


async def drawn(generators: Generators, requests: Sequence[SampleRequest], policy: PolicyRef) -> list[Sample]:
    """In the order of the requests."""
    async with contextlib.aclosing(generators.stream(requests, policy)) as batches:
        samples = {sample.id: sample async for batch in batches for sample in batch}
    return [samples[request.id] for request in requests]
