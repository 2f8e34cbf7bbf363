"""The loop's side of the generators, with a handle of this process: what is asked for again, and what is not."""

import asyncio
import contextlib
from collections.abc import Generator as Yields
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from ray import exceptions
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError

from kto_ray.config import Cluster, RunConfig
from kto_ray.errors import UserError
from kto_ray.generate import client
from kto_ray.generate.client import Generators
from kto_ray.generate.drawn import Drawn
from kto_ray.lost import is_lost
from kto_ray.parts import read_arrays, read_records, write_part
from kto_ray.policies import DigestError
from kto_ray.records import PolicyRef, Sample, SampleRequest
from kto_ray.rounds import Round
from kto_ray.storage import Storage
from tests.factories import BASE, make_requests, make_sample, ruined, same_sample

RUN = Storage("memory://generators/run")
ROUND = "rounds/00000"

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
    """Answers calls of `draw` with what is planned, then as a replica that stores; remembers what it was asked for.

    Where what is planned is an error, the images are stored and the answer is lost.
    """

    def __init__(self, *planned: Exception | None) -> None:
        self.planned, self.draw = list(planned), self
        self.asked: list[Sequence[SampleRequest]] = []
        self.responses: list[Response] = []
        self.policy: PolicyRef | None = None  # that it draws from, whatever it is asked for
        self.drawing = "as asked"
        self.ruined: set[str] = set()  # prompts whose images are none

    def remote(self, batch: Sequence[SampleRequest], policy: PolicyRef, folder: str) -> Response:
        self.asked.append(batch)
        samples = [make_sample(request, self.policy or policy) for request in batch]
        failed = [ruined(sample) for sample in samples if sample.prompt.id in self.ruined]
        images = [sample for sample in samples if sample.prompt.id not in self.ruined]
        records = write_part(RUN / folder, images) if images else []
        pixels = Pixels(images) if images else None
        answer = self.planned.pop(0) if self.planned else Drawn(records, pixels, failed, 0.5, self.drawing)
        self.responses.append(Response(answer))
        return self.responses[-1]


