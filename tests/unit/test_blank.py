"""Models without weights are built without random numbers, and random ones are windows on little."""

import io
import math

import torch
from torch import Tensor, nn

from kto_ray.score.scorers.blank import Unfilled, random_weights


class Model(nn.Module):
    """A layer of each kind that the packages have, with a constant that is no weight."""

    offsets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64) for _ in range(4))
        self.convolution = nn.Conv2d(3, 32, 8)
        self.register_buffer("offsets", torch.arange(5))
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1), persistent=False)


def test_nothing_random_is_made() -> None:
    state = torch.get_rng_state()
    with Unfilled():
        model = Model()
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in Model().state_dict().items()
    }


def test_constants_are_filled_in() -> None:
    with Unfilled():
        model = Model()
    assert model.offsets.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(model.get_buffer("mask"), Model().get_buffer("mask"))
    assert torch.equal(model.get_parameter("layers.0.norm1.weight"), torch.ones(32))


def test_random_weights_fit_the_model_and_differ_from_layer_to_layer() -> None:
    model = Model()
    weights = random_weights(model)
    model.load_state_dict(weights)
    assert weights["offsets"].tolist() == [0, 1, 2, 3, 4]
    layers = [weights[f"layers.{i}.linear1.weight"] for i in range(4)]
    assert all(abs(layer.std().item() * 32**0.5 - 1) < 0.1 for layer in layers)
    assert not any(torch.equal(layers[0], layer) for layer in layers[1:])
    assert abs(weights["layers.0.norm1.weight"].mean().item() - 1) < 0.1


def test_random_weights_take_little_of_a_file() -> None:
    layers = nn.Sequential(*(nn.Linear(128, 128) for _ in range(100)))
    with io.BytesIO() as file:
        torch.save(random_weights(layers), file)
        assert file.tell() < sum(weight.nbytes for weight in layers.state_dict().values()) / 5
