"""The generator without Ray Serve: whose images it draws, and when it refuses."""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kto_ray.config import Adapter, Model, RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import _layers_in_use, make_policy
from kto_ray.diffusion.sampling import draw as sampled
from kto_ray.errors import UserError
from kto_ray.generate import replica, storing
from kto_ray.generate.drawn import Drawn
from kto_ray.generate.replica import Generator
from kto_ray.parts import Kind as Arrays
from kto_ray.parts import read_arrays, read_records, write_part
from kto_ray.pictures import look
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRecord, SampleRequest
from kto_ray.storage import Storage
from tests.pipelines import write_pipeline

Kind = Literal["lora", "full"]
ARRAYS: tuple[Arrays, Arrays] = ("latents", "pixels")
REQUESTS = [
    SampleRequest.make(0, "round-00000", Prompt(f"p{i}", text), i)
    for i, text in enumerate(["a red circle on black", "a blue square", "a blue square"])
]


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def make_config(folder: Path, kind: Kind = "lora", **generate: Any) -> RunConfig:
    settings = {"steps": 2, "guidance_scale": 2.0, "resources": {"threads": 1}} | generate
    return RunConfig.model_validate(
        {"model": str(folder), "generate": settings, "train": {"adapter": {"kind": kind, "rank": 2}}}
    )


def publish(run: Storage, folder: Path, kind: Kind, versions: int) -> list[PolicyRef]:
    """Version 0, the base, and policies that differ from it and from each other."""
    store = PolicyStore(run)
    policies = [store.publish_base(source.reference_digest(folder, Model()), source.component_digests(folder, Model()))]
    policy = make_policy(load_family(folder, Model(), torch.device("cpu"), torch.float32), Adapter(kind=kind, rank=2))
    for version in range(1, versions + 1):
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        policies.append(store.publish(version, policy.tensors(), policy.metadata()))
    return policies


@pytest.fixture(autouse=True)
def shelf(monkeypatch: pytest.MonkeyPatch) -> list[npt.NDArray[np.uint8]]:
    """Pixels that were put into Ray's object store; a reference is a place here."""
    put: list[npt.NDArray[np.uint8]] = []

    def put_pixels(samples: Sequence[Sample]) -> int | None:
        if samples:
            put.append(np.stack([sample.pixels_HWC for sample in samples]))
        return len(put) - 1 if samples else None

    monkeypatch.setattr(storing, "put_pixels", put_pixels)
    return put


def folder_of(policy: PolicyRef) -> str:
    """One policy draws a round."""
    return f"rounds/{policy.version:05}"


def samples_of(drawn: Drawn, run: Storage, policy: PolicyRef) -> list[Sample]:
    """All images of an answer, as they are stored."""
    folder = run / folder_of(policy)
    arrays = zip(*(read_arrays(folder, kind, drawn.records) for kind in ARRAYS), strict=True)
    return [Sample.of(record, *both) for record, both in zip(drawn.records, arrays, strict=True)]


def draw(
    run: Storage, generator: Generator, policy: PolicyRef, requests: list[SampleRequest] = REQUESTS
) -> list[Sample]:
    return samples_of(asyncio.run(generator.draw(requests, policy, folder_of(policy))), run, policy)


def same_images(ours: list[Sample], theirs: list[Sample]) -> bool:
    """Whether all images are the same, bit for bit; fails the test if only some are."""
    same = {
        np.array_equal(a.latents_CHW, b.latents_CHW) and np.array_equal(a.pixels_HWC, b.pixels_HWC)
        for a, b in zip(ours, theirs, strict=True)
    }
    assert len(same) == 1
    return same.pop()


