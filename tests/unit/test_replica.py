"""The generator without Ray Serve: whose images it draws, and when it refuses."""

import asyncio
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from kto_ray.config import Adapter, RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.families import load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.generate import replica
from kto_ray.generate.replica import Generator
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest
from kto_ray.storage import Storage
from tests.pipelines import write_pipeline

Kind = Literal["lora", "full"]
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
    policies = [store.publish_base(source.reference_digest(folder), source.component_digests(folder))]
    policy = make_policy(load_family(folder, None, torch.device("cpu"), torch.float32), Adapter(kind=kind, rank=2))
    for version in range(1, versions + 1):
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        policies.append(store.publish(version, policy.tensors(), policy.metadata()))
    return policies


def draw(generator: Generator, policy: PolicyRef, requests: list[SampleRequest] = REQUESTS) -> list[Sample]:
    return asyncio.run(generator.draw(requests, policy)).samples


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
        samples = draw(generator, policy)
        assert [(s.id, s.stage, s.prompt, s.index, s.seed) for s in samples] == [
            (r.id, r.stage, r.prompt, r.index, r.seed) for r in REQUESTS
        ]
        assert all(sample.policy == policy for sample in samples)


def test_another_version_draws_other_images_and_the_first_comes_back(
    tiny_folder: Path, run: Storage, kind: Kind
) -> None:
    policies = publish(run, tiny_folder, kind, versions=2)
    generator = Generator(make_config(tiny_folder, kind), run)
    images = {policy: draw(generator, policy) for policy in policies}
    for policy in (policies[1], policies[0], policies[2], policies[1]):
        again = draw(generator, policy)
        for other, theirs in images.items():
            assert same_images(again, theirs) == (other == policy)


def test_a_fresh_replica_draws_the_same_images(tiny_sd1_folder: Path, run: Storage, kind: Kind) -> None:
    _, policy = publish(run, tiny_sd1_folder, kind, versions=1)
    config = make_config(tiny_sd1_folder, kind)
    assert same_images(draw(Generator(config, run), policy), draw(Generator(config, run), policy))


def test_the_adapter_kind_does_not_touch_the_base(tiny_sd1_folder: Path, run: Storage) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    lora, full = (Generator(make_config(tiny_sd1_folder, kind), run) for kind in ("lora", "full"))
    assert same_images(draw(lora, base), draw(full, base))


def test_requests_for_two_versions_at_once_do_not_mix(tiny_sd1_folder: Path, run: Storage) -> None:
    policies = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(tiny_sd1_folder), run)
    expected = [draw(generator, policy) for policy in policies]

    async def both() -> list[list[Sample]]:
        order = [0, 1, 0, 1]
        answers = await asyncio.gather(*(generator.draw(REQUESTS, policies[i]) for i in order))
        return [answer.samples for answer in answers]

    for samples, i in zip(asyncio.run(both()), [0, 1, 0, 1], strict=True):
        assert same_images(samples, expected[i])


def test_drawing_leaves_the_event_loop_free(tiny_sd1_folder: Path, run: Storage) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)
    threads: list[threading.Thread] = []
    generator.policy.module.register_forward_hook(lambda *_: threads.append(threading.current_thread()))
    draw(generator, base)
    assert threads
    assert threading.main_thread() not in threads


async def test_a_cancelled_draw_leaves_the_pipeline_before_another_enters_it(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(tiny_sd1_folder), run)
    entered, leave, inside, seen = threading.Event(), threading.Event(), 0, []
    sampled = replica.draw

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
    given_up = asyncio.create_task(generator.draw(REQUESTS, first))
    await asyncio.to_thread(entered.wait)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    after = asyncio.create_task(generator.draw(REQUESTS, base))
    await asyncio.sleep(0.5)  # if it could enter, it would by now
    leave.set()
    assert {sample.policy for sample in (await after).samples} == {base}
    assert seen == [(1, first, first), (1, base, base)]


async def test_a_cancelled_draw_that_has_not_begun_never_does(
    tiny_sd1_folder: Path, run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)
    entered, leave, drawn = threading.Event(), threading.Event(), []
    sampled = replica.draw

    def watched(family: Any, prompts: list[str], *arguments: Any) -> Any:
        entered.set()
        leave.wait()
        drawn.append(prompts)
        return sampled(family, prompts, *arguments)

    monkeypatch.setattr(replica, "draw", watched)
    first = asyncio.create_task(generator.draw(REQUESTS[:1], base))
    await asyncio.to_thread(entered.wait)
    queued = asyncio.create_task(generator.draw(REQUESTS[1:2], base))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    last = asyncio.create_task(generator.draw(REQUESTS[2:], base))
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
    expected = draw(generator, first)
    tamper(run, 2)
    for _ in range(2):  # asking again does not help
        with pytest.raises(DigestError, match=r"policy 2 .* has digest"):
            draw(generator, second)
    assert same_images(draw(generator, first), expected)
    assert draw(generator, base)


def test_another_digest_than_the_published_one_makes_no_samples(tiny_sd1_folder: Path, run: Storage) -> None:
    base, first = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(tiny_sd1_folder), run)
    for wrong in (PolicyRef(1, base.digest), PolicyRef(0, first.digest)):
        with pytest.raises(DigestError):
            draw(generator, wrong)


def test_weights_that_do_not_take_effect_make_no_samples(
    tiny_sd1_folder: Path, run: Storage, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, second = publish(run, tiny_sd1_folder, kind, versions=2)
    generator = Generator(make_config(tiny_sd1_folder, kind), run)
    expected = draw(generator, first)
    load = generator.policy.load
    with monkeypatch.context() as patched:
        patched.setattr(generator.policy, "load", lambda tensors: load({n: tensors[n] / 2 for n in tensors}))
        with pytest.raises(DigestError, match="does not hold its weights"):
            draw(generator, second)
    # Nor does what the failure left in the model pass for the version before.
    assert same_images(draw(generator, first), expected)


def test_another_base_model_makes_no_samples(tiny_sd1_folder: Path, tmp_path: Path, run: Storage) -> None:
    policies = publish(run, tiny_sd1_folder, "lora", versions=1)
    generator = Generator(make_config(write_pipeline(tmp_path / "other", seed=1)), run)
    for policy in policies:
        with pytest.raises(DigestError, match="every node must load the same weights"):
            draw(generator, policy)


def test_unknown_versions_are_not_found(tiny_sd1_folder: Path, run: Storage) -> None:
    publish(run, tiny_sd1_folder, "lora", versions=0)
    with pytest.raises(FileNotFoundError):
        draw(Generator(make_config(tiny_sd1_folder), run), PolicyRef(7, "0" * 64))


def test_an_image_that_overflows_is_a_sample_with_an_error(tiny_sd1_folder: Path, run: Storage) -> None:
    (base,) = publish(run, tiny_sd1_folder, "lora", versions=0)
    generator = Generator(make_config(tiny_sd1_folder), run)

    def overflow(_module: Any, _inputs: Any, outputs: Any) -> None:
        outputs[0][1, 0, 0, 0] = torch.inf

    with generator.policy.module.register_forward_hook(overflow):
        samples = draw(generator, base)
    assert [sample.error for sample in samples] == [None, "its latents or pixels, in float32, are not finite", None]
    assert not samples[1].pixels_HWC.any()
