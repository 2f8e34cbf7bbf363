"""A node that goes: a second raylet on this machine, with processes of its own, that is killed with all of them."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Generator as Yields
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve

from kto_ray.config import Model, RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.sampling import drawing_digest
from kto_ray.errors import UserError
from kto_ray.generate.client import Generators
from kto_ray.lease import held
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef, Prompt, SampleRecord, SampleRequest
from kto_ray.samples import Pixels
from kto_ray.serving import start_serve
from kto_ray.sharing import require_seen_everywhere
from kto_ray.storage import Storage
from tests.end_to_end.cluster import RAY, free_port

PATIENCE_S = 300


class Node:
    """A node with one CPU, beside the driver's, which has none."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        command = [RAY, "start", "--block", f"--address={ray.get_runtime_context().gcs_address}", "--num-cpus=1"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        """SIGKILL, to everything on it at once."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(family[1:])


@pytest.fixture
def node() -> Iterator[Node]:
    ray.init(address="local", num_cpus=0, include_dashboard=False, log_to_driver=False)
    node = Node()
    try:
        yield node
    finally:
        node.kill()
        ray.shutdown()


class Fateful:
    """The handle of the generators; the node of the first answer goes when that is given, but not yet fetched."""

    def __init__(self, handle: Any, node: Node) -> None:
        self.handle, self.node, self.draw, self.shutdown = handle, node, self, handle.shutdown
        self.asked: list[Sequence[SampleRequest]] = []

    def remote(self, batch: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> "FatefulResponse":
        self.asked.append(batch)
        response = self.handle.draw.remote(batch, policy, folder)
        return FatefulResponse(response, self.node if len(self.asked) == 1 else None)

    def shutdown(self) -> None:
        self.handle.shutdown()


class FatefulResponse:
    def __init__(self, response: Any, node: Node | None) -> None:
        self.response, self.node, self.cancel = response, node, response.cancel

    def __await__(self) -> Yields[Any, None, Any]:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if self.node:
            result = await self.response._fetch_future_result_async()
            ended = result._obj_ref_gen.completed()  # the call; its answer is in the store of the replica's node
            given, _ = await asyncio.to_thread(ray.wait, [ended], timeout=PATIENCE_S, fetch_local=False)
            assert given
            await asyncio.to_thread(self.node.kill)
            self.node.start()
        return await self.response


async def test_images_whose_node_goes_before_they_are_fetched_are_not_lost(
    node: Node, tmp_path: Path, tiny_sd1_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Storage(str(tmp_path / "run"))
    # 8 images of 128 x 128 are 400 kB, which Ray keeps in the object store of the node that made them.
    generate = {"steps": 1, "height": 128, "width": 128, "batch_size": 8, "resources": {"num_cpus": 1, "threads": 1}}
    config = RunConfig.model_validate({"run": "loss", "model": str(tiny_sd1_folder), "generate": generate})
    components = source.component_digests(tiny_sd1_folder, Model())
    policy = PolicyStore(run).publish_base(source.reference_digest(tiny_sd1_folder, Model()), components)
    requests = [SampleRequest.make(0, "round-00000", Prompt(f"p{i}", "a red circle on black"), 0) for i in range(16)]
    await asyncio.to_thread(start_serve, None)
    generators = Generators(config, run, drawing_digest(config, components))
    try:
        async with asyncio.timeout(PATIENCE_S):
            await generators.start()
            handle = Fateful(generators._handle, node)
            generators._handle = handle  # type: ignore[assignment]
            samples = await drawn(generators, requests, policy, run / "rounds/00000")
            asked = len(handle.asked)
            again = await drawn(generators, requests[:8], policy, run / "rounds/00001")
    finally:
        generators.close()
        serve.shutdown()
    assert asked > 2
    assert handle.asked[1] in handle.asked[2:]  # the pixels of the first are in storage
    assert [(record.id, record.seed) for record, _ in samples] == [(r.id, r.seed) for r in requests]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(samples[:8], again, strict=True))
    assert "a generator replica died, or its node (" in caplog.text
    assert "its 8 images are asked for again" in caplog.text


async def drawn(
    generators: Generators, requests: Sequence[SampleRequest], policy: PolicyRef, folder: Storage
) -> list[tuple[SampleRecord, Pixels]]:
    """In the order of the requests."""
    async with contextlib.aclosing(generators.stream(requests, policy, folder)) as batches:
        drawn = {
            record.id: (record, pixels_HWC)
            async for batch, _ in batches
            for record, pixels_HWC in zip(batch, await batch.pixels_BHWC(), strict=True)
        }
    return [drawn[request.id] for request in requests]


@pytest.mark.usefixtures("node")
def test_a_folder_that_a_node_does_not_see_is_refused_before_anything_is_deployed(tmp_path: Path) -> None:
    while ray.cluster_resources().get("CPU") != 1:  # until the node is there
        time.sleep(0.1)
    with held(Storage(str(tmp_path / "shared")), 10, 60) as (_, run):
        require_seen_everywhere(run)
    own_memory = Storage(f"memory://{tmp_path}/run")  # which no other process has
    sentence = r"^runs_folder: \S+ does not see what \S+ writes to memory://.*; give a folder that all machines"
    with held(own_memory, 10, 60) as (_, run), pytest.raises(UserError, match=sentence):
        require_seen_everywhere(run)