def test_samples_carry_what_was_asked_and_who_made_them(tiny_folder: Path, run: Storage, kind: Kind) -> None:
    policies = publish(run, tiny_folder, kind, versions=1)
    generator = Generator(make_config(tiny_folder, kind), run)
    for policy in policies:
        samples = draw(run, generator, policy)
        assert [(s.id, s.stage, s.prompt, s.index, s.seed) for s in samples] == [
            (r.id, r.stage, r.prompt, r.index, r.seed) for r in REQUESTS
        ]
        assert all(sample.policy == policy for sample in samples)


def test_another_version_draws_other_images_and_the_first_comes_back(
    tiny_folder: Path, run: Storage, kind: Kind
) -> None:
    policies = publish(run, tiny_folder, kind, versions=2)
    generator = Generator(make_config(tiny_folder, kind), run)
    images = {policy: draw(run, generator, policy) for policy in policies}
    for policy in (policies[1], policies[0], policies[2], policies[1]):
        again = draw(run, generator, policy)
        for other, theirs in images.items():
            assert same_images(again, theirs) == (other == policy)


def test_a_fresh_replica_draws_the_same_images(tiny_sd1_folder: Path, run: Storage, kind: Kind) -> None:
    _, policy = publish(run, tiny_sd1_folder, kind, versions=1)
    config = make_config(tiny_sd1_folder, kind)
    assert same_images(draw(run, Generator(config, run), policy), draw(run, Generator(config, run), policy))


def test_the_adapter_kind_does_not_touch_the_base(tiny_sd1_folder: Path, run: Storage) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    lora, full = (Generator(make_config(tiny_sd1_folder, kind), run) for kind in ("lora", "full"))
    assert same_images(draw(run, lora, base), draw(run, full, base))


def test_requests_for_two_versions_at_once_do_not_mix(tiny_sd1_folder: Path, run: Storage) -> None:
    policies = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(tiny_sd1_folder), run)
    expected = [draw(run, generator, policy) for policy in policies]

    async def both() -> list[list[Sample]]:
        order = [0, 1, 0, 1]
        asked = (generator.draw(REQUESTS, policies[i], folder_of(policies[i])) for i in order)
        answers = await asyncio.gather(*asked)
        return [samples_of(drawn, run, policies[i]) for drawn, i in zip(answers, order, strict=True)]

    for samples, i in zip(asyncio.run(both()), [0, 1, 0, 1], strict=True):
        assert same_images(samples, expected[i])


def test_drawing_leaves_the_event_loop_free(tiny_sd1_folder: Path, run: Storage) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)
    threads: list[threading.Thread] = []
    generator.policy.module.register_forward_hook(lambda *_: threads.append(threading.current_thread()))
    draw(run, generator, base)
    assert threads
    assert threading.main_thread() not in threads


async def test_a_cancelled_draw_leaves_the_pipeline_before_another_enters_it(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(tiny_sd1_folder), run)
    entered, leave, inside, seen = threading.Event(), threading.Event(), 0, []

    def watched(*arguments: Any) -> Any:
        nonlocal inside
        inside += 1
        holds = generator.holds
        entered.set()
        leave.wait()
        answer = sampled(*arguments)
        seen.append((inside, holds, generator.holds))
        inside -= 1
        return answer

    monkeypatch.setattr(replica, "draw", watched)
    given_up = asyncio.create_task(generator.draw(REQUESTS, first, folder_of(first)))
    await asyncio.to_thread(entered.wait)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    after = asyncio.create_task(generator.draw(REQUESTS, base, folder_of(base)))
    await asyncio.sleep(0.5)  # if it could enter, it would by now
    leave.set()
    assert {sample.policy for sample in (await after).records} == {base}
    assert seen == [(1, first, first), (1, base, base)]


