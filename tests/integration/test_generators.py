"""Generators on Serve, with replicas that draw for ever, or die; on a Ray of this machine alone."""

import asyncio
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from kto_ray.config import RunConfig
from kto_ray.generate import client
from kto_ray.generate.client import Generators
from kto_ray.generate.drawn import Drawn
from kto_ray.generate.storing import Storing
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef, SampleRequest
from kto_ray.rounds import Round
from kto_ray.serving import start_serve
from kto_ray.storage import Storage
from tests.factories import make_requests, make_sample

PATIENCE_S = 240


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


class EndlessGenerator:
    """Notes in the run's folder what it began to draw, and what it was told to leave."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        self.folder = Path(run.uri)

    async def draw(self, requests: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> Any:
        (self.folder / f"begun-{requests[0].id}").touch()
        try:
            await asyncio.Event().wait()
        finally:
            (self.folder / f"left-{requests[0].id}").touch()


class DyingGenerator:
    """Stores what it draws, and dies before it answers, once for each batch."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        self.folder, self.store = Path(run.uri), Storing(run)

    async def draw(self, requests: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> Drawn:
        records, pixels = await self.store(folder, [make_sample(request, policy) for request in requests])
        if not (died := self.folder / f"died-{requests[0].id}").exists():
            died.touch()
            os._exit(1)
        return Drawn(records, pixels, [], 0.0, "as always")


async def test_a_replica_that_dies_between_storing_and_answering_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "Generator", DyingGenerator)
    monkeypatch.setattr(client, "BACK_OFF_S", 0.01)
    monkeypatch.setattr(client, "MAX_TRIES", 100)
    run = Storage(str(tmp_path))
    policy = PolicyStore(run).publish_base("b" * 64, {})
    generate = {"batch_size": 2, "max_ongoing_requests": 1, "resources": {"num_cpus": 0.5}}
    generators = Generators(RunConfig.model_validate({"run": "dying", "generate": generate}), run, "as always")
    requests = make_requests("round-00000", 4)
    asked, round_ = {request.id: request for request in requests}, Round(run / "rounds/00000", "round-00000")
    await asyncio.to_thread(start_serve, None)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await generators.start()
            async with contextlib.aclosing(generators.stream(requests, policy, round_.storage)) as batches:
                async for samples, _ in batches:
                    round_.know_samples(samples)
                    expected_BHWC = np.stack([make_sample(asked[sample.id]).pixels_HWC for sample in samples])
                    assert np.array_equal(await samples.pixels_BHWC(), expected_BHWC)
    finally:
        generators.close()
    assert len(list(tmp_path.glob("died-*"))) == 2
    # What a crash of the driver would leave is the same.
    left = Round(round_.storage, "round-00000")
    for one in (round_, left):
        assert one.sample_ids == {request.id for request in requests}
    left.seal()
    left.verify()


async def test_what_nobody_waits_for_is_not_drawn_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "Generator", EndlessGenerator)
    run = Storage(str(tmp_path))
    policy = PolicyStore(run).publish_base("b" * 64, {})
    resources = {"num_cpus": 0.5}
    config = RunConfig.model_validate({"run": "endless", "generate": {"batch_size": 2, "resources": resources}})
    requests = make_requests("round-00000", 8)

    def noted(what: str) -> set[str]:
        return {path.name.removeprefix(what) for path in tmp_path.glob(f"{what}*")}

    async def until(condition: Any) -> None:
        while not condition():
            await asyncio.sleep(0.05)

    async def draw(generators: Generators) -> None:
        async with contextlib.aclosing(generators.stream(requests, policy, run / "rounds/00000")) as batches:
            async for _ in batches:
                pass

    await asyncio.to_thread(start_serve, None)
    generators = Generators(config, run, "as always")
    try:
        async with asyncio.timeout(PATIENCE_S):
            await generators.start()
            drawing = asyncio.create_task(draw(generators))
            await until(lambda: len(noted("begun-")) == config.generate.max_ongoing_requests)
            drawing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await drawing
            await until(lambda: noted("left-") == noted("begun-"))
    finally:
        generators.close()
    assert noted("begun-") == {requests[2 * batch].id for batch in range(config.generate.max_ongoing_requests)}
