"""Full fine-tuning in shards: two ranks come to what one comes to, hold half of it, and others go on from there."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from kto_ray.config import Adapter, Model, Train
from kto_ray.diffusion.loading import DTYPES, load_family
from kto_ray.diffusion.policy import FullPolicy, make_policy
from kto_ray.diffusion.sharding import Sharding, blocks_of, local
from kto_ray.errors import UserError
from kto_ray.train import checkpointing
from kto_ray.train.coordinator import TrainingReport
from kto_ray.train.learner import Learner
from tests.unit.test_learner import CPU, distance, make_round

SETTINGS = {"global_batch": 12, "micro_batch": 12, "epochs": 1, "learning_rate": 1e-4, "adapter": Adapter(kind="full")}
CASES: dict[str, dict[str, Any]] = {
    "following": {
        "objective": {"kind": "diffusion_kto", "beta": 50.0, "reference": "round", "reference_point": "noise_mean"},
        "sampling_policy": {"kind": "ema", "decay": 0.5},
        "micro_batch": 2,
    },
    "bfloat16": {"objective": "nft", "dtype": "bfloat16", "gradient_checkpointing": True},
}
MOST_APART = {"following": 1e-5, "bfloat16": 0.2}
"""Of the way that the weights have come. Gradients of 8 bits may point the other way where they are small, and AdamW
makes as large a step of these as of others."""


def make_learner(folder: Path, rank: int = 0, ranks: int = 1, strategy: str = "fsdp", **more: Any) -> Learner:
    config = Train.model_validate(SETTINGS | {"strategy": strategy} | more)
    family = load_family(folder, Model(), CPU, torch.float32)
    shard = Sharding(CPU, DTYPES[config.dtype]) if strategy == "fsdp" else None
    policy = make_policy(family, config.adapter, shard)
    return Learner(family, policy, config, 5, CPU, rank=rank, ranks=ranks)


def train(learner: Learner, index: int) -> None:
    """A round as a worker trains it, with a reference that follows where the objective wants one."""
    if learner.objective.needs.reference == "round":
        learner.policy.refer_to(learner.sampling.tensors())
    learner.train_round(make_round(index, samples=12))


def outcome(learner: Learner) -> dict[str, Any]:
    return {"trained": learner.policy.tensors(), "published": learner.sampling.tensors()}


def held(learner: Learner) -> int:
    """Bytes of weights, gradients, optimizer and reference on this rank, between steps."""
    assert isinstance(learner.policy, FullPolicy)
    with learner.policy.reference() as reference:
        modules: Iterable[nn.Module] = (learner.policy.module, reference)
        weights = [tensor for module in modules for tensor in module.parameters()]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    state = [value for of in learner.optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
    return sum(local(tensor).nbytes for tensor in [*weights, *gradients, *state])


def train_on_rank(rank: int, _: int, folder: Path, scratch: Path) -> None:
    """What a worker process does in every case: a round, a checkpoint, another round; the others only the last."""
    torch.set_num_threads(1)
    for ranks in (2, 3, 1):
        if rank < ranks:
            init = f"file://{scratch}/init-{ranks}"
            torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks)
            outcomes = {name: begin_or_go_on(rank, ranks, folder, scratch / name) for name in CASES}
            torch.save(outcomes, scratch / f"rank-{rank}-of-{ranks}.pt")
            torch.distributed.destroy_process_group()


def begin_or_go_on(rank: int, ranks: int, folder: Path, checkpoint: Path) -> dict[str, Any]:
    learner = make_learner(folder, rank, ranks, **CASES[checkpoint.name])
    if ranks == 2:
        train(learner, 0)
        checkpoint.mkdir(exist_ok=True)
        checkpointing.save(learner, 1, TrainingReport(1, {"loss": 0.5}, {}), checkpoint)
    else:
        version, report = checkpointing.load(learner, checkpoint)
        assert (version, report.figures) == (1, {"loss": 0.5})
    train(learner, 1)
    return outcome(learner) | {"held": held(learner)}


def test_two_ranks_come_to_what_one_does_with_half_of_it_each_and_others_go_on(
    tiny_sd1_folder: Path, tmp_path: Path
) -> None:
    arguments = (3, tiny_sd1_folder, tmp_path)
    torch.multiprocessing.spawn(train_on_rank, arguments, nprocs=3)  # type: ignore[attr-defined, no-untyped-call]
    first, second, *resumed = (
        torch.load(tmp_path / f"rank-{of}.pt", weights_only=True) for of in ("0-of-2", "1-of-2", "0-of-3", "0-of-1")
    )
    for name, case in CASES.items():
        alone = make_learner(tiny_sd1_folder, strategy="ddp", **case)
        began = alone.policy.tensors()
        train(alone, 0)
        train(alone, 1)
        expected = outcome(alone)
        for what in ("trained", "published"):
            assert distance(first[name][what], second[name][what]) == 0
            for other in (first, *resumed):
                assert distance(other[name][what], expected[what], began) < MOST_APART[name], name
        assert first[name]["held"] < 0.6 * held(alone)


def test_a_checkpoint_without_shards_is_not_one_of_a_run_in_shards(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    learner = make_learner(tiny_sd1_folder, strategy="ddp", objective="nft")
    checkpointing.save(learner, 1, TrainingReport(1, {}, {}), tmp_path)
    assert checkpointing.load(learner, tmp_path)[0] == 1
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(UserError, match=r"train\.strategy: ddp, but the checkpoint .* give train\.strategy=fsdp"):
        checkpointing.load(learner, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"adapter": Adapter()}, "adapter.kind lora: .* a frozen base is not sharded; give strategy ddp"),
        ({"optimizer": "adafactor"}, "optimizer adafactor: it takes no shards; give adamw"),
        ({"objective": {"kind": "diffusion_kto", "safeguard": True}}, "objective.safeguard: .* give strategy ddp"),
    ],
)
def test_what_cannot_be_sharded_is_said(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Train.model_validate(SETTINGS | {"strategy": "fsdp"} | wrong)


def test_every_block_is_sharded_before_what_it_is_in(tiny_sd1_folder: Path) -> None:
    denoiser = load_family(tiny_sd1_folder, Model(), CPU, torch.float32).denoiser
    blocks = blocks_of(denoiser)
    names = {module: name for name, module in denoiser.named_modules()}
    assert "mid_block.attentions.0.transformer_blocks.0" in {names[block] for block in blocks}
    for place, block in enumerate(blocks):
        assert not any(names[inner].startswith(f"{names[block]}.") for inner in blocks[place + 1 :])