async def test_a_cancelled_draw_that_has_not_begun_never_does(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)
    entered, leave, drawn = threading.Event(), threading.Event(), []

    def watched(family: Any, texts: Any, prompts: list[str], *arguments: Any) -> Any:
        entered.set()
        leave.wait()
        drawn.append(prompts)
        return sampled(family, texts, prompts, *arguments)

    monkeypatch.setattr(replica, "draw", watched)
    first = asyncio.create_task(generator.draw(REQUESTS[:1], base, folder_of(base)))
    await asyncio.to_thread(entered.wait)
    queued = asyncio.create_task(generator.draw(REQUESTS[1:2], base, folder_of(base)))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    last = asyncio.create_task(generator.draw(REQUESTS[2:], base, folder_of(base)))
    leave.set()
    await asyncio.gather(first, last)
    assert drawn == [[REQUESTS[0].prompt.text], [REQUESTS[2].prompt.text]]


def tamper(run: Storage, version: int) -> None:
    name = f"policies/{version:05}/policy.safetensors"
    data = bytearray(run.read(name))
    data[-1] ^= 1
    run.write(name, bytes(data))


def test_a_policy_file_with_one_flipped_bit_makes_no_samples(tiny_sd1_folder: Path, run: Storage, kind: Kind) -> None:
    base, first, second = publish(run, tiny_sd1_folder, kind, versions=2)
    generator = Generator(make_config(tiny_sd1_folder, kind), run)
    expected = draw(run, generator, first)
    tamper(run, 2)
    for _ in range(2):  # asking again does not help
        with pytest.raises(DigestError, match=r"policy 2 .* has digest"):
            draw(run, generator, second)
    assert same_images(draw(run, generator, first), expected)
    assert draw(run, generator, base)


def test_another_digest_than_the_published_one_makes_no_samples(tiny_sd1_folder: Path, run: Storage) -> None:
    base, first = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(tiny_sd1_folder), run)
    for wrong in (PolicyRef(1, base.digest), PolicyRef(0, first.digest)):
        with pytest.raises(DigestError):
            draw(run, generator, wrong)


def test_weights_that_do_not_take_effect_make_no_samples(
    tiny_sd1_folder: Path, run: Storage, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, second = publish(run, tiny_sd1_folder, kind, versions=2)
    generator = Generator(make_config(tiny_sd1_folder, kind), run)
    expected = draw(run, generator, first)
    load = generator.policy.load
    with monkeypatch.context() as patched:
        patched.setattr(generator.policy, "load", lambda tensors: load({n: tensors[n] / 2 for n in tensors}))
        with pytest.raises(DigestError, match="does not hold its weights"):
            draw(run, generator, second)
    # Nor does what the failure left in the model pass for the version before.
    assert same_images(draw(run, generator, first), expected)


def test_another_base_model_makes_no_samples(tiny_sd1_folder: Path, tmp_path: Path, run: Storage) -> None:
    policies = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(write_pipeline(tmp_path / "other", seed=1)), run)
    for policy in policies:
        with pytest.raises(DigestError, match="every node must load the same weights"):
            draw(run, generator, policy)


def test_unknown_versions_are_not_found(tiny_sd1_folder: Path, run: Storage) -> None:
    publish(run, tiny_sd1_folder, "lora", versions=0)
    with pytest.raises(FileNotFoundError):
        draw(run, Generator(make_config(tiny_sd1_folder), run), PolicyRef(7, "0" * 64))


async def test_an_image_that_overflows_is_a_sample_with_an_error_that_is_not_stored_here(
    tiny_sd1_folder: Path, run: Storage, shelf: list[npt.NDArray[np.uint8]]
) -> None:
    """How many may be is for whoever asked to say."""
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)

    def overflow(_module: Any, _inputs: Any, outputs: Any) -> None:
        outputs[0][1, 0, 0, 0] = torch.inf

    with generator.policy.module.register_forward_hook(overflow):
        drawn = await generator.draw(REQUESTS, base, "rounds/00000")
    (failed,) = drawn.failed
    assert (failed.id, failed.policy) == (REQUESTS[1].id, base)
    assert failed.error == "its latents or pixels, in float32, are not finite"
    assert not failed.pixels_HWC.any()
    assert [record.id for record in drawn.records] == [REQUESTS[0].id, REQUESTS[2].id]
    assert [record.error for record in drawn.records] == [None, None]
    assert {record.id for record in read_records(run / "rounds/00000")} == {record.id for record in drawn.records}
    assert len(shelf[drawn.pixels]) == 2

    def overflow_all(_module: Any, _inputs: Any, outputs: Any) -> None:
        outputs[0][:, 0, 0, 0] = torch.inf

    with generator.policy.module.register_forward_hook(overflow_all):
        drawn = await generator.draw(REQUESTS, base, "rounds/00001")
    assert (drawn.records, drawn.pixels, len(drawn.failed)) == ([], None, 3)
    assert read_records(run / "rounds/00001") == []


