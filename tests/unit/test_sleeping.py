"""Sleep: nothing is left where a role worked, and it wakes as if nothing had been."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kto_ray.records import Prompt
from kto_ray.score.actor import ScorerActor, plain
from kto_ray.sleeping import Sleeper, held_by
from kto_ray.storage import Storage
from kto_ray.train.learner import Learner
from tests.unit import test_sharding
from tests.unit.test_actor import images, prompts
from tests.unit.test_learner import CPU, Kind, make_learner, make_round
from tests.unit.test_replica import Generator, draw, make_config, publish, same_images
from tests.unit.test_replica import shelf as shelf  # pixels stay in this process


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def held(modules: list[nn.Module]) -> int:
    """Bytes of what modules have in reach."""
    return sum(tensor.nbytes for module in modules for tensor in [*module.parameters(), *module.buffers()])


def test_tensors_leave_and_come_back_as_the_objects_and_the_bits_that_they_were() -> None:
    layer, loose = nn.Linear(8, 4), torch.randn(3, 5).t()
    state = {"mean": {0: loose}, "steps": [torch.tensor(3.0), "no tensor"]}
    tied = nn.Linear(8, 4)
    tied.weight = layer.weight
    tensors = [layer.weight, layer.bias, tied.bias, loose]
    before = [(tensor.clone(), tensor.stride()) for tensor in tensors]
    sleeper = Sleeper(CPU, lambda: [layer, tied, state])
    for _ in range(2):
        sleeper.sleep()
        sleeper.sleep()
        assert sleeper.asleep
        assert sleeper.sleeping_bytes == sum(tensor.nbytes for tensor, _ in before) + 4
        assert [tensor.numel() for tensor in tensors] == [0] * 4
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 8))
        sleeper.wake()
        sleeper.wake()
        assert not sleeper.asleep
        for tensor, (bits, stride) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, bits)
            assert tensor.stride() == stride
    assert tied.weight is layer.weight
    assert sleeper.seconds > 0


def test_what_lies_elsewhere_stays_there() -> None:
    """As the numbers that an optimizer on a card keeps in main memory."""
    step, weight = torch.tensor(3.0), torch.ones(2, device="meta")
    sleeper = Sleeper(CPU, lambda: [step, weight])
    sleeper.sleep()
    assert (step.numel(), weight.numel()) == (0, 2)
    sleeper.wake()
    assert step == 3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_replica_sleeps_until_the_next_request_and_draws_the_same_images(
    tiny_sd1_folder: Path, tmp_path: Path, kind: Kind
) -> None:
    run = Storage(str(tmp_path / "run"))
    _, policy = publish(run, tiny_sd1_folder, kind, versions=1)
    generator = Generator(make_config(tiny_sd1_folder, kind), run)
    before = draw(run, generator, policy)
    modules = [part for part in generator.family.pipeline.components.values() if isinstance(part, nn.Module)]
    awake = held(modules)
    assert awake > 10_000

    asyncio.run(generator.sleep())
    assert held(modules) == 0
    assert generator._sleeper.sleeping_bytes >= awake
    assert same_images(draw(run, generator, policy), before)
    assert held(modules) == awake
    assert generator.holds == policy  # nothing was loaded anew


class Office:
    """A coordinator whose workers train, or do not."""

    def __init__(self) -> None:
        self.training, self.waited = False, 0

    @property
    def is_training(self) -> Any:
        return self

    async def remote(self) -> bool:
        return self.training

    @property
    def wait_others(self) -> "Waiting":
        return Waiting(self)


@dataclass
class Waiting:
    office: Office

    def remote(self) -> None:
        self.office.waited += 1


def test_a_replica_that_nobody_told_finds_out_that_others_have_their_turn(
    tiny_sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    office, run = Office(), Storage(str(tmp_path / "run"))
    generator = Generator(make_config(tiny_sd1_folder), run, office)
    assert office.waited == 1  # with its model
    asyncio.run(generator.check_health())
    assert not generator._sleeper.asleep
    office.training = True
    asyncio.run(generator.check_health())
    generator._falling_asleep.result()
    assert generator._sleeper.asleep


MANY_STATES: dict[str, Any] = {
    "lora": {"kind": "lora", "sampling_policy": {"kind": "ema"}, "reference": "round"},
    "full ddp": {"kind": "full", "sampling_policy": {"kind": "ema"}, "wrap": DistributedDataParallel},
    "others": {"kind": "lora", "optimizer": "adafactor", "reference": "ema", "gradient_checkpointing": True},
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("settings", MANY_STATES.values(), ids=list(MANY_STATES))
def test_a_learner_sleeps_between_rounds_and_comes_to_the_same(tiny_sd1_folder: Path, settings: dict[str, Any]) -> None:
    sleepy, restless = (make_learner(tiny_sd1_folder, **settings) for _ in range(2))
    for index in range(2):
        for learner in (sleepy, restless):
            if learner.objective.needs.reference == "round":
                learner.policy.refer_to(learner.sampling.tensors())
            learner.train_round(make_round(index, samples=8))
        sleepy.sleep()
        with sleepy.policy.reference() as reference:
            assert held([sleepy.policy.module, reference]) == 0
        assert optimizer_bytes(sleepy) == 0 < optimizer_bytes(restless)
        sleepy.wake()
    assert same(sleepy.state_dict(), restless.state_dict())


@pytest.mark.usefixtures("process_group")
def test_shards_sleep_too(tiny_sd1_folder: Path) -> None:
    sleepy, restless = (test_sharding.make_learner(tiny_sd1_folder, **test_sharding.CASES["following"]) for _ in "12")
    for index in range(2):
        for learner in (sleepy, restless):
            test_sharding.train(learner, index)
        sleepy.sleep()
        sleepy.wake()
    ours, theirs = (test_sharding.outcome(learner) for learner in (sleepy, restless))
    assert same(ours, theirs)


def optimizer_bytes(learner: Learner) -> int:
    return sum(value.nbytes for state in learner.optimizer.state.values() for value in state.values())


def same(ours: Any, theirs: Any) -> bool:
    """To the last bit, as deep as they go."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@dataclass
class Tower:
    layer: nn.Module = field(default_factory=lambda: nn.Linear(3, 1))


class DeepScorer:
    """A plug-in that has its module in a part of a part, and knows nothing of sleep."""

    name, version = "deep", "1"

    def __init__(self) -> None:
        self.towers = {"image": [Tower()]}

    @torch.no_grad()
    def score(self, images_BHWC: Any, prompts: list[Prompt]) -> list[float]:
        mean_BC = torch.from_numpy(images_BHWC.astype(np.float32)).mean((1, 2))
        return [float(value) for value in self.towers["image"][0].layer(mean_BC)]


def test_a_scorer_that_knows_nothing_of_sleep_sleeps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = ScorerActor(f"{__name__}:DeepScorer", {})
    assert isinstance(actor.scorer, DeepScorer)
    layer, shown = actor.scorer.towers["image"][0].layer, images(2)
    asked = ((shown.tobytes(), shown.shape), plain(prompts("a", "b")))
    before = actor.score_plain(*asked)
    assert held_by(actor.scorer) == [layer]
    actor.sleep()  # it has been on no card
    assert held([layer]) == 16
    monkeypatch.setattr("kto_ray.score.actor.on_card", lambda: CPU)
    actor.sleep()
    assert held([layer]) == 0
    assert actor.score_plain(*asked) == before
    assert held([layer]) == 16
