"""The objectives side by side: each against a closed form in float64 numpy, and what each needs of a learner.

Diffusion-KTO's utilities and reference points have a file of their own (`test_objective.py`).

Shapes: B samples, D numbers a sample, P pairs; `_ND` arrays are the numpy twins of `_BD` tensors.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kto_ray.config import RunConfig, Train, from_tree
from kto_ray.errors import UserError
from kto_ray.objectives import CSFT, DPO, NFT, SFT, DiffusionKTO, Objective
from kto_ray.objectives.protocol import Memory, Needs, Outputs, Rewards, Scale
from kto_ray.train.safeguard import safe_scale

Array = NDArray[np.float64]
DESIRABLE = [True, False, True, True, False, False]


def predictions(seed: int = 0) -> tuple[Array, Array, Array]:
    """Of policy and reference, and the target: (6, 4) each."""
    rng = np.random.default_rng(seed)
    policy_ND, reference_ND, target_ND = rng.normal(size=(3, len(DESIRABLE), 4))
    return policy_ND, reference_ND, target_ND


def outputs(*, gradient: bool = False) -> Outputs:
    policy_BD, reference_BD, target_BD = (torch.tensor(array, dtype=torch.float32) for array in predictions())
    return Outputs(policy_BD.requires_grad_(gradient), target_BD, reference_BD)


def closed_forms() -> dict[str, tuple[Any, Array]]:
    """An objective of every kind with the losses that its paper gives the samples of `predictions`."""
    policy_ND, reference_ND, target_ND = predictions()
    desirable_N = np.array(DESIRABLE)
    error_N, reference_error_N = (((p - target_ND) ** 2).mean(axis=1) for p in (policy_ND, reference_ND))
    g_N = reference_error_N - error_N
    pair_P = np.log1p(np.exp(-3.0 * (g_N[0::2] - g_N[1::2])))
    positive_N = (((1 - 0.5) * reference_ND + 0.5 * policy_ND - target_ND) ** 2).mean(axis=1)
    negative_N = (((1 + 0.5) * reference_ND - 0.5 * policy_ND - target_ND) ** 2).mean(axis=1)
    usual_N = np.where(
        desirable_N,
        np.abs((1 - 0.5) * reference_ND + 0.5 * policy_ND - target_ND).mean(axis=1),
        np.abs((1 + 0.5) * reference_ND - 0.5 * policy_ND - target_ND).mean(axis=1),
    )
    distance_N = np.abs(reference_ND - target_ND).mean(axis=1)
    mirror_N = ((2 * reference_ND - policy_ND - target_ND) ** 2).mean(axis=1) - reference_error_N
    nft_N = np.where(desirable_N, positive_N, negative_N)
    return {
        "sft": (SFT(), error_N),
        "csft": (CSFT(), error_N),
        "dpo": (DPO(beta=3), np.repeat(pair_P, 2)),
        "nft": (NFT(beta=0.5, normalise=False), nft_N),
        "nft, normalised": (NFT(beta=0.5), nft_N / usual_N),
        "diffusion_kto": (
            DiffusionKTO(beta=2, reference_point="zero"),
            1 - 1 / (1 + np.exp(-np.where(desirable_N, 2.0, -2.0) * g_N)),
        ),
        "diffusion_kto, relative": (
            DiffusionKTO(beta=2, reference_point="zero", relative=True, mirror=True),
            1 - 1 / (1 + np.exp(-np.where(desirable_N, 2.0 * g_N, -2.0 * mirror_N) / distance_N)),
        ),
        "diffusion_kto, mirrored": (
            DiffusionKTO(beta=2, reference_point="zero", mirror=True),
            1 - 1 / (1 + np.exp(-np.where(desirable_N, 2.0 * g_N, -2.0 * mirror_N))),
        ),
    }


@pytest.mark.parametrize("name", sorted(closed_forms()))
def test_closed_form(name: str) -> None:
    objective, expected_N = closed_forms()[name]
    losses = objective.losses(outputs(), torch.tensor(DESIRABLE), None)
    np.testing.assert_allclose(losses.loss_B.numpy(), expected_N, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(closed_forms()))
def test_gradient_is_that_of_the_closed_form(name: str) -> None:
    """Central differences in float64; what a paper holds without gradient is held where it is."""
    objective, _ = closed_forms()[name]
    policy_ND, reference_ND, target_ND = predictions()

    def loss(policy_ND: Array) -> float:
        held = Outputs(*(torch.tensor(array) for array in (policy_ND, target_ND, reference_ND)))
        losses = objective.losses(held, torch.tensor(DESIRABLE), None)
        loss_B: Tensor = losses.loss_B
        if name == "nft, normalised":  # the divisor is no part of the gradient
            usual_B = closed_forms()["nft"][1] / closed_forms()[name][1]
            moved_B = NFT(beta=0.5, normalise=False).losses(held, torch.tensor(DESIRABLE), None).loss_B
            loss_B = moved_B / torch.tensor(usual_B)
        return float(loss_B.double().mean())

    expected_ND = np.zeros_like(policy_ND)
    for index in np.ndindex(*policy_ND.shape):
        step_ND = np.zeros_like(policy_ND)
        step_ND[index] = 1e-2
        expected_ND[index] = (loss(policy_ND + step_ND) - loss(policy_ND - step_ND)) / 2e-2

    ours = outputs(gradient=True)
    torch.autograd.backward(objective.losses(ours, torch.tensor(DESIRABLE), None).loss_B.mean())
    assert ours.prediction_BCHW.grad is not None
    np.testing.assert_allclose(ours.prediction_BCHW.grad.numpy(), expected_ND, rtol=2e-2, atol=1e-3)


def test_nft_moves_towards_the_desirable_and_away_from_the_undesirable() -> None:
    """Where policy and old policy agree, its gradient is that of explaining the one better and the other worse."""
    _, reference_ND, target_ND = predictions()
    prediction_BD = torch.tensor(reference_ND, dtype=torch.float32, requires_grad=True)
    held = Outputs(prediction_BD, torch.tensor(target_ND).float(), prediction_BD.detach().clone())
    torch.autograd.backward(NFT(normalise=False).losses(held, torch.tensor(DESIRABLE), None).loss_B.sum())
    assert prediction_BD.grad is not None
    towards_ND = 2 / 4 * (reference_ND - target_ND) * np.where(DESIRABLE, 1.0, -1.0)[:, None]
    np.testing.assert_allclose(prediction_BD.grad.numpy(), towards_ND, rtol=1e-5)


def test_the_mirrored_reward_falls_no_lower_than_the_references_error() -> None:
    """Whatever the policy predicts, and however far from its reference; the plain one falls without end."""
    _, reference_ND, target_ND = predictions()
    rng = np.random.default_rng(1)
    target_BD, reference_BD = torch.tensor(target_ND), torch.tensor(reference_ND)
    floor_B = -((reference_BD - target_BD) ** 2).mean(1).float()
    for far in (0.01, 1.0, 100.0):
        away = Outputs(reference_BD + far * torch.tensor(rng.normal(size=reference_ND.shape)), target_BD, reference_BD)
        assert (away.mirrored_reward_B >= floor_B - 1e-5).all()
    assert (away.reward_B < 100 * floor_B).all()
    lowest = Outputs(2 * reference_BD - target_BD, target_BD, reference_BD)  # whose mirror image is the target
    torch.testing.assert_close(lowest.mirrored_reward_B, floor_B)


def test_mirrored_or_not_the_first_step_is_the_same() -> None:
    _, reference_ND, target_ND = predictions()
    gradients: list[Tensor] = []
    for mirror in (False, True):
        prediction_BD = torch.tensor(reference_ND, dtype=torch.float32, requires_grad=True)
        held = Outputs(prediction_BD, torch.tensor(target_ND).float(), torch.tensor(reference_ND).float())
        objective = DiffusionKTO(reference_point="zero", beta=2, mirror=mirror)
        torch.autograd.backward(objective.losses(held, torch.tensor(DESIRABLE), None).loss_B.sum())
        assert prediction_BD.grad is not None
        gradients.append(prediction_BD.grad)
    torch.testing.assert_close(*gradients)


def test_each_of_a_pair_has_a_margin_of_its_own_sign() -> None:
    margin_B = DPO(beta=3).losses(outputs(), torch.tensor([True, False] * 3), None).margin_B
    assert margin_B is not None
    torch.testing.assert_close(margin_B[0::2], -margin_B[1::2])


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ("diffusion_kto", Needs(reference="fixed", whole_step=True)),
        ({"reference_point": "zero"}, Needs(reference="fixed")),
        ({"reference_point": "zero", "target_margin": 1}, Needs(reference="fixed", whole_step=True)),
        ({"reference_point": "zero", "scale_by_noise": True}, Needs(reference="fixed", whole_step=True)),
        (
            {"reference_point": "mismatched_kl", "reference": "ema"},
            Needs(reference="ema", mismatched=True, whole_step=True),
        ),
        ({"safeguard": True}, Needs(reference="fixed", whole_step=True, classes_apart=True)),
        ("sft", Needs(undesirable=False)),
        ({"kind": "csft"}, Needs(prefixes=("good image, ", "bad image, "))),
        ({"kind": "dpo", "reference": "round"}, Needs(reference="round", pairs="verdicts")),
        ({"kind": "dpo", "pairs": "scores"}, Needs(reference="fixed", pairs="scores")),
        ("nft", Needs(reference="round", own_rounds=True)),
    ],
)
def test_an_objective_says_what_it_needs(settings: Any, needs: Needs) -> None:
    assert TypeAdapter[Any](Objective).validate_python(settings).needs == needs


class TestScale:
    """What Diffusion-KTO's options beyond the paper make of z and beta."""

    level_B = torch.tensor([0.1, 0.2, 0.6, 0.9])
    desirable_B = torch.tensor([True, False, True, False])

    def scale(
        self, objective: DiffusionKTO, rewards: list[float], memory: Memory | None = None
    ) -> tuple[Scale, Memory]:
        known = objective.begin((0.0, 1.0)) if memory is None else memory
        return objective.scale(Rewards(torch.tensor(rewards), self.desirable_B, self.level_B), known)

    def test_by_noise_level_z_is_the_mean_of_each_part(self) -> None:
        objective = DiffusionKTO(reference_point="noise_mean", noise_parts=2, memory=0, beta=3)
        scale, _ = self.scale(objective, [1.0, 3.0, -4.0, -8.0])
        assert scale.z_B.tolist() == [2.0, 2.0, -6.0, -6.0]
        assert scale.beta_B.tolist() == [3.0] * 4

    def test_scaled_by_noise_every_part_has_margins_of_one_size(self) -> None:
        """|g - z| is 1 in the one half and 4 in the other, 2.5 over all: margins become 2.5 in both."""
        objective = DiffusionKTO(reference_point="zero", scale_by_noise=True, noise_parts=2, memory=0, beta=2)
        scale, _ = self.scale(objective, [1.0, -1.0, 4.0, -4.0])
        torch.testing.assert_close(scale.beta_B, torch.tensor([5.0, 5.0, 1.25, 1.25]))

    def test_beta_sets_itself_to_the_median_margin(self) -> None:
        objective = DiffusionKTO(reference_point="zero", target_margin=1.5, margin_memory=0.75)
        scale, memory = self.scale(objective, [0.1, -0.2, 0.3, -0.4])
        assert scale.beta_B.tolist() == pytest.approx([1.5 / 0.25] * 4)
        scale, memory = self.scale(objective, [0.2, -0.4, 0.6, -0.8], memory)
        mean = (0.75 * 0.25 * 0.25 + 0.25 * 0.5) / (0.75 * 0.25 + 0.25)  # the younger median weighs more
        assert scale.beta_B.tolist() == pytest.approx([1.5 / mean] * 4)

    def test_steps_in_which_nothing_differs_say_nothing_of_beta(self) -> None:
        """The first step after the reference has become the policy: every g is 0."""
        objective = DiffusionKTO(reference_point="zero", target_margin=1, beta=7)
        scale, memory = self.scale(objective, [0.0] * 4)
        assert scale.beta_B.tolist() == [7.0] * 4
        scale, memory = self.scale(objective, [0.5] * 4, memory)
        assert scale.beta_B.tolist() == [2.0] * 4
        scale, _ = self.scale(objective, [0.0] * 4, memory)
        assert scale.beta_B.tolist() == [2.0] * 4

    def test_a_step_that_is_given_up_leaves_no_trace(self) -> None:
        objective = DiffusionKTO(reference_point="noise_mean", scale_by_noise=True, target_margin=1, noise_parts=2)
        before = objective.begin((0.0, 1.0))
        kept = {name: value.clone() for name, value in before.items()}
        _, after = self.scale(objective, [1.0, 3.0, -4.0, -8.0], before)
        assert all(torch.equal(before[name], kept[name]) for name in kept)
        assert not all(torch.equal(after[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("squared", "inner", "scale"),
    [(4.0, 1.0, 1.0), (4.0, 0.0, 1.0), (4.0, -1.0, 1.0), (4.0, -8.0, 0.5), (0.0, -8.0, 0.0)],
)
def test_the_safeguard_keeps_the_step_from_undoing_what_the_desirable_teach(
    squared: float, inner: float, scale: float
) -> None:
    assert safe_scale(squared, inner) == scale
    assert squared + scale * inner >= 0  # D . (D + s U): to first order their loss does not rise


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"train": {"objective": "dpo"}},
            r"dpo\) learns from pairs .*generate\.images_per_prompt \(1\) must be at least 2",
        ),
        (
            {
                "train": {"objective": {"kind": "dpo", "pairs": "scores"}},
                "generate": {"images_per_prompt": 4},
                "label": {"labeler": "human", "scorers": {"shapes": {"held_out": True}}},
            },
            r"train\.objective\.pairs: scores .* label\.scorers names none that is not held_out",
        ),
        (
            {"train": {"objective": "dpo", "global_batch": 6, "micro_batch": 3}, "generate": {"images_per_prompt": 4}},
            "dpo trains on pairs: micro_batch.* is 3, and must be even",
        ),
        (
            {"train": {"objective": "nft"}, "replay": {"run": "runs/other"}},
            r"nft, reference: round\) goes by the policies that drew the rounds",
        ),
        (
            {"train": {"objective": {"reference": "ema"}}, "replay": {"run": "runs/other"}},
            r"diffusion_kto, reference: ema\) goes by .*, and those of replayed rounds are another run's",
        ),
        (
            {"train": {"objective": {"reference_rate": 1}}},
            r"train\.objective\.reference_rate: .*less than 1 \(given: 1\)",
        ),
        (
            {"train": {"objective": {"target_margin": 0}}},
            r"train\.objective\.target_margin: .*greater than 0 \(given: 0\)",
        ),
        (
            {"train": {"objective": {"reference_point": "noise_mean", "noise_parts": 65}}},
            r"objective\.noise_parts \(65\) must be at most global_batch \(64\)",
        ),
        (
            {"train": {"objective": {"scale_by_noise": True, "noise_parts": 65}}},
            r"objective\.noise_parts \(65\) must be at most global_batch \(64\)",
        ),
        (
            {"train": {"objective": {"kind": "csft", "undesirable_prefix": "good image, "}}},
            r"train\.objective: desirable_prefix and undesirable_prefix are both 'good image, '",
        ),
        ({"train": {"objective": "nfft"}}, r"train\.objective: unknown kind 'nfft', did you mean 'nft'\?"),
        ({"train": {"objective": {"kind": "sft", "beta": 3}}}, r"unknown field 'train\.objective\.beta'"),
        ({"train": {"sampling_policy": {"kind": "ema", "decay": 1}}}, r"train\.sampling_policy\.decay: .*less than 1"),
    ],
)
def test_bad_input_is_refused_by_name(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_tree(tree)


def test_settings_of_an_objective_are_settings_of_the_run() -> None:
    config = RunConfig(train=Train(objective=NFT(beta=0.5)))
    assert from_tree(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError):
        NFT(beta=0)