async def test_images_are_stored_where_they_were_asked_for_before_the_answer(
    tiny_sd1_folder: Path, run: Storage, shelf: list[npt.NDArray[np.uint8]]
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    drawn = await Generator(make_config(tiny_sd1_folder), run).draw(REQUESTS, base, "evaluations/00000")
    found = {record.id: record for record in read_records(run / "evaluations/00000")}
    assert [found[request.id] for request in REQUESTS] == drawn.records
    pixels_BHWC = read_arrays(run / "evaluations/00000", "pixels", drawn.records)
    np.testing.assert_array_equal(shelf[drawn.pixels], pixels_BHWC)
    assert [record.look for record in drawn.records] == [look(pixels_HWC) for pixels_HWC in pixels_BHWC]


async def test_the_next_batch_is_drawn_while_one_is_stored(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator, batches = Generator(make_config(tiny_sd1_folder), run), []
    stored, drawn_twice = threading.Event(), threading.Event()

    def slow(folder: Storage, samples: Sequence[Sample]) -> list[SampleRecord]:
        assert stored.wait(60)
        return write_part(folder, samples)

    def watched(*arguments: Any) -> Any:
        answer = sampled(*arguments)
        batches.append(answer)
        if len(batches) == 2:
            drawn_twice.set()
        return answer

    monkeypatch.setattr(storing, "write_part", slow)
    monkeypatch.setattr(replica, "draw", watched)
    asked = [asyncio.create_task(generator.draw([request], base, "rounds/00000")) for request in REQUESTS[:2]]
    assert await asyncio.to_thread(drawn_twice.wait, 60)
    assert not any(task.done() for task in asked)
    stored.set()
    assert [(await task).records[0].id for task in asked] == [request.id for request in REQUESTS[:2]]


async def test_what_cannot_be_stored_is_an_error(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)

    def full(*_: Any) -> None:
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", full)
        with pytest.raises(UserError, match="no room"):
            await generator.draw(REQUESTS, base, "rounds/00000")
    assert len((await generator.draw(REQUESTS, base, "rounds/00000")).records) == 3


# -- drawn otherwise, and lean -----------------------------------------------------------------------------------------


def test_held_out_images_are_drawn_with_their_own_settings_and_rounds_as_before(
    tiny_sd1_folder: Path, run: Storage
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    config = make_config(tiny_sd1_folder)
    otherwise = {"steps": 4, "scheduler": "DDIMScheduler", "guidance_scale": 5.0}
    both = RunConfig.model_validate(config.model_dump() | {"evaluate": {"generate": otherwise}})
    generator = Generator(both, run)
    held_out = [SampleRequest(r.id, "evaluation", r.prompt, r.index, r.seed) for r in REQUESTS]
    as_rounds = draw(run, Generator(config, run), base)
    as_told = draw(run, Generator(make_config(tiny_sd1_folder, **otherwise), run), base)
    for _ in range(2):
        assert same_images(draw(run, generator, base), as_rounds)
        assert same_images(draw(run, generator, base, held_out), as_told)


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be on a GPU is on the CPU."""
    monkeypatch.setattr(replica, "pick_device", lambda *_: torch.device("cpu"))


@pytest.mark.parametrize("how", ["model", "group"])
def test_a_replica_that_offloads_draws_the_same_images_of_every_policy(
    tiny_sd1_folder: Path, run: Storage, kind: Kind, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the place of a card: how weights and texts move is not tested here, but who holds them is."""
    policies = publish(run, tiny_sd1_folder, kind, versions=2)
    plain = Generator(make_config(tiny_sd1_folder, kind), run)
    on_a_card(monkeypatch)
    generator = Generator(make_config(tiny_sd1_folder, kind, offload=how, device="cuda"), run)
    modules = list(generator.policy.module.modules())
    hooked = [module for module in modules if hasattr(module, {"model": "_hf_hook", "group": "_diffusers_hook"}[how])]
    assert hooked
    for policy in (policies[0], policies[1], policies[2], policies[0], policies[1]):
        assert same_images(draw(run, generator, policy), draw(run, plain, policy))


def test_groups_come_from_the_weights_that_were_loaded_last(
    tiny_sd1_folder: Path, run: Storage, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card they come from copies, which are made with the groups: after a policy is loaded they are new ones."""
    policies = publish(run, tiny_sd1_folder, kind, versions=1)
    on_a_card(monkeypatch)
    generator = Generator(make_config(tiny_sd1_folder, kind, offload="group", device="cuda"), run)

    def groups() -> list[Any]:
        registries = [getattr(module, "_diffusers_hook", None) for module in generator.policy.module.modules()]
        hooks = [registry.get_hook("group_offloading") for registry in registries if registry is not None]
        return [hook.group for hook in hooks if hook is not None]

    draw(run, generator, policies[0])
    before = groups()
    draw(run, generator, policies[0])
    assert before
    assert all(one is other for one, other in zip(groups(), before, strict=True))
    draw(run, generator, policies[1])
    assert not any(one is other for one, other in zip(groups(), before, strict=True))


def test_a_replica_warms_up_what_it_has_compiled_and_then_draws_the_same_images(
    tiny_sd1_folder: Path, run: Storage, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = publish(run, tiny_sd1_folder, kind, versions=1)
    expected = [draw(run, Generator(make_config(tiny_sd1_folder, kind), run), policy) for policy in policies]
    compiled: list[Any] = []
    rehearsed: list[tuple[int, set[bool]]] = []

    def watched(family: Any, texts: Any, prompts: list[str], *arguments: Any) -> Any:
        assert compiled
        rehearsed.append((len(prompts), _layers_in_use(family.denoiser)))
        return sampled(family, texts, prompts, *arguments)

    monkeypatch.setattr(replica, "compile_denoiser", compiled.append)
    with monkeypatch.context() as patch:
        patch.setattr(replica, "draw", watched)
        generator = Generator(make_config(tiny_sd1_folder, kind, compile=True, batch_size=3), run)
    assert compiled == [generator.policy.module]
    assert rehearsed == ([(3, {True}), (3, {False})] if kind == "lora" else [(3, set())])
    for policy, images in zip(policies, expected, strict=True):
        assert same_images(draw(run, generator, policy), images)


async def test_a_replica_finds_how_many_images_it_can_draw_before_it_is_asked_for_any(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    tried: list[int] = []

    def small(family: Any, texts: Any, prompts: list[str], *arguments: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sampled(family, texts, prompts, *arguments)

    on_a_card(monkeypatch)
    monkeypatch.setattr(replica, "emptied", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(replica, "share_reserved", lambda *_: 0.5)
    monkeypatch.setattr(replica, "draw", small)
    generator = Generator(make_config(tiny_sd1_folder, batch_size="auto", device="cuda"), run)
    assert await generator.found_batch_size() == 4
    assert tried == [1, 2, 4, 8]
    assert len((await generator.draw(REQUESTS, base, "rounds/00000")).records) == 3
    given = Generator(make_config(tiny_sd1_folder, batch_size=8), run)
    assert (await given.found_batch_size(), tried[4:]) == (8, [3])
