"""Generators on Serve, with a replica that draws for ever; on a Ray of this machine alone."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from kto_ray.config import RunConfig
from kto_ray.generate import client
from kto_ray.generate.client import Generators
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef, SampleRequest
from kto_ray.serving import start_serve
from kto_ray.storage import Storage
from tests.factories import make_requests

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

    async def draw(self, requests: Sequence[SampleRequest], policy: PolicyRef) -> Any:
        (self.folder / f"begun-{requests[0].id}").touch()
        try:
            await asyncio.Event().wait()
        finally:
            (self.folder / f"left-{requests[0].id}").touch()


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
        async with contextlib.aclosing(generators.stream(requests, policy)) as batches:
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
    assert noted("begun-") == {requests[0].id, requests[2].id}
