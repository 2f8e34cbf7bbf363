"""Policy and reference inside a denoiser: what is trained, published, loaded and proven."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from kto_ray.config import Adapter, Model
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import Policy, make_policy
from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore
from kto_ray.storage import Storage

Kind = Literal["lora", "full"]
CPU = torch.device("cpu")


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    return load_family(folder, Model(), CPU, dtype)


def nudge(policy: Policy, seed: int = 1) -> None:
    """Change every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def predict(family: Family, module: nn.Module) -> Tensor:
    """What a denoiser says of the same two noisy latents and prompts each time."""
    dtype = next(module.parameters()).dtype
    noisy_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7)).to(dtype)
    text_B = family.encode_prompts(["a red circle on black", "a blue square"])
    return family.predict(module, noisy_BCHW, torch.tensor([100, 800]), text_B).float()


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for the last bits: torch multiplies by trainable and by frozen weights in another order."""
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def change_one_weight(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed[sorted(changed)[-1]].view(-1)[-1] += 0.5
    return changed


def test_a_fresh_policy_is_the_base_model(tiny_folder: Path, kind: Kind) -> None:
    base = load(tiny_folder)
    family = load(tiny_folder)
    policy = make_policy(family, Adapter(kind=kind, rank=2))
    assert same(predict(family, policy.module), predict(base, base.denoiser))


def test_the_reference_stays_the_base_model_while_the_policy_trains(tiny_folder: Path, kind: Kind) -> None:
    base = load(tiny_folder)
    family = load(tiny_folder)
    policy = make_policy(family, Adapter(kind=kind, rank=2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    noisy_BCHW, text_B = torch.randn(2, 4, 8, 8), family.encode_prompts(["a circle", "a square"])
    for _ in range(3):
        with policy.reference() as reference, torch.no_grad():
            family.predict(reference, noisy_BCHW, torch.tensor([100, 800]), text_B)
        loss = family.predict(policy.module, noisy_BCHW, torch.tensor([100, 800]), text_B).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    expected = predict(base, base.denoiser)
    assert not torch.allclose(predict(family, policy.module), expected, atol=1e-3)
    with policy.reference() as reference:
        assert same(predict(family, reference), expected)
    if kind == "lora":  # switched off, not merely small
        frozen = {name.replace(".base_layer", ""): p for name, p in policy.module.named_parameters()}
        assert all(torch.equal(frozen[name], weight) for name, weight in base.denoiser.named_parameters())


def test_the_reference_is_the_policy_that_it_is_told_to_be(tiny_folder: Path, kind: Kind) -> None:
    family = load(tiny_folder)
    policy = make_policy(family, Adapter(kind=kind, rank=2))
    base = predict(family, policy.module)
    nudge(policy, seed=1)
    earlier, expected = policy.tensors(), predict(family, policy.module)
    nudge(policy, seed=2)
    now, trained = policy.tensors(), predict(family, policy.module)
    policy.refer_to(earlier)
    for _ in range(2):
        with policy.reference() as reference:
            assert same(predict(family, reference), expected)
        assert policy.proves(now)
        assert same(predict(family, policy.module), trained)

    # It stands still while the policy trains, and passes no gradient on.
    noisy_BCHW, text_B = torch.randn(2, 4, 8, 8), family.encode_prompts(["a circle", "a square"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    with policy.reference() as reference, torch.no_grad():
        theirs = family.predict(reference, noisy_BCHW, torch.tensor([100, 800]), text_B)
    loss = (family.predict(policy.module, noisy_BCHW, torch.tensor([100, 800]), text_B) - theirs).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in policy.parameters())
    optimizer.step()
    assert not policy.proves(now)
    with policy.reference() as reference:
        assert same(predict(family, reference), expected)

    policy.refer_to(None)
    with policy.reference() as reference:
        assert same(predict(family, reference), base)


def test_only_the_policy_is_trained(tiny_sd1_folder: Path) -> None:
    family = load(tiny_sd1_folder)
    policy = make_policy(family, Adapter(rank=2))
    with policy.reference():
        pass
    trainable = {id(p) for p in family.denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in policy.parameters()}
    assert 0 < len(trainable) < len(list(family.denoiser.parameters()))


def test_published_weights_make_another_process_predict_the_same(tiny_folder: Path, kind: Kind) -> None:
    family = load(tiny_folder)
    policy = make_policy(family, Adapter(kind=kind, rank=2))
    nudge(policy)
    published = policy.tensors()
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in published.values())

    other = load(tiny_folder)
    loaded = make_policy(other, Adapter(kind=kind, rank=2))
    loaded.load(published)
    assert loaded.proves(published)
    assert same(predict(other, loaded.module), predict(family, policy.module))
    assert all(torch.equal(tensor, published[name]) for name, tensor in loaded.tensors().items())


def test_published_weights_do_not_follow_the_training(tiny_sd1_folder: Path, kind: Kind) -> None:
    policy = make_policy(load(tiny_sd1_folder), Adapter(kind=kind, rank=2))
    published = policy.tensors()
    nudge(policy)
    assert not policy.proves(published)
    assert policy.proves(policy.tensors())


def test_versions_come_and_go(tiny_sd1_folder: Path, kind: Kind) -> None:
    family = load(tiny_sd1_folder)
    policy = make_policy(family, Adapter(kind=kind, rank=2))
    base = predict(family, policy.module)
    nudge(policy)
    first, first_prediction = policy.tensors(), predict(family, policy.module)

    policy.load(None)
    assert policy.proves(None)
    assert not policy.proves(first)
    assert torch.equal(predict(family, policy.module), base)
    with policy.reference() as reference:  # looking at the reference must not switch an adapter on
        assert same(predict(family, reference), base)
    assert policy.proves(None)

    policy.load(first)
    assert policy.proves(first)
    assert not policy.proves(None)
    assert torch.equal(predict(family, policy.module), first_prediction)


def test_another_version_or_one_changed_weight_is_no_proof(tiny_sd1_folder: Path, kind: Kind) -> None:
    policy = make_policy(load(tiny_sd1_folder), Adapter(kind=kind, rank=2))
    nudge(policy, seed=1)
    first = policy.tensors()
    nudge(policy, seed=2)
    second = policy.tensors()
    policy.load(first)
    assert policy.proves(first)
    assert not policy.proves(second)
    assert not policy.proves(change_one_weight(first))
    assert not policy.proves({name: first[name] for name in list(first)[1:]})
    with torch.no_grad():
        policy.parameters()[-1].view(-1)[-1] += 0.5
    assert not policy.proves(first)


def disable_all(module: nn.Module) -> None:
    module.disable_adapters()  # type: ignore[operator]


def disable_one_layer(module: nn.Module) -> None:
    next(layer for layer in module.modules() if isinstance(layer, LoraLayer)).enable_adapters(False)


def activate_another(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer._active_adapter = ["another"]


@pytest.mark.parametrize("sabotage", [disable_all, disable_one_layer, activate_another])
def test_adapter_weights_that_are_loaded_but_not_applied_are_no_proof(
    tiny_sd1_folder: Path, sabotage: Callable[[nn.Module], None]
) -> None:
    policy = make_policy(load(tiny_sd1_folder), Adapter(rank=2))
    nudge(policy)
    published = policy.tensors()
    assert policy.proves(published)
    sabotage(policy.module)
    assert not policy.proves(published)


def test_the_base_is_not_proven_while_an_adapter_is_applied(tiny_sd1_folder: Path) -> None:
    policy = make_policy(load(tiny_sd1_folder), Adapter(rank=2))
    policy.load(None)
    next(layer for layer in policy.module.modules() if isinstance(layer, LoraLayer)).enable_adapters(True)
    assert not policy.proves(None)


def test_weights_of_another_architecture_are_refused(tiny_sd1_folder: Path) -> None:
    policy = make_policy(load(tiny_sd1_folder), Adapter(rank=2))
    with pytest.raises(UserError, match="do not fit the model: unexpected"):
        policy.load({"unet.nowhere.lora_A.weight": torch.zeros(2, 2)})


def test_a_half_precision_module_takes_and_proves_float32_weights(tiny_folder: Path, kind: Kind) -> None:
    family = load(tiny_folder)
    policy = make_policy(family, Adapter(kind=kind, rank=2))
    nudge(policy)
    published, expected = policy.tensors(), predict(family, policy.module)

    half = load(tiny_folder, torch.bfloat16)
    loaded = make_policy(half, Adapter(kind=kind, rank=2))
    loaded.load(published)
    assert loaded.proves(published)
    assert not loaded.proves(change_one_weight(published))
    prediction = predict(half, loaded.module)
    assert (prediction - expected).norm() < 0.05 * expected.norm()
    loaded.load(None)
    assert loaded.proves(None)
    assert (predict(half, loaded.module) - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_diffusers_itself_loads_a_published_adapter(tiny_folder: Path, tmp_path: Path, alpha: float | None) -> None:
    family = load(tiny_folder)
    policy = make_policy(family, Adapter(rank=4, alpha=alpha))
    nudge(policy)
    store = PolicyStore(Storage(str(tmp_path)))
    store.publish(1, policy.tensors(), policy.metadata())

    plain = load(tiny_folder)
    base = predict(plain, plain.denoiser)
    plain.pipeline.load_lora_weights(str(tmp_path / "policies" / "00001"))
    prediction = predict(plain, plain.denoiser)
    assert same(prediction, predict(family, policy.module))
    assert not torch.allclose(prediction, base, atol=1e-3)


def test_modules_that_the_denoiser_does_not_have_are_named(tiny_sd1_folder: Path) -> None:
    with pytest.raises(UserError, match=r"train.adapter.target_modules: \['to_everything'\]"):
        make_policy(load(tiny_sd1_folder), Adapter(target_modules=("to_everything",)))
