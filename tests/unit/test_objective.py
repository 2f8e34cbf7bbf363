"""Diffusion-KTO against closed forms in float64 numpy, finite differences, hand-made figures and two processes.

Shapes as in the module under test: B samples, D numbers a sample; `_N` and `_ND` arrays are the numpy twins.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kto_ray.objectives.diffusion_kto import UTILITIES, DiffusionKTO, ReferencePointName, UtilityName
from kto_ray.objectives.health import Health
from kto_ray.objectives.noise_means import NoiseMeans
from kto_ray.objectives.protocol import Losses, Scale, denoising_error
from kto_ray.objectives.ranks import sum_over_ranks

Array = NDArray[np.float64]

UTILITY_NAMES: tuple[UtilityName, ...] = get_args(UtilityName)
REFERENCE_POINT_NAMES = tuple(name for name in get_args(ReferencePointName) if name != "noise_mean")
"""Of one number for the whole step."""

each_utility = pytest.mark.parametrize("utility", UTILITY_NAMES)
each_reference_point = pytest.mark.parametrize("reference_point", REFERENCE_POINT_NAMES)

CLOSED_FORMS: dict[UtilityName, Callable[[Array], Array]] = {
    "kahneman_tversky": lambda x: 1 / (1 + np.exp(-x)),
    "loss_averse": lambda x: -np.log(1 + np.exp(-x)),
    "risk_seeking": lambda x: np.log(1 + np.exp(x)),
    "linear": lambda x: x,
}


def closed_form_z(
    name: ReferencePointName, reward_N: Array, desirable_N: NDArray[np.bool_], mismatched_N: Array
) -> float:
    if name == "batch_kl":
        return max(0.0, float(np.mean(reward_N)))
    if name == "mismatched_kl":
        return max(0.0, float(np.mean(mismatched_N)))
    if name == "class_mean":
        return float(np.mean([np.mean(reward_N[desirable_N == c]) for c in (True, False) if (desirable_N == c).any()]))
    return 0.0


def closed_form_losses(objective: DiffusionKTO, reward_N: Array, desirable_N: NDArray[np.bool_], z: float) -> Array:
    x_N = np.where(desirable_N, 1.0, -1.0) * objective.beta * (reward_N - z)
    weight_N = np.where(desirable_N, objective.desirable_weight, objective.undesirable_weight)
    return np.asarray(weight_N * (1 - CLOSED_FORMS[objective.utility](x_N)))


def losses(objective: DiffusionKTO, reward_B: Tensor, desirable_B: Tensor, z: Tensor) -> Tensor:
    """The losses of samples whose reference point is known."""
    return objective.losses_of(objective.beta * (reward_B - z), desirable_B)


# A sample of a batch: its reward, its verdict, the reward of its mismatched pair.
rewards = st.floats(-3, 3, allow_subnormal=False)
batches = st.lists(st.tuples(rewards, st.booleans(), rewards), min_size=2, max_size=8)
weights = st.sampled_from([0.25, 1.0, 1.5])  # exact in float32


@each_utility
@each_reference_point
@settings(deadline=None, max_examples=25)
@given(batch=batches, beta=st.floats(0.1, 10), desirable_weight=weights, undesirable_weight=weights)
def test_closed_form(
    utility: UtilityName,
    reference_point: ReferencePointName,
    batch: list[tuple[float, bool, float]],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> None:
    objective = DiffusionKTO(
        utility=utility,
        reference_point=reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    reward_N, desirable_N, mismatched_N = (np.array(column) for column in zip(*batch, strict=True))
    reward_B, desirable_B, mismatched_B = (torch.tensor(column) for column in (reward_N, desirable_N, mismatched_N))

    z = objective.find_reference_point(reward_B, desirable_B, mismatched_B)
    loss_B = losses(objective, reward_B, desirable_B, z)

    expected_z = closed_form_z(reference_point, reward_N, desirable_N, mismatched_N)
    np.testing.assert_allclose(z.numpy(), expected_z, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        loss_B.numpy(), closed_form_losses(objective, reward_N, desirable_N, expected_z), rtol=1e-9, atol=1e-9
    )


def test_every_utility_has_a_closed_form() -> None:
    assert set(UTILITIES) == set(UTILITY_NAMES) == set(CLOSED_FORMS)


@each_utility
def test_far_from_the_reference_point_losses_and_gradients_stay_finite(utility: UtilityName) -> None:
    """x = +-1e4, where exp overflows: each utility is its asymptote, and no gradient is NaN."""
    reward_B = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    desirable_B = torch.tensor([True, True, False, False])
    loss_B = losses(DiffusionKTO(utility=utility, beta=1.0), reward_B, desirable_B, torch.tensor(0.0))
    torch.autograd.backward(loss_B.sum())
    gain, loss = {
        "kahneman_tversky": (1.0, 0.0),
        "loss_averse": (0.0, -1e4),
        "risk_seeking": (1e4, 0.0),
        "linear": (1e4, -1e4),
    }[utility]
    assert loss_B.tolist() == [1 - gain, 1 - loss, 1 - loss, 1 - gain]
    assert reward_B.grad is not None
    assert reward_B.grad.isfinite().all()


def test_utility_is_averaged_after_the_nonlinearity() -> None:
    """The mean of log sigmoids, not the log sigmoid of the mean: a known trap (diffusion-kto facts)."""
    reward_B, desirable_B = torch.tensor([5.0, -5.0]), torch.tensor([True, True])
    loss = losses(DiffusionKTO(utility="loss_averse", beta=1.0), reward_B, desirable_B, torch.tensor(0.0)).mean().item()
    mean_of_logs = float(np.mean(-np.log(1 + np.exp(np.array([-5.0, 5.0])))))
    log_of_mean = float(-np.log(2.0))
    assert loss == pytest.approx(1 - mean_of_logs)
    assert abs(loss - (1 - log_of_mean)) > 1


class TestDenoisingError:
    def test_is_the_mean_over_all_but_the_first_dimension(self) -> None:
        rng = np.random.default_rng(0)
        prediction_NCHW, target_NCHW = rng.normal(size=(2, 3, 4, 5, 6))
        error_B = denoising_error(torch.tensor(prediction_NCHW), torch.tensor(target_NCHW))
        assert error_B.shape == (3,)
        assert error_B.dtype == torch.float32
        expected_N = ((prediction_NCHW - target_NCHW) ** 2).sum(axis=(1, 2, 3)) / (4 * 5 * 6)
        np.testing.assert_allclose(error_B.numpy(), expected_N, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_squared_in_float32(self, dtype: torch.dtype) -> None:
        """In float16 600 ** 2 is infinite; in bfloat16 it has three digits."""
        error_B = denoising_error(torch.tensor([[300.0, 1.0]], dtype=dtype), torch.tensor([[-300.0, 0.0]], dtype=dtype))
        assert error_B.tolist() == [180000.5]


class TestGradients:
    @each_utility
    def test_losses_in_float64(self, utility: UtilityName) -> None:
        objective = DiffusionKTO(utility=utility, beta=2.0, desirable_weight=1.5, undesirable_weight=0.5)
        reward_B = torch.tensor([0.7, -0.4, 0.1, -1.3], dtype=torch.float64, requires_grad=True)
        desirable_B, z = torch.tensor([True, True, False, False]), torch.tensor(0.2, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda reward_B: losses(objective, reward_B, desirable_B, z), (reward_B,))

    @each_utility
    @each_reference_point
    def test_whole_objective_of_a_small_model(self, utility: UtilityName, reference_point: ReferencePointName) -> None:
        """Autograd through model, errors, reference point and losses against central differences of the closed form.

        z is held where the undisturbed weights put it: it carries no gradient.
        """
        rng = np.random.default_rng(1)
        batch, inputs, outputs = 6, 3, 4
        noisy_ND, mismatched_ND = rng.normal(size=(2, batch, inputs))
        target_ND, reference_ND = rng.normal(size=(2, batch, outputs))
        desirable_N = np.array([True, True, False, True, False, False])
        weight_DD = rng.normal(size=(inputs, outputs))
        objective = DiffusionKTO(utility=utility, reference_point=reference_point, beta=0.5, desirable_weight=1.5)

        def closed_form_reward(inputs_ND: Array, weight_DD: Array) -> Array:
            error_N, reference_error_N = (
                ((prediction_ND - target_ND) ** 2).mean(axis=1)
                for prediction_ND in (inputs_ND @ weight_DD, reference_ND)
            )
            return np.asarray(reference_error_N - error_N)

        expected_z = closed_form_z(
            reference_point,
            closed_form_reward(noisy_ND, weight_DD),
            desirable_N,
            closed_form_reward(mismatched_ND, weight_DD),
        )

        def closed_form_loss(weight_DD: Array) -> float:
            reward_N = closed_form_reward(noisy_ND, weight_DD)
            return float(closed_form_losses(objective, reward_N, desirable_N, expected_z).mean())

        expected_DD = np.zeros_like(weight_DD)
        for index in np.ndindex(*weight_DD.shape):
            step_DD = np.zeros_like(weight_DD)
            step_DD[index] = 1e-5
            expected_DD[index] = (closed_form_loss(weight_DD + step_DD) - closed_form_loss(weight_DD - step_DD)) / 2e-5

        model = torch.nn.Linear(inputs, outputs, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor(weight_DD).T)
        target_BD = torch.tensor(target_ND)
        reference_error_B = denoising_error(torch.tensor(reference_ND), target_BD)
        reward_B, mismatched_reward_B = (
            reference_error_B - denoising_error(model(torch.tensor(inputs_ND).float()), target_BD)
            for inputs_ND in (noisy_ND, mismatched_ND)
        )
        desirable_B = torch.tensor(desirable_N)
        z = objective.find_reference_point(reward_B, desirable_B, mismatched_reward_B)
        torch.autograd.backward(losses(objective, reward_B, desirable_B, z).mean())

        assert not z.requires_grad
        assert z.item() == pytest.approx(expected_z, rel=1e-5)
        assert model.weight.grad is not None
        assert np.abs(expected_DD).max() > 1e-2, "a flat spot would prove nothing"
        np.testing.assert_allclose(model.weight.grad.T.numpy(), expected_DD, rtol=1e-3, atol=1e-5)


# On no border between parts, be there 1 to 5 of them, on whose side rounding decides.
places = st.integers(0, 59).map(lambda sixtieth: (sixtieth + 0.5) / 60)
samples_of_a_step = st.lists(st.tuples(rewards, places), min_size=1, max_size=12)


class TestNoiseMeans:
    @settings(deadline=None, max_examples=50)
    @given(
        steps=st.lists(samples_of_a_step, min_size=1, max_size=4),
        parts=st.integers(1, 5),
        memory=st.sampled_from([0.0, 0.5, 0.9]),
        noise_range=st.sampled_from([(0.0, 1.0), (0.25, 0.75)]),
    )
    def test_closed_form(
        self,
        steps: list[list[tuple[float, float]]],
        parts: int,
        memory: float,
        noise_range: tuple[float, float],
    ) -> None:
        """Every sample ever seen, weighted by its age."""
        low, high = noise_range
        means = NoiseMeans(parts, memory, noise_range)
        seen_2K = means.none()
        seen: list[tuple[float, int, int]] = []
        for age, step in enumerate(reversed(steps)):
            for reward, place in step:
                seen.append((reward, min(int(place * parts), parts - 1), age))
        for step in steps:
            reward_B, place_B = (torch.tensor(column, dtype=torch.float64) for column in zip(*step, strict=True))
            level_B = low + (high - low) * place_B
            before_2K = seen_2K.clone()
            after_2K = means.after(seen_2K, reward_B, level_B)
            assert torch.equal(seen_2K, before_2K), "a step that is not taken must leave no trace"
            seen_2K = after_2K
        z_B = means.at(seen_2K, level_B)
        part_B = [min(int((level - low) / (high - low) * parts), parts - 1) for level in level_B.tolist()]
        for z, part in zip(z_B.tolist(), part_B, strict=True):
            mine = [(reward, memory**age) for reward, other, age in seen if other == part and memory**age > 0]
            expected = sum(r * w for r, w in mine) / sum(w for _, w in mine)
            assert z == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_a_part_of_which_nothing_was_seen_has_the_mean_of_all(self) -> None:
        means = NoiseMeans(4, 0.9)
        seen_2K = means.after(means.none(), torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.3]))
        z_B = means.at(seen_2K, torch.tensor([0.1, 0.3, 0.6, 0.9]))
        assert z_B.tolist() == [1.0, 3.0, 2.0, 2.0]
        assert (z_B.dtype, z_B.requires_grad) == (torch.float32, False)

    def test_they_may_be_negative_and_carry_no_gradient(self) -> None:
        reward_B = torch.tensor([-1.0, -3.0], requires_grad=True)
        means = NoiseMeans(1, 0.5)
        z_B = means.at(means.after(means.none(), reward_B, torch.tensor([0.2, 0.8])), torch.tensor([0.5]))
        assert z_B.tolist() == [-2.0]
        assert not z_B.requires_grad

    def test_the_verdict_decides_where_the_noise_level_did(self) -> None:
        """Rewards that depend on the noise three times as much as on the verdict, as in a real run."""
        level_B = torch.arange(64) / 64
        desirable_B = torch.arange(64) % 2 == 0
        reward_B = 3 * level_B + torch.where(desirable_B, 0.1, -0.1)
        one = DiffusionKTO(reference_point="batch_kl", beta=1)
        z = one.find_reference_point(reward_B, desirable_B)
        means = NoiseMeans(16, 0.0)
        z_B = means.at(means.after(means.none(), reward_B, level_B), level_B)

        def agree(z: Tensor) -> float:
            return float((((reward_B - z) > 0) == desirable_B).float().mean())

        assert agree(z) < 0.6
        assert agree(z_B) > 0.7

    def test_the_mean_of_a_whole_step_is_not_asked_of_it(self) -> None:
        with pytest.raises(ValueError, match="by noise level"):
            DiffusionKTO(reference_point="noise_mean").find_reference_point(torch.zeros(2), torch.tensor([True, False]))


class TestReferencePoint:
    @pytest.mark.parametrize(
        ("rewards", "z"),
        [
            ([-3.0, 1.0], 0.0),  # clamped before the mean it would be 0.5
            ([-1.0, 3.0], 1.0),  # clamped before the mean it would be 1.5
        ],
    )
    def test_batch_kl_clamps_after_the_mean(self, rewards: list[float], z: float) -> None:
        assert find_z("batch_kl", rewards, [True, False]) == z

    @pytest.mark.parametrize(("mismatched", "z"), [([-3.0, 1.0], 0.0), ([-1.0, 3.0], 1.0)])
    def test_mismatched_kl_looks_at_the_mismatched_pairs_only(self, mismatched: list[float], z: float) -> None:
        assert find_z("mismatched_kl", [100.0, 200.0], [True, False], mismatched) == z

    def test_mismatched_kl_requires_their_rewards(self) -> None:
        with pytest.raises(ValueError, match="mismatched_kl needs the rewards of mismatched pairs"):
            find_z("mismatched_kl", [1.0, 2.0], [True, False])

    def test_class_mean_balances_a_skewed_batch_and_is_not_clamped(self) -> None:
        assert find_z("class_mean", [1.0, 1.0, 1.0, -4.0], [True, True, True, False]) == -1.5

    @pytest.mark.parametrize("desirable", [True, False])
    def test_class_mean_without_one_class_is_the_mean_of_the_other(self, desirable: bool) -> None:
        assert find_z("class_mean", [-1.0, -2.0], [desirable, desirable]) == -1.5

    @pytest.mark.parametrize("name", ["batch_kl", "mismatched_kl", "class_mean"])
    def test_global_batch_of_one_is_refused(self, name: ReferencePointName) -> None:
        message = rf"reference point {name} of a global batch of 1 sample: .*at least 2 samples.*reference_point: zero"
        with pytest.raises(ValueError, match=message):
            find_z(name, [1.0], [True], [1.0])

    def test_zero_takes_any_batch(self) -> None:
        assert find_z("zero", [1.0], [True]) == 0.0

    @each_reference_point
    def test_carries_no_gradient(self, reference_point: ReferencePointName) -> None:
        """The gradient is that of a constant z, and the mismatched pairs receive none."""
        objective = DiffusionKTO(utility="loss_averse", reference_point=reference_point, beta=1.0)
        reward_B = torch.tensor([2.0, 1.0, 0.5], requires_grad=True)
        mismatched_B = torch.tensor([0.3, 0.6, 0.9], requires_grad=True)
        desirable_B = torch.tensor([True, False, True])
        z = objective.find_reference_point(reward_B, desirable_B, mismatched_B)
        constant = torch.tensor(z.item())
        gradient_B, constant_gradient_B = (
            torch.autograd.grad(losses(objective, reward_B, desirable_B, point).mean(), reward_B)[0]
            for point in (z, constant)
        )
        assert not z.requires_grad
        assert z.dtype == reward_B.dtype
        assert z.shape == ()
        torch.testing.assert_close(gradient_B, constant_gradient_B, rtol=0, atol=0)
        assert mismatched_B.grad is None


def find_z(
    name: ReferencePointName, rewards: list[float], desirable: list[bool], mismatched: list[float] | None = None
) -> float:
    mismatched_B = None if mismatched is None else torch.tensor(mismatched)
    z = DiffusionKTO(reference_point=name).find_reference_point(
        torch.tensor(rewards), torch.tensor(desirable), mismatched_B
    )
    return z.item()


class TestHealth:
    objective = DiffusionKTO(beta=2.0)

    def add(self, health: Health, desirable: list[bool], reward: list[float], z: float, **others: Any) -> None:
        loss_B, noise_B, norm = (torch.tensor(others[name]) for name in ("loss", "noise", "norm"))
        reward_B, z_B = torch.tensor(reward), torch.full((len(reward),), z)
        scale = Scale(z_B, torch.full_like(z_B, self.objective.beta))
        losses = Losses(loss_B, self.objective.beta * (reward_B - z_B))
        health.add(reward_B, torch.tensor(desirable), losses, scale, noise_B, norm)

    def test_figures_by_hand(self) -> None:
        health = Health(noise_bins=4)
        # beta (g - z): 1.5 and -1.5, both on their verdict's side
        self.add(health, [True, False], [1.0, -0.5], z=0.25, loss=[0.125, 0.25], noise=[0.1, 0.6], norm=3.0)
        # beta (g - z): 5.0, saturated, and 3.0, on the wrong side
        self.add(health, [True, False], [3.0, 2.0], z=0.5, loss=[0.5, 1.125], noise=[0.99, 0.6], norm=5.0)
        assert health.summary() == {
            "loss": 0.5,
            "accuracy": 0.75,
            "saturated": 0.25,
            "margin": 2.75,
            "g_desirable": 2.0,
            "g_undesirable": 0.75,
            "g_noise_0": 1.0,
            # g_noise_1: no sample had a noise level in [0.25, 0.5)
            "g_noise_2": 0.75,
            "g_noise_3": 3.0,
            "g_desirable_noise_0": 1.0,
            "g_desirable_noise_3": 3.0,
            "g_undesirable_noise_2": 0.75,
            "z": 0.375,
            "beta": 2.0,
            "gradient_norm": 4.0,
        }

    def test_missing_class_is_left_out(self) -> None:
        health = Health(noise_bins=1)
        self.add(health, [False, False], [1.0, -2.0], z=0.0, loss=[1.0, 0.0], noise=[0.5, 0.5], norm=1.0)
        figures = health.summary()
        assert "g_desirable" not in figures
        assert figures["g_undesirable"] == figures["g_noise_0"] == -0.5

    def test_without_steps_there_are_no_figures(self) -> None:
        assert Health().summary() == {}


# Rank 0 of two has three samples of one class, rank 1 the other five: every figure must be a global one.
REWARDS = [0.5, 1.5, -0.25, -2.0, 0.75, 3.0, -0.5, 1.0]
DESIRABLE = [True, True, True, False, False, True, False, False]
RANK_SLICES = [slice(0, 3), slice(3, 8)]


def global_figures(chosen: slice) -> dict[str, Any]:
    """What a trainer reports of an optimizer step, by this process's part of the batch."""
    reward_B, desirable_B = torch.tensor(REWARDS[chosen]), torch.tensor(DESIRABLE[chosen])
    noise_level_B = torch.linspace(0.05, 0.95, len(REWARDS))[chosen]
    figures: dict[str, Any] = {}
    for reference_point in REFERENCE_POINT_NAMES:
        objective, health = DiffusionKTO(reference_point=reference_point, beta=1.5), Health()
        z = objective.find_reference_point(reward_B, desirable_B, mismatched_reward_B=reward_B * 0.5)
        loss_B = losses(objective, reward_B, desirable_B, z)
        scale = Scale(z.expand(len(reward_B)), torch.full_like(reward_B, objective.beta))
        margins = Losses(loss_B, objective.beta * (reward_B - z))
        health.add(reward_B, desirable_B, margins, scale, noise_level_B, gradient_norm=torch.tensor(2.0))
        loss_sum, count = sum_over_ranks(torch.stack([loss_B.double().sum(), torch.tensor(len(loss_B)).double()]))
        figures[reference_point] = {"z": z.item(), "loss": (loss_sum / count).item(), "health": health.summary()}
    return figures


