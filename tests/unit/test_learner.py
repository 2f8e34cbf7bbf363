"""One rank, many ranks, one step, many steps: the learner against what the objective says on paper."""

import copy
import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kto_ray.config import Adapter, Model, SamplingPolicy, Train
from kto_ray.diffusion import source
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.loading import DTYPES, load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.objectives.diffusion_kto import DiffusionKTO, ReferencePointName
from kto_ray.objectives.health import Health
from kto_ray.train.batches import Batch, LatentsInMemory, RoundData
from kto_ray.train.learner import Learner
from tests.unit.test_noise import alphas_cumprod

Kind = Literal["lora", "full"]
CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue square on white", "a green circle on black", "a white square")
FAST = {"global_batch": 8, "micro_batch": 8, "beta": 50.0, "epochs": 1, "learning_rate": 1e-3}


@cache
def better_than_the_base(folder: Path, adapter: Adapter) -> dict[str, Tensor]:
    """Weights of a policy that denoises all of a round's images better than the base does: g and z are above 0."""
    family = load_family(folder, Model(), CPU, torch.float32)
    torch.manual_seed(1)
    policy = make_policy(family, adapter)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    text_B = family.encode_prompts(PROMPTS * 2)
    for _ in range(10):
        clean_BCHW, noise_BCHW = torch.randn(2, 8, 4, 8, 8)
        timesteps_B = family.noise.timesteps(torch.rand(8))
        noisy_BCHW = family.noise.noisy(clean_BCHW, noise_BCHW, timesteps_B)
        prediction_BCHW = family.predict(policy.module, noisy_BCHW, timesteps_B, text_B)
        loss = (prediction_BCHW - family.noise.target(clean_BCHW, noise_BCHW, timesteps_B)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return policy.tensors()


def make_learner(
    folder: Path,
    kind: Kind = "lora",
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    rank: int = 0,
    ranks: int = 1,
    nudged: bool = True,
    **train: Any,
) -> Learner:
    """A learner whose policy has, unless `nudged` is False, already left the base, where every g is 0."""
    settings = FAST | {"adapter": Adapter(kind=kind, rank=4)} | train
    objective = {name: settings.pop(name) for name in DiffusionKTO.model_fields if name in settings}
    config = Train.model_validate({"objective": DiffusionKTO(**objective)} | settings)
    family = load_family(folder, Model(), CPU, torch.float32)
    torch.manual_seed(0)
    policy = make_policy(family, config.adapter)
    if nudged:
        policy.load(better_than_the_base(folder, config.adapter))
    return Learner(family, policy, config, 5, CPU, wrap, rank, ranks)


def make_round(index: int = 0, samples: int = 16) -> RoundData:
    rng = np.random.default_rng(index)
    return RoundData(
        round_index=index,
        latents=LatentsInMemory(rng.normal(size=(samples, 4, 8, 8)).astype(np.float32)),
        prompts=[PROMPTS[i % len(PROMPTS)] for i in range(samples)],
        desirable_N=rng.random(samples) < 0.5,
        seeds=[1000 * index + sample for sample in range(samples)],
        values_N=np.random.default_rng(index + 1).normal(size=samples),
    )


def latents(data: RoundData) -> npt.NDArray[np.float32]:
    assert isinstance(data.latents, LatentsInMemory)
    return data.latents.latents_NCHW


def batches_of(learner: Learner, data: RoundData) -> list[Batch]:
    """The batches that the learner would train on, without training."""
    batches: list[Batch] = []
    with mock.patch.object(learner, "_optimizer_step", lambda batch, health: batches.append(batch)):
        learner.train_round(data)
    return batches


def gradients_of(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Gradients of one step that is not taken; `max_grad_norm` must be out of the way."""
    with mock.patch.object(learner.optimizer, "step"), mock.patch.object(learner.scheduler, "step"):
        learner._optimizer_step(batch, Health())
    return {name: p.grad for name, p in learner.policy.module.named_parameters() if p.grad is not None}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], origin: dict[str, Tensor] | None = None) -> float:
    """How far apart two sets of tensors are, as a share of how far they are from the origin (or from zero)."""
    zero = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()} if origin is None else origin
    assert ours.keys() == theirs.keys() == zero.keys()
    return float((flat(ours) - flat(theirs)).norm() / (flat(theirs) - flat(zero)).norm())


def digest(module: nn.Module) -> str:
    """Of all weights but the adapter's."""
    state = {name: tensor for name, tensor in sorted(module.state_dict().items()) if "lora_" not in name}
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


# The loss and its gradient


def paper_loss(learner: Learner, batch: Batch, policy: nn.Module, reference: nn.Module, predicts_v: bool) -> Tensor:
    """Diffusion-KTO with Kahneman-Tversky utility and batch KL, in float64 and written from the paper."""
    kept = torch.from_numpy(alphas_cumprod())[(batch.level_B * 1000).long()][:, None, None, None]
    clean, noise, text = batch.clean_BCHW.double(), batch.noise_BCHW.double(), batch.text_B.tensors["text"].double()
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    target = kept.sqrt() * noise - (1 - kept).sqrt() * clean if predicts_v else noise
    timesteps = (batch.level_B * 1000).long()

    def error(module: nn.Module) -> Tensor:
        prediction: Tensor = module(noisy, timesteps, text).sample
        return ((prediction - target) ** 2).mean(dim=(1, 2, 3))

    with torch.no_grad():
        reference_error = error(reference)
    reward = reference_error - error(policy)
    z = max(0.0, float(reward.detach().mean()))
    assert z > 0
    w = torch.where(batch.desirable_B, 1.0, -1.0).double()
    weight = torch.where(batch.desirable_B, 1.5, 0.5).double()
    loss: Tensor = (weight * (1 - torch.sigmoid(w * learner.config.objective.beta * (reward - z)))).mean()
    return loss


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_gradient_is_that_of_the_paper(tiny_folder: Path, kind: Kind) -> None:
    learner = make_learner(tiny_folder, kind, max_grad_norm=1e9, desirable_weight=1.5, undesirable_weight=0.5)
    batch = batches_of(learner, make_round())[0]
    policy = copy.deepcopy(learner.policy.module).double()
    base = load_family(tiny_folder, Model(), CPU, torch.float64).denoiser
    loss = paper_loss(learner, batch, policy, base, predicts_v="sd2" in str(tiny_folder))
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert distance({n: g.double() for n, g in gradients_of(learner, batch).items()}, expected) < 1e-4


@pytest.mark.parametrize("reference_point", get_args(ReferencePointName))
def test_accumulated_micro_batches_are_one_big_batch(tiny_sd1_folder: Path, reference_point: str) -> None:
    settings: dict[str, Any] = {"reference_point": reference_point, "epochs": 0.5}
    origin = make_learner(tiny_sd1_folder, **settings).policy.tensors()
    big, small = (make_learner(tiny_sd1_folder, micro_batch=micro_batch, **settings) for micro_batch in (8, 2))
    (figures, _), (accumulated_figures, _) = big.train_round(make_round()), small.train_round(make_round())
    assert accumulated_figures == pytest.approx(figures, rel=1e-3, abs=1e-6)
    assert np.isfinite(list(figures.values())).all()
    assert distance(small.policy.tensors(), big.policy.tensors(), origin) < 1e-3
    assert (figures.get("z", 0) == 0) == (reference_point == "zero")


def test_accumulated_gradients_are_those_of_one_big_batch(tiny_folder: Path) -> None:
    big, small = (make_learner(tiny_folder, "full", micro_batch=size, max_grad_norm=1e9) for size in (8, 2))
    batch = batches_of(big, make_round())[0]
    assert distance(gradients_of(small, batch), gradients_of(big, batch)) < 1e-5


# Many ranks

DISTRIBUTED: dict[str, dict[str, Any]] = {
    "full, accumulated": {"kind": "full", "micro_batch": 2},
    "adapter, mismatched": {"kind": "lora", "reference_point": "mismatched_kl", "prompt_dropout": 0.5},
    "adapter, by noise": {"kind": "lora", "reference_point": "noise_mean", "noise_parts": 3, "micro_batch": 2},
    "adapter, mirrored": {"kind": "lora", "mirror": True, "reference_point": "noise_mean", "micro_batch": 2},
    "adapter, relative": {"kind": "lora", "relative": True, "reference_point": "noise_mean", "micro_batch": 2},
    "adapter, class mean": {"kind": "lora", "reference_point": "class_mean", "micro_batch": 2},
    "adapter, beta sets itself": {"kind": "lora", "target_margin": 1, "scale_by_noise": True, "noise_parts": 2},
    "full, safeguarded": {"kind": "full", "utility": "linear", "safeguard": True, "beta": 5, "micro_batch": 2},
    "adapter, of averaged weights": {"kind": "lora", "sampling_policy": SamplingPolicy(kind="ema", decay=0.5)},
    "adapter, own noise, stratified": {"kind": "lora", "own_noise": 0.5, "noise_draw": "stratified"},
    "adapter, logit-normal": {"kind": "lora", "noise_draw": "logit_normal", "gamma": None},
    "sft": {"kind": "lora", "objective": "sft", "micro_batch": 2},
    "csft": {"kind": "full", "objective": {"kind": "csft"}},
    "dpo": {"kind": "lora", "objective": {"kind": "dpo", "beta": 20}, "micro_batch": 2},
    "dpo of scores": {"kind": "lora", "objective": {"kind": "dpo", "beta": 20, "pairs": "scores"}},
    "nft": {"kind": "lora", "objective": "nft", "micro_batch": 2},
}
"""Every objective, and every option that an objective or the sampling of its steps has."""


def train_on_rank(rank: int, ranks: int, folder: Path, scratch: Path) -> None:
    """What a worker process does: two steps of every case."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/init", rank=rank, world_size=ranks)
    outcomes = {}
    for name, case in DISTRIBUTED.items():
        learner = make_learner(folder, wrap=DistributedDataParallel, rank=rank, ranks=ranks, **case)
        figures, draws = learner.train_round(make_round())
        weights = {"trained": learner.policy.tensors(), "published": learner.sampling.tensors()}
        outcomes[name] = {"figures": figures, "draws": draws.tolist(), **weights}
    torch.save(outcomes, scratch / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one_does(tiny_sd1_folder: Path, tmp_path: Path) -> None:
    arguments = (2, tiny_sd1_folder, tmp_path)
    torch.multiprocessing.spawn(train_on_rank, arguments, nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    for name, case in DISTRIBUTED.items():
        origin = make_learner(tiny_sd1_folder, **case).policy.tensors()
        alone = make_learner(tiny_sd1_folder, **case)
        figures, draws = alone.train_round(make_round())
        assert first[name]["draws"] == second[name]["draws"] == draws.tolist()
        assert first[name]["figures"] == second[name]["figures"] == pytest.approx(figures, rel=1e-3, abs=1e-6)
        for weights, expected in (("trained", alone.policy.tensors()), ("published", alone.sampling.tensors())):
            assert distance(first[name][weights], second[name][weights], origin) == 0
            # AdamW divides by the gradient's own size: where that is rounding noise, so is the step.
            assert distance(first[name][weights], expected, origin) < 1e-2


# What policy and reference are shown


def test_policy_and_reference_see_the_same_noise_and_the_same_dropped_prompts(
    tiny_sd1_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(tiny_sd1_folder, prompt_dropout=0.5)
    seen: list[tuple[bool, tuple[Any, ...]]] = []
    predict = learner.family.predict

    def spy(denoiser: nn.Module, *shown: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), shown))
        return predict(denoiser, *shown)

    monkeypatch.setattr(learner.family, "predict", spy)
    learner.train_round(make_round(samples=64))
    empty_TD = learner.family.encode_prompts([""]).tensors["text"][0]
    dropped = 0
    for (reference_has_grad, reference), (policy_has_grad, policy) in zip(seen[::2], seen[1::2], strict=True):
        assert (reference_has_grad, policy_has_grad) == (False, True)
        shown = [(*others, text_B.tensors["text"]) for *others, text_B in (policy, reference)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*shown, strict=True))
        dropped += sum(torch.equal(text_TD, empty_TD) for text_TD in policy[2].tensors["text"])
    assert len(seen) == 2 * 8
    assert 20 <= dropped <= 44  # of 64


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_prompt_or_every_prompt_can_be_dropped(tiny_sd1_folder: Path, share: float) -> None:
    learner = make_learner(tiny_sd1_folder, prompt_dropout=share)
    empty_TD = learner.family.encode_prompts([""]).tensors["text"][0]
    for batch in batches_of(learner, make_round()):
        assert {torch.equal(text_TD, empty_TD) for text_TD in batch.text_B.tensors["text"]} == {share == 1}


def prompts_of(learner: Learner, text_B: Conditioning) -> list[str]:
    known = ["", *PROMPTS]
    embeddings = learner.family.encode_prompts(known).tensors["text"]
    return [known[int((embeddings - text_TD).abs().sum((1, 2)).argmin())] for text_TD in text_B.tensors["text"]]


@pytest.mark.parametrize("different", [0, 1, 2, 12])
def test_mismatched_pairs_really_have_another_prompt(tiny_sd1_folder: Path, different: int) -> None:
    """Even if all other images of the batch share one prompt, and whatever prompts are dropped."""
    learner = make_learner(
        tiny_sd1_folder, reference_point="mismatched_kl", prompt_dropout=0.5, global_batch=16, micro_batch=16
    )
    data = make_round()
    prompts = [PROMPTS[1 + i % 3] if i < different else PROMPTS[0] for i in range(16)]
    data = RoundData(0, data.latents, prompts, np.ones(16, bool))  # one class, one pass: every sample once
    (batch,) = batches_of(learner, data)
    distance_BN = torch.cdist(batch.clean_BCHW.flatten(1), torch.from_numpy(latents(data)).flatten(1))
    own = [prompts[int(index)] for index in distance_BN.argmin(1)]
    mismatched = prompts_of(learner, batch.mismatched_text_B)
    if len(set(prompts)) == 1:
        assert mismatched == own
    else:
        assert all(theirs in set(prompts) - {ours} for ours, theirs in zip(own, mismatched, strict=True))


def test_noise_levels_stay_in_their_range(tiny_sd1_folder: Path) -> None:
    learner = make_learner(tiny_sd1_folder, noise_range=(0.5, 0.75), epochs=8)
    levels = torch.cat([batch.level_B for batch in batches_of(learner, make_round())])
    assert levels.min() >= 0.5
    assert levels.max() < 0.75
    assert levels.std() > 0.05


# Over steps and restarts


@pytest.mark.parametrize(
    "case",
    [
        {"kind": "lora"},
        {"kind": "full"},
        {"reference_point": "noise_mean", "scale_by_noise": True, "noise_parts": 2},
        {"target_margin": 1},
        {"mirror": True},
        {"sampling_policy": SamplingPolicy(kind="ema", decay=0.5)},
        {"sampling_policy": SamplingPolicy(kind="ema", decay=0.5, every="round"), "kind": "full"},
        {"utility": "linear", "safeguard": True, "beta": 5},
        {"objective": "sft"},
        {"objective": "csft"},
        {"objective": {"kind": "dpo", "beta": 20}},
        {"objective": "nft"},
        {"optimizer": "adafactor"},
        {"optimizer": "adafactor", "kind": "full"},
    ],
    ids=str,
)
def test_a_restarted_learner_goes_on_bit_for_bit(tiny_sd1_folder: Path, case: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"warmup_steps": 3, "weight_decay": 0.1, **case}
    learner = make_learner(tiny_sd1_folder, **settings)
    learner.train_round(make_round(0))
    checkpoint = io.BytesIO()
    torch.save(learner.state_dict(), checkpoint)
    expected, _ = learner.train_round(make_round(1))

    restarted = make_learner(tiny_sd1_folder, nudged=False, **settings)
    checkpoint.seek(0)
    restarted.load_state_dict(torch.load(checkpoint, weights_only=True))
    figures, _ = restarted.train_round(make_round(1))
    assert figures == expected
    assert restarted.policy.proves(learner.policy.tensors())
    assert distance(restarted.sampling.tensors(), learner.sampling.tensors()) == 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_reference_stands_still(tiny_sd1_folder: Path, kind: Kind) -> None:
    files = source.weight_files(tiny_sd1_folder / "unet", None)
    on_disk = [file.read_bytes() for file in files]
    learner = make_learner(tiny_sd1_folder, kind, nudged=False)
    with learner.policy.reference() as reference:
        in_memory = digest(reference)
    before = learner.policy.tensors()
    for index in range(2):
        learner.train_round(make_round(index))
    assert not learner.policy.proves(before)
    with learner.policy.reference() as reference:
        assert digest(reference) == in_memory

    restarted = make_learner(tiny_sd1_folder, kind, nudged=False)
    restarted.load_state_dict(learner.state_dict())
    with restarted.policy.reference() as reference:
        assert digest(reference) == in_memory
    assert [file.read_bytes() for file in files] == on_disk


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_explains_the_desirable_better_than_the_undesirable(tiny_sd1_folder: Path, kind: Kind) -> None:
    """From the untouched base, where every g is 0."""
    settings: dict[str, Any] = {"epochs": 15, "prompt_dropout": 0.1, "gamma": 0.5, "beta": 20.0, "learning_rate": 3e-3}
    learner = make_learner(tiny_sd1_folder, kind, nudged=False, **settings)
    data = make_round()
    pattern = np.where(data.desirable_N, 1, -1)[:, None, None, None] * np.linspace(-2, 2, 8, dtype=np.float32)
    data = RoundData(
        0, LatentsInMemory(latents(data) * 0.1 + pattern.astype(np.float32)), data.prompts, data.desirable_N
    )
    first, _ = learner.train_round(data)
    figures, _ = learner.train_round(RoundData(1, data.latents, data.prompts, data.desirable_N))
    assert figures["g_desirable"] > figures["g_undesirable"]
    assert figures["loss"] < first["loss"] < 0.5


def test_a_round_without_verdicts_changes_nothing(tiny_sd1_folder: Path) -> None:
    learner = make_learner(tiny_sd1_folder)
    before = learner.policy.tensors()
    nothing = RoundData(0, LatentsInMemory(np.zeros((0, 4, 8, 8), np.float32)), [], np.zeros(0, bool))
    figures, draws = learner.train_round(nothing)
    assert (figures, draws.tolist()) == ({}, [])
    assert learner.policy.proves(before)


@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_memory_savers_leave_the_gradient_as_it_is(tiny_sd1_folder: Path, extra: dict[str, Any]) -> None:
    plain, saving = (make_learner(tiny_sd1_folder, max_grad_norm=1e9, **settings) for settings in ({}, extra))
    batch = batches_of(plain, make_round())[0]
    assert distance(gradients_of(saving, batch), gradients_of(plain, batch)) < (0.2 if "dtype" in extra else 1e-5)


# What an objective needs, and gets


def test_without_undesirable_samples_only_the_desirable_are_drawn(tiny_sd1_folder: Path) -> None:
    data = make_round()
    learner = make_learner(tiny_sd1_folder, objective="sft")
    figures, draws = learner.train_round(data)
    assert draws[~data.desirable_N].sum() == 0
    assert draws[data.desirable_N].sum() == 16  # as many steps as objectives that take both
    assert not {"accuracy", "g_desirable", "z"} & figures.keys()


@pytest.mark.parametrize("objective", ["sft", {"kind": "dpo"}])
def test_what_a_round_does_not_have_is_not_trained_on(tiny_sd1_folder: Path, objective: Any) -> None:
    data = make_round()
    data = RoundData(0, data.latents, data.prompts, np.zeros(16, bool))
    learner = make_learner(tiny_sd1_folder, objective=objective)
    before = learner.policy.tensors()
    figures, draws = learner.train_round(data)
    assert (figures, draws.sum()) == ({}, 0)
    assert learner.policy.proves(before)


def test_pairs_share_prompt_noise_timestep_and_dropout(tiny_sd1_folder: Path) -> None:
    data = make_round()
    learner = make_learner(tiny_sd1_folder, objective={"kind": "dpo"}, prompt_dropout=0.5, own_noise=0.3, epochs=4)
    for batch in batches_of(learner, data):
        assert batch.desirable_B.tolist() == [True, False] * 4
        for shared_B in (batch.noise_BCHW, batch.level_B, batch.text_B.tensors["text"]):
            assert torch.equal(shared_B[0::2], shared_B[1::2])
        assert not torch.equal(batch.clean_BCHW[0::2], batch.clean_BCHW[1::2])


def test_pairs_of_scores_go_by_them_whatever_the_verdicts_are(tiny_sd1_folder: Path) -> None:
    data = replace(make_round(), desirable_N=np.ones(16, bool))
    learner = make_learner(tiny_sd1_folder, objective={"kind": "dpo", "pairs": "scores"}, epochs=4)
    assert data.values_N is not None
    for batch in batches_of(learner, data):
        assert batch.desirable_B.tolist() == [True, False] * 4  # the better one is the batch's desirable
        drawn = [
            int(np.flatnonzero((latents(data) == clean_CHW.numpy()).all((1, 2, 3)))[0])
            for clean_CHW in batch.clean_BCHW
        ]
        for better, worse in zip(drawn[0::2], drawn[1::2], strict=True):
            assert data.values_N[better] > data.values_N[worse]
            assert data.prompts[better] == data.prompts[worse]
    figures, _ = learner.train_round(data)
    assert 0 <= figures["accuracy"] <= 1


def test_the_verdict_is_told_in_the_prompt(tiny_sd1_folder: Path) -> None:
    objective = {"kind": "csft", "desirable_prefix": "red ", "undesirable_prefix": "blue "}
    learner = make_learner(tiny_sd1_folder, objective=objective, prompt_dropout=0)
    data = make_round()
    for batch in batches_of(learner, data):
        prefixes = ["red " if yes else "blue " for yes in batch.desirable_B]
        own = [
            data.prompts[int(np.flatnonzero((latents(data) == clean_CHW.numpy()).all((1, 2, 3)))[0])]
            for clean_CHW in batch.clean_BCHW
        ]
        expected_BTD = learner.family.encode_prompts([a + b for a, b in zip(prefixes, own, strict=True)]).tensors[
            "text"
        ]
        torch.testing.assert_close(batch.text_B.tensors["text"], expected_BTD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_own_noise_is_what_the_sampler_began_with(tiny_sd1_folder: Path, dtype: Any) -> None:
    learner = make_learner(tiny_sd1_folder, own_noise=1.0)
    plain = make_round()
    data = RoundData(0, plain.latents, plain.prompts, plain.desirable_N, plain.seeds, dtype)
    family = load_family(tiny_sd1_folder, Model(), CPU, DTYPES[dtype])
    pixels, begun_with = 8 * family.pipeline.vae_scale_factor, dict[int, Tensor]()
    for seed in data.seeds:
        began = family.pipeline.prepare_latents(
            *(1, 4, pixels, pixels, DTYPES[dtype], CPU), generator=[torch.Generator("cpu").manual_seed(seed)]
        )
        begun_with[seed] = began[0].float() / family.pipeline.scheduler.init_noise_sigma
    for batch in batches_of(learner, data):
        for clean_CHW, noise_CHW in zip(batch.clean_BCHW, batch.noise_BCHW, strict=True):
            (place,) = np.flatnonzero((latents(data) == clean_CHW.numpy()).all((1, 2, 3)))
            assert torch.equal(noise_CHW, begun_with[data.seeds[int(place)]])


def test_some_noise_is_their_own_and_the_rest_is_as_without(tiny_sd1_folder: Path) -> None:
    data = make_round(samples=64)
    with_own, without = (batches_of(make_learner(tiny_sd1_folder, own_noise=share), data) for share in (0.25, 0.0))
    same = [
        torch.equal(ours, theirs)
        for own, plain in zip(with_own, without, strict=True)
        for ours, theirs in zip(own.noise_BCHW, plain.noise_BCHW, strict=True)
    ]
    assert 8 <= same.count(False) <= 26  # of 64
    assert all(torch.equal(a.level_B, b.level_B) for a, b in zip(with_own, without, strict=True))


# Options of Diffusion-KTO


def test_the_safeguard_scales_the_undesirable_gradient_by_its_closed_form(tiny_sd1_folder: Path) -> None:
    settings: dict[str, Any] = {"utility": "linear", "beta": 5.0, "max_grad_norm": 1e9, "undesirable_weight": 20.0}
    plain = make_learner(tiny_sd1_folder, **settings)
    batch = batches_of(plain, make_round())[0]
    both = flat(gradients_of(plain, batch))
    learner = make_learner(tiny_sd1_folder, safeguard=True, micro_batch=2, **settings)
    safe = flat(gradients_of(learner, batch))
    only_desirable = make_learner(tiny_sd1_folder, **settings | {"undesirable_weight": 1e-9})
    desirable = flat(gradients_of(only_desirable, batch))
    undesirable = both - desirable
    inner = float(desirable @ undesirable)
    assert inner < 0, "they must be at odds, or nothing is scaled"
    scale = min(1.0, float(desirable @ desirable) / -inner)
    assert scale < 1
    torch.testing.assert_close(safe, desirable + scale * undesirable, rtol=1e-3, atol=1e-5)
    assert float(desirable @ safe) >= -1e-4


def test_a_running_average_is_what_is_published(tiny_sd1_folder: Path) -> None:
    learner = make_learner(tiny_sd1_folder, sampling_policy=SamplingPolicy(kind="ema", decay=0.75))
    expected = learner.policy.tensors()
    begun = dict(expected)
    after_step = learner.sampling.after_step

    def spy() -> None:
        after_step()
        for name, weight in learner.policy.tensors().items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight

    with mock.patch.object(learner.sampling, "after_step", spy):
        learner.train_round(make_round())
    assert distance(learner.sampling.tensors(), expected, begun) < 1e-4
    assert distance(learner.sampling.tensors(), learner.policy.tensors(), begun) > 0.1
    trained = learner.policy.tensors()
    with learner.sampling.held():
        assert learner.policy.proves(learner.sampling.tensors())
    assert learner.policy.proves(trained)


@pytest.mark.parametrize("draw", ["uniform", "stratified", "logit_normal"])
def test_noise_levels_are_drawn_as_asked(tiny_sd1_folder: Path, draw: str) -> None:
    learner = make_learner(
        tiny_sd1_folder, noise_draw=draw, noise_range=(0.25, 0.75), global_batch=64, micro_batch=64, epochs=8
    )
    for batch in batches_of(learner, make_round(samples=128)):
        place_B = (batch.level_B - 0.25) / 0.5
        parts = (place_B * 64).long()
        assert (len(set(parts.tolist())) == 64) == (draw == "stratified")
        assert 0 <= float(place_B.min()) <= float(place_B.max()) < 1
        middle = float(((place_B > 0.25) & (place_B < 0.75)).float().mean())
        expected = 0.728 if draw == "logit_normal" else 0.5  # P(|N| < log 3)
        assert middle == pytest.approx(expected, abs=0.02 if draw == "stratified" else 0.2)
