"""The configuration tree: what a recipe and overrides resolve to, and what is said when they are wrong."""

import pickle
from pathlib import Path

import pytest
import yaml

from kto_ray.config import (
    MAY_CHANGE_ON_RESUME,
    RunConfig,
    Train,
    implied,
    load,
    recipe_names,
    require_same,
    steps_for,
    to_yaml,
)
from kto_ray.errors import UserError


def message(*overrides: str, recipe: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(recipe, overrides)
    return str(caught.value)


# -- what resolves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_pickles(name: str) -> None:
    config = load(name)
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_recipe_of_the_readme_is_there() -> None:
    assert "shapes_demo" in recipe_names()


def test_without_recipe_the_defaults_hold() -> None:
    assert load() == RunConfig()


def test_overrides_lie_over_the_recipe_and_read_as_yaml() -> None:
    config = load(
        "shapes_demo",
        [
            "train.learning_rate=1e-4",
            "rounds=3",
            "generate.height=null",
            "train.noise_range=[0.1, 0.9]",
            "label.scorer_args.name=a=b",
            "evaluate={every: 7}",
        ],
    )
    assert (config.train.learning_rate, config.rounds, config.generate.height) == (1e-4, 3, None)
    assert config.train.noise_range == (0.1, 0.9)
    assert config.label.scorer_args == {"name": "a=b"}
    assert config.evaluate.every == 7
    assert config.train.beta == load("shapes_demo").train.beta


def test_a_later_override_wins() -> None:
    assert load(None, ["rounds=3", "rounds=4"]).rounds == 4


def test_model_may_be_given_as_a_name_and_refined() -> None:
    assert load("shapes_demo", ["model=org/name"]).model.name == "org/name"
    refined = load("shapes_demo", ["model=org/name", "model.revision=main"]).model
    assert (refined.name, refined.revision) == ("org/name", "main")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().rounds = 3


@pytest.mark.parametrize(
    ("verdicts", "epochs", "batch", "steps"), [(0, 2, 64, 0), (1, 1, 64, 1), (128, 2, 64, 4), (512, 0.5, 64, 4)]
)
def test_steps_follow_from_verdicts_epochs_and_batch(verdicts: int, epochs: float, batch: int, steps: int) -> None:
    assert steps_for(verdicts, Train(epochs=epochs, global_batch=batch)) == steps


def test_implied_products_add_up() -> None:
    config = load(
        None,
        [
            "generate.images_per_round=128",
            "rounds=3",
            "train.workers=2",
            "train.global_batch=64",
            "train.micro_batch=8",
        ],
    )
    lines = implied(config, held_out_prompts=10)
    assert lines["images"] == "128 a round x 3 rounds = 384"
    assert lines["optimizer steps"] == "up to 4 a round, 12 in all"
    assert lines["effective batch"] == "64 = 2 workers x 8 x 4 accumulated"
    assert lines["held-out images"].endswith("= 50 an evaluation")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_unknown_key_in_a_recipe_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train:\n  learning_rat: 0.1\n")
    text = message(recipe=str(recipe))
    assert "'train.learning_rat'" in text
    assert "did you mean 'learning_rate'" in text


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.gama=0.5", "gamma"),
        ("round=3", "rounds"),
        ("train.adapter.rnk=4", "rank"),
        ("model.varian=fp16", "variant"),
        ("generate.resources.gpus=1", "num_gpus"),
    ],
)
def test_unknown_key_in_an_override_names_the_nearest(override: str, nearest: str) -> None:
    text = message(override)
    assert repr(override.partition("=")[0]) in text
    assert f"did you mean {nearest!r}" in text


def test_unknown_key_lists_what_is_known() -> None:
    assert "known here: tensorboard, wandb_project, mlflow_uri" in message("tracking.zzzzz=1")


@pytest.mark.parametrize(
    ("override", "given"),
    [
        ("rounds=many", "'many'"),
        ("rounds=1.5", "1.5"),
        ("rounds=0", "0"),
        ("train.beta=-1", "-1"),
        ("train=3", "3"),
        ("rounds.x=3", "{'x': 3}"),
        ("train.noise_range=[0]", "[0]"),
        ("label.threshold=.nan", "nan"),
    ],
)
def test_wrong_type_or_value_is_named_with_its_field(override: str, given: str) -> None:
    text = message(override)
    field = override.partition("=")[0].removesuffix(".x")
    assert field in text
    assert "should" in text or "required" in text
    assert given in text