def refusal(reward_B: Tensor) -> str:
    with pytest.raises(ValueError, match="global batch of 1 sample") as caught:
        DiffusionKTO().find_reference_point(reward_B, torch.ones_like(reward_B, dtype=torch.bool))
    return str(caught.value)


def run_rank(rank: int, folder: Path) -> dict[str, Any]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=len(RANK_SLICES),
        timeout=timedelta(seconds=60),  # when one rank fails, the other must not wait for ever
    )
    try:
        # One sample on rank 0 and none on rank 1: both must refuse, or their next collectives would not match.
        return global_figures(RANK_SLICES[rank]) | {"refusal": refusal(torch.ones(1 - rank))}
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    with ProcessPoolExecutor(len(RANK_SLICES), multiprocessing.get_context("spawn")) as pool:
        by_rank = list(pool.map(run_rank, range(len(RANK_SLICES)), repeat(tmp_path)))
    expected = global_figures(slice(None))
    for figures in by_rank:
        assert figures.pop("refusal") == refusal(torch.ones(1))
        assert figures.keys() == expected.keys()
        for reference_point, found in figures.items():
            wanted = expected[reference_point]
            assert found["z"] == wanted["z"], "these sums are exact in float64: ranks must not differ by a bit"
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-7)
            assert found["health"] == pytest.approx(wanted["health"], rel=1e-7)