class Pixels:
    """A reference to pixels of samples in Ray's object store."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.pixels_BHWC = np.stack([sample.pixels_HWC for sample in samples])

    def __await__(self) -> Yields[Any, None, tuple[bytes, tuple[int, ...]]]:
        yield from asyncio.sleep(0).__await__()
        return self.pixels_BHWC.tobytes(), self.pixels_BHWC.shape


def generators(monkeypatch: pytest.MonkeyPatch, handle: Handle, **settings: Any) -> Generators:
    monkeypatch.setattr(client, "BACK_OFF_S", 0)
    made = Generators(
        RunConfig.model_validate({"generate": {"batch_size": 2, "max_replicas": 8, **settings}}),
        RUN,
        "as asked",
    )
    made._handle = handle  # type: ignore[assignment]
    return made


async def drawn(made: Generators, requests: Sequence[SampleRequest]) -> list[Sample]:
    """Whole, with the pixels that scorers would be given; what failed comes last."""
    images: list[Sample] = []
    none: list[Sample] = []
    async with contextlib.aclosing(made.stream(requests, BASE, RUN / ROUND)) as batches:
        async for samples, failed in batches:
            if samples:
                latents_BCHW = read_arrays(RUN / ROUND, "latents", samples)
                arrays = zip(samples, latents_BCHW, await samples.pixels_BHWC(), strict=True)
                images += [Sample.of(*one) for one in arrays]
            none += failed
    return images + none


@pytest.fixture(autouse=True)
def _empty() -> None:
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: type(error).__name__)
async def test_what_is_lost_is_asked_for_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_lost(error)
    handle, requests = Handle(error, error), make_requests("round-00000", 6)
    samples = await drawn(generators(monkeypatch, handle), requests)
    samples.sort(key=lambda sample: sample.id)
    expected = sorted((make_sample(request) for request in requests), key=lambda sample: sample.id)
    assert all(map(same_sample, samples, expected))
    assert len(samples) == 6
    assert len(handle.asked) == 3 + 2
    # What was stored before its answer was lost is the same sample.
    assert [record.id for record in Round(RUN / ROUND, "round-00000").records()] == [sample.id for sample in expected]
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


async def test_what_went_with_a_drained_node_is_no_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gone = exceptions.RayActorError(None, "its node was preempted", False, True)
    handle = Handle(*[gone] * (2 * client.MAX_TRIES))
    assert len(await drawn(generators(monkeypatch, handle), make_requests("round-00000", 2))) == 2
    assert "a generator replica went with its node, which was drained; its 2 images are asked for again" in caplog.text
    assert "died" not in caplog.text


async def test_an_error_cancels_what_is_being_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(None, None, exceptions.RaySystemError(ValueError("cannot be read")))
    with pytest.raises(exceptions.RaySystemError):
        await drawn(generators(monkeypatch, handle), make_requests("round-00000", 6))
    assert [response.cancelled for response in handle.responses] == [True, True, False]


async def test_samples_drawn_with_other_settings_are_refused_although_the_policy_is_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle, requests = Handle(), make_requests("round-00000", 2)
    handle.drawing = "otherwise"
    with pytest.raises(DigestError, match="draws from another base model or with other settings"):
        await drawn(generators(monkeypatch, handle), requests)


@pytest.mark.parametrize("ruined_prompts", [set(), {"p0", "p1"}])
async def test_samples_of_another_policy_are_refused(ruined_prompts: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    handle, requests = Handle(), make_requests("round-00000", 2)
    handle.policy, handle.ruined = PolicyRef(1, "c" * 64), ruined_prompts
    with pytest.raises(DigestError, match="asked for policy"):
        await drawn(generators(monkeypatch, handle), requests)


async def test_what_is_no_image_comes_apart_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, requests = Handle(), make_requests("round-00000", 6)
    handle.ruined = {"p1", "p2", "p3"}  # of the batches some, and all
    async with contextlib.aclosing(generators(monkeypatch, handle).stream(requests, BASE, RUN / ROUND)) as batches:
        answers = [answer async for answer in batches]
    assert sorted(len(samples) for samples, _ in answers) == [0, 1, 2]
    failed = {sample.id: sample for _, batch in answers for sample in batch}
    assert failed.keys() == {request.id for request in requests[1:4]}
    assert all(sample.error and not sample.pixels_HWC.any() for sample in failed.values())
    images = {record.id for samples, _ in answers for record in samples}
    assert images == {record.id for record in read_records(RUN / ROUND)} == {r.id for r in requests} - failed.keys()


async def test_pixels_of_a_replica_that_is_gone_come_from_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: Pixels) -> None:
        raise exceptions.OwnerDiedError("aa", None, "")

    monkeypatch.setattr(Pixels, "__await__", gone)
    requests = make_requests("round-00000", 4)
    samples = {sample.id: sample for sample in await drawn(generators(monkeypatch, Handle()), requests)}
    assert all(same_sample(samples[request.id], make_sample(request)) for request in requests)


async def test_a_replica_that_cannot_store_says_why_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "runs_folder: cannot write s3://b/rounds/x.parquet: access denied; may you use it?"
    over_there = RayTaskError("draw", f"Traceback ...\nkto_ray.errors.UserError: {sentence}", UserError(sentence))
    with pytest.raises(UserError) as caught:
        await drawn(generators(monkeypatch, Handle(over_there.as_instanceof_cause())), make_requests("round-00000", 2))
    assert str(caught.value) == sentence


async def test_requests_are_of_as_many_images_as_a_replica_found(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, sizes = Handle(), []

    class Asking:
        async def remote(self) -> int:
            sizes.append("asked")
            return 3

    async def deployed(*_: Any, **__: Any) -> Handle:
        return handle

    handle.found_batch_size = Asking()  # type: ignore[attr-defined]
    monkeypatch.setattr(client, "deploy", deployed)
    monkeypatch.setattr(client, "application_name", lambda *_: "generators")
    monkeypatch.setattr(client, "noisily", lambda *_: contextlib.AsyncExitStack())
    for given, size in (("auto", 3), (2, 2)):
        handle.asked.clear()
        made = generators(monkeypatch, handle, batch_size=given, resources={"num_gpus": 1})
        await made.start()
        await drawn(made, make_requests("round-00000", 6))
        assert {len(batch) for batch in handle.asked} == {size}
    assert sizes == ["asked"]