def test_a_wrong_choice_lists_the_choices() -> None:
    text = message("train.utility=happiness")
    assert "train.utility" in text
    assert "'happiness'" in text
    assert "kahneman_tversky" in text


@pytest.mark.parametrize("gamma", ["0", "1", "1.5", "-0.1", ".nan"])
def test_gamma_must_be_a_proper_probability(gamma: str) -> None:
    text = message(f"train.gamma={gamma}")
    assert "train.gamma" in text
    assert "given: " in text
    assert any(words in text for words in ("greater than 0", "less than 1", "finite number"))


def test_a_batch_of_one_has_no_batch_reference_point() -> None:
    text = message("train.global_batch=1", "train.micro_batch=1")
    assert "global_batch 1" in text
    assert "batch_kl" in text
    assert "global_batch >= 2" in text
    assert "reference_point: zero" in text
    assert load(None, ["train.global_batch=1", "train.micro_batch=1", "train.reference_point=zero"])


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["train.global_batch=10", "train.workers=3"], ["global_batch (10)", "workers (3)", "multiple"]),
        (["train.global_batch=64", "train.micro_batch=24"], ["global_batch (64)", "micro_batch (24)", "multiple"]),
        (["train.noise_range=[0.5, 0.5]"], ["noise_range [0.5, 0.5]", "for instance [0, 1]"]),
        (["generate.min_replicas=3"], ["max_replicas (1)", "min_replicas (3)", "at least"]),
        (["label.min_actors=3"], ["max_actors (2)", "min_actors (3)", "at least"]),
    ],
)
def test_fields_that_contradict_each_other_are_named_together(overrides: list[str], names: list[str]) -> None:
    text = message(*overrides)
    assert all(name in text for name in names)


def test_all_mistakes_are_reported_at_once() -> None:
    text = message("rounds=0", "train.gamma=2")
    assert "rounds" in text
    assert "train.gamma" in text


def test_an_override_without_value_is_refused() -> None:
    text = message("rounds")
    assert "'rounds'" in text
    assert "rounds=3" in text


def test_an_override_that_is_not_yaml_is_refused() -> None:
    text = message("train.noise_range=[0, 1")
    assert "train.noise_range" in text
    assert "'[0, 1'" in text
    assert "YAML" in text


def test_unknown_recipe_names_the_nearest() -> None:
    text = message(recipe="shapes_dmo")
    assert "'shapes_dmo'" in text
    assert "did you mean 'shapes_demo'" in text


def test_missing_recipe_file_is_named(tmp_path: Path) -> None:
    text = message(recipe=str(tmp_path / "no.yaml"))
    assert str(tmp_path / "no.yaml") in text
    assert "shapes_demo" in text


@pytest.mark.parametrize(("content", "problem"), [("a: [", "not valid YAML"), ("- rounds", "mapping of fields")])
def test_a_malformed_recipe_is_named(tmp_path: Path, content: str, problem: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(content)
    text = message(recipe=str(recipe))
    assert str(recipe) in text
    assert problem in text


# -- continuing a run -------------------------------------------------------------------------------------------------


def test_the_same_configuration_continues_a_run() -> None:
    config = load("shapes_demo")
    require_same(config, RunConfig.model_validate(yaml.safe_load(to_yaml(config))))


def test_every_field_that_differs_is_named_with_both_values() -> None:
    saved = load("shapes_demo", ["train.beta=100", "label.scorer_args.x=1"])
    with pytest.raises(UserError) as caught:
        require_same(load("shapes_demo", ["train.beta=200", "seed=7", "label.scorer_args.x=2"]), saved)
    text = str(caught.value)
    assert "train.beta: the run has 100.0, this command says 200.0" in text
    assert "seed: the run has 0, this command says 7" in text
    assert "label.scorer_args.x: the run has 1, this command says 2" in text
    assert "learning_rate" not in text
    assert "another `run` name" in text


@pytest.mark.parametrize(
    "override",
    ["rounds=99", "runs_folder=elsewhere", "evaluate.every=3", "evaluate.stop_at_pass_rate=0.9", "cluster.wait_s=1"],
)
def test_what_may_change_on_resume_may(override: str) -> None:
    require_same(load("shapes_demo", [override]), load("shapes_demo"))
    assert any(override.startswith(field) for field in MAY_CHANGE_ON_RESUME)
