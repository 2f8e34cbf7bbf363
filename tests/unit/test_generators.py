"""The loop's side of the generators, with a handle of this process: what is asked for again, and what is not."""

import asyncio
import contextlib
from collections.abc import Generator as Yields
from collections.abc import Sequence
from typing import Any

import pytest
from ray import exceptions
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from kto_ray.config import Cluster, RunConfig
from kto_ray.generate import client
from kto_ray.generate.client import Generators
from kto_ray.generate.replica import Drawn
from kto_ray.lost import is_lost
from kto_ray.policies import DigestError
from kto_ray.records import PolicyRef, Sample, SampleRequest
from kto_ray.storage import Storage
from tests.factories import BASE, make_requests, make_sample

TRANSIENT = [
    exceptions.ActorDiedError(),
    exceptions.ActorUnavailableError("no answer", None),
    exceptions.ObjectLostError("aa", None, ""),
    exceptions.OwnerDiedError("aa", None, ""),
    exceptions.ObjectFetchTimedOutError("aa", None, ""),
    exceptions.ReferenceCountingAssertionError("aa", None, ""),
    exceptions.ObjectFreedError("aa", None, ""),
    exceptions.NodeDiedError("gone"),
    exceptions.LocalRayletDiedError(),
    exceptions.WorkerCrashedError(),
    exceptions.OutOfMemoryError("killed"),
]
LASTING = [
    exceptions.RaySystemError(ValueError("cannot be read")),
    exceptions.RuntimeEnvSetupError("no such package"),
    exceptions.OutOfDiskError("full"),
    RayTaskError("draw", "traceback", ValueError("no")).as_instanceof_cause(),
    RayTaskError("draw", "traceback", exceptions.OwnerDiedError("aa", None, "")).as_instanceof_cause(),
]


class Response:
    """What a call of the handle gives: an answer, an error, or nothing until it is cancelled."""

    def __init__(self, answer: Drawn | Exception | None) -> None:
        self.answer, self.cancelled = answer, False

    def __await__(self) -> Yields[Any, None, Drawn]:
        if self.answer is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Answers calls of `draw` with what is planned, then with samples; remembers what it was asked for."""

    def __init__(self, *planned: Exception | None) -> None:
        self.planned, self.draw = list(planned), self
        self.asked: list[Sequence[SampleRequest]] = []
        self.responses: list[Response] = []

    def remote(self, batch: Sequence[SampleRequest], policy: PolicyRef) -> Response:
        self.asked.append(batch)
        answer = (
            self.planned.pop(0) if self.planned else Drawn([make_sample(r, policy) for r in batch], 0.5, "as asked")
        )
        self.responses.append(Response(answer))
        return self.responses[-1]


def generators(monkeypatch: pytest.MonkeyPatch, handle: Handle, **settings: Any) -> Generators:
    monkeypatch.setattr(client, "BACK_OFF_S", 0)
    made = Generators(
        RunConfig.model_validate({"generate": {"batch_size": 2, "max_replicas": 8, **settings}}),
        Storage("memory://run"),
        "as asked",
    )
    made._handle = handle  # type: ignore[assignment]
    return made


async def drawn(made: Generators, requests: Sequence[SampleRequest]) -> list[Sample]:
    async with contextlib.aclosing(made.stream(requests, BASE)) as batches:
        return [sample async for batch in batches for sample in batch]


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: type(error).__name__)
async def test_what_is_lost_is_asked_for_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_lost(error)
    handle, requests = Handle(error, error), make_requests("round-00000", 6)
    samples = await drawn(generators(monkeypatch, handle), requests)
    assert sorted((s.id, s.seed) for s in samples) == sorted((r.id, r.seed) for r in requests)
    assert len(handle.asked) == 3 + 2
    assert f"a generator replica died, or its node ({type(error).__name__}: " in caplog.text
    assert "its 2 images are asked for again" in caplog.text


async def test_the_wait_for_what_was_lost_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kto_ray.cluster.missing_resources", lambda *_: "1 GPU asked for")
    made = generators(monkeypatch, Handle(exceptions.NodeDiedError("gone"), None))
    made.cluster = Cluster(wait_s=0.05)
    waiting = asyncio.create_task(drawn(made, make_requests("round-00000", 2)))
    while "still waiting for 2 images that are asked for again after 0 s: 1 GPU asked for" not in caplog.text:
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("error", LASTING, ids=lambda error: type(error).__name__)
async def test_other_errors_end_the_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_lost(error)
    handle = Handle(error)
    with pytest.raises(type(error)):
        await drawn(generators(monkeypatch, handle), make_requests("round-00000", 2))
    assert len(handle.asked) == 1


async def test_it_is_asked_for_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(*[BackPressureError(1, 1)] * 3, *[exceptions.NodeDiedError("node 7 went")] * 20)
    with pytest.raises(RuntimeError, match=r"2 images could not be drawn in 8 tries; at last .*node 7 went"):
        await drawn(generators(monkeypatch, handle), make_requests("round-00000", 2))
    assert len(handle.asked) == client.MAX_TRIES


async def test_an_error_cancels_what_is_being_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(None, None, exceptions.RaySystemError(ValueError("cannot be read")))
    with pytest.raises(exceptions.RaySystemError):
        await drawn(generators(monkeypatch, handle), make_requests("round-00000", 6))
    assert [response.cancelled for response in handle.responses] == [True, True, False]


async def test_samples_drawn_with_other_settings_are_refused_although_the_policy_is_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle, requests = Handle(), make_requests("round-00000", 2)
    monkeypatch.setattr(
        handle, "remote", lambda batch, policy: Response(Drawn([make_sample(r, policy) for r in batch], 0, "otherwise"))
    )
    with pytest.raises(DigestError, match="draws from another base model or with other settings"):
        await drawn(generators(monkeypatch, handle), requests)


async def test_samples_of_another_policy_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, requests = Handle(), make_requests("round-00000", 2)
    other = PolicyRef(1, "c" * 64)
    monkeypatch.setattr(
        handle, "remote", lambda batch, _: Response(Drawn([make_sample(r, other) for r in batch], 0, "as asked"))
    )
    with pytest.raises(DigestError, match="asked for policy"):
        await drawn(generators(monkeypatch, handle), requests)
