"""What shapes an image, and so is in the stamp that a replica puts on what it draws (test_generators.py)."""

import pytest

from kto_ray.config import RunConfig, load
from kto_ray.diffusion.sampling import as_asked, drawing_digest

BASE = {"unet": "a", "vae": "b"}


def config_of(*overrides: str) -> RunConfig:
    return load("shapes_demo", overrides)


@pytest.mark.parametrize(
    "override",
    [
        *("generate.steps=7", "generate.guidance_scale=2", "generate.scheduler=PNDMScheduler", "generate.height=64"),
        *("generate.width=64", "generate.dtype=bfloat16", "train.adapter.rank=3"),
    ],
)
def test_whatever_shapes_an_image_is_in_the_digest(override: str) -> None:
    assert drawing_digest(config_of(override), BASE) != drawing_digest(config_of(), BASE)


def test_another_base_model_draws_otherwise() -> None:
    assert drawing_digest(config_of(), BASE) != drawing_digest(config_of(), BASE | {"vae": "other"})


@pytest.mark.parametrize(
    "override",
    ["generate.batch_size=3", "generate.max_replicas=5", "generate.images_per_round=600", "train.learning_rate=1e-5"],
)
def test_what_shapes_no_image_is_not(override: str) -> None:
    assert drawing_digest(config_of(override), BASE) == drawing_digest(config_of(), BASE)


def test_a_prefix_of_desirable_images_shapes_what_is_drawn_once_the_policy_knows_it() -> None:
    config = config_of("train.objective=csft", "train.objective.desirable_prefix='fine '")
    assert drawing_digest(config, BASE) != drawing_digest(config_of("train.objective=csft"), BASE)
    assert drawing_digest(config_of("train.objective=sft"), BASE) == drawing_digest(config_of(), BASE)
    assert as_asked(config, ["a red ring"], 0) == ["a red ring"]
    assert as_asked(config, ["a red ring"], 1) == ["fine a red ring"]
    assert as_asked(config_of(), ["a red ring"], 1) == ["a red ring"]
