"""The configuration tree: what a recipe and overrides resolve to, and what is said when they are wrong."""

import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from kto_ray.config import (
    RunConfig,
    ScorerSettings,
    Train,
    implied,
    load,
    override,
    recipe_names,
    require_same,
    steps_for,
    to_yaml,
)
from kto_ray.config.resuming import changes_of, write_down
from kto_ray.errors import UserError
from kto_ray.identity import Free, Noted, OnResume, marks_of
from kto_ray.score.scorers import SCORERS
from kto_ray.section import Section
from kto_ray.storage import Storage
from kto_ray.verdicts.thresholds import (
    Absolute,
    Agreement,
    PromptQuantile,
    RoundQuantile,
    RunningMean,
    TopBottom,
    WeightedSum,
)


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
            "label.scorers.shapes.args.name=a=b",
            "evaluate={every: 7}",
        ],
    )
    assert (config.train.learning_rate, config.rounds, config.generate.height) == (1e-4, 3, None)
    assert config.train.noise_range == (0.1, 0.9)
    assert config.label.scorers["shapes"].args == {"name": "a=b"}
    assert config.evaluate.every == 7
    assert config.train.objective.beta == load("shapes_demo").train.objective.beta


def test_a_later_override_wins() -> None:
    assert load(None, ["rounds=3", "rounds=4"]).rounds == 4


def test_model_may_be_given_as_a_name_and_refined() -> None:
    assert load("shapes_demo", ["model=org/name"]).model.name == "org/name"
    refined = load("shapes_demo", ["model=org/name", "model.revision=main"]).model
    assert (refined.name, refined.revision) == ("org/name", "main")


def test_overrides_lie_over_a_configuration_too() -> None:
    config = load("shapes_ensemble")
    changed = override(config, ["label.scorers.redness.threshold.quantile=0.7", "rounds=3"])
    assert changed.label.scorers["redness"].threshold == RoundQuantile(quantile=0.7)
    assert (changed.rounds, changed.label.scorers["shapes"]) == (3, config.label.scorers["shapes"])
    assert config == load("shapes_ensemble")


# -- scorers and thresholds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "scorers"),
    [
        ("label.scorers=redness", {"redness": ScorerSettings()}),
        ("label.scorers=my_pkg.mod:Name", {"Name": ScorerSettings(scorer="my_pkg.mod:Name")}),
        (
            "label.scorers=[shapes, my_pkg.mod:Name]",
            {"shapes": ScorerSettings(), "Name": ScorerSettings(scorer="my_pkg.mod:Name")},
        ),
        ("label.scorers={shapes: null, redness: {}}", {"shapes": ScorerSettings(), "redness": ScorerSettings()}),
        ("label.scorers.redness.weight=2", {"shapes": ScorerSettings(), "redness": ScorerSettings(weight=2)}),
        ("label.scorers.redness=null", {"shapes": ScorerSettings(), "redness": ScorerSettings()}),
    ],
)
def test_scorers_have_short_forms(tmp_path: Path, override: str, scorers: dict[str, ScorerSettings]) -> None:
    for short in ("shapes", "[shapes]", "{shapes: }", "{shapes: {}}"):
        (tmp_path / "mine.yaml").write_text(f"label: {{scorers: {short}}}")
        assert load(str(tmp_path / "mine.yaml"), [override]).label.scorers == scorers


@pytest.mark.parametrize(
    ("overrides", "threshold"),
    [
        (["label.threshold=0.7"], Absolute(value=0.7)),
        (["label.threshold=-2"], Absolute(value=-2)),
        (["label.threshold={value: 0.7, dead_band: 0.1}"], Absolute(value=0.7, dead_band=0.1)),
        (["label.threshold.dead_band=0.1"], Absolute(value=0.5, dead_band=0.1)),
        (["label.threshold=running_mean"], RunningMean()),
        (["label.threshold=running_mean", "label.threshold.z=2"], RunningMean(z=2)),
        (["label.threshold={kind: round_quantile, quantile: 0.7}"], RoundQuantile(quantile=0.7)),
        (["label.threshold={kind: top_bottom, top: 0.1}", "label.threshold.top=0.2"], TopBottom(top=0.2)),
    ],
)
def test_thresholds_have_short_forms(overrides: list[str], threshold: object) -> None:
    assert load("shapes_demo", overrides).label.threshold == threshold


def test_a_scorer_may_have_its_own_threshold_in_any_form() -> None:
    voting, own = "label.combine=agreement", "label.scorers.shapes.threshold"
    assert load(None, [voting, f"{own}=3"]).label.scorers["shapes"].threshold == Absolute(value=3)
    refined = load(None, [voting, f"{own}=3", f"{own}.dead_band=1"])
    assert refined.label.scorers["shapes"].threshold == Absolute(value=3, dead_band=1)
    named = load(None, [voting, f"{own}=top_bottom", f"{own}.top=0.1"])
    assert named.label.scorers["shapes"].threshold == TopBottom(top=0.1)


@pytest.mark.parametrize(
    ("overrides", "combine"),
    [
        (["label.combine=agreement"], Agreement()),
        (["label.combine.calibration=running"], WeightedSum(calibration="running")),
        (
            ["label.combine={calibration: round}", "label.combine.decay=0.5"],
            WeightedSum(calibration="round", decay=0.5),
        ),
        (["label.combine=weighted_sum", "label.combine.calibration=round"], WeightedSum(calibration="round")),
    ],
)
def test_combinations_have_short_forms(overrides: list[str], combine: object) -> None:
    assert load(None, overrides).label.combine == combine


@pytest.mark.parametrize("section", ["label", "train"])
def test_a_word_stands_for_a_watch(section: str) -> None:
    for overrides in ([f"{section}.watch=stop"], [f"{section}.watch=stop", f"{section}.watch.rounds=9"]):
        watch = getattr(load(None, overrides), section).watch
        assert (watch.action, watch.rounds) == ("stop", 5 if len(overrides) == 1 else 9)


def test_what_looks_like_a_short_form_elsewhere_is_left_alone() -> None:
    overrides = ["label.scorers.shapes.args.threshold=3", "label.scorers.shapes.args.threshold.low=1"]
    assert load(None, overrides).label.scorers["shapes"].args == {"threshold": {"low": 1}}
    named = load(None, ["label.scorers={threshold: {scorer: shapes}}", "label.scorers.threshold.weight=2"])
    assert named.label.scorers == {"threshold": ScorerSettings(scorer="shapes", weight=2)}


def test_held_out_scorers_do_not_vote() -> None:
    label = load(None, ["label.scorers={shapes: , redness: {held_out: true}}"]).label
    assert (list(label.voting), label.held_out) == (["shapes"], ["redness"])


@pytest.mark.parametrize(
    "threshold",
    [
        Absolute(value=-1.5, dead_band=0.1),
        RoundQuantile(quantile=0.7, dead_band=0.05),
        PromptQuantile(quantile=0.25),
        TopBottom(top=0.1, bottom=0.3),
        RunningMean(z=-1, decay=0.5, dead_band=0.1),
    ],
    ids=str,
)
def test_every_threshold_survives_yaml(threshold: Absolute, tmp_path: Path) -> None:
    written = threshold.model_dump_json()
    overrides = [f"label.threshold={written}", "label.combine=majority", f"label.scorers.shapes.threshold={written}"]
    config = load(None, [*overrides, "generate.images_per_prompt=2"])
    assert config.label.threshold == config.label.scorers["shapes"].threshold == threshold
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(str(tmp_path / "again.yaml")) == override(config, []) == config


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_names_scorers_that_are_built_in(name: str) -> None:
    label = load(name).label
    assert label.scorers.keys() <= SCORERS.keys()
    assert label.voting or label.labeler == "human"


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
        ("label.scorers.shapes.weigth=2", "weight"),
        ("label.scorers.shapes.resources.gpus=1", "num_gpus"),
        ("label.threshold.dead_bnd=1", "dead_band"),
        ("label.combine.calibrate=round", "calibration"),
        ("label.watch.round=4", "rounds"),
        ("replay.label=strict", "labels"),
    ],
)
def test_unknown_key_in_an_override_names_the_nearest(override: str, nearest: str) -> None:
    text = message(override)
    assert repr(override.partition("=")[0]) in text
    assert f"did you mean {nearest!r}" in text


@pytest.mark.parametrize("field", ["label.threshold", "label.scorers.shapes.threshold"])
def test_unknown_key_of_a_threshold_is_named_without_the_kind(field: str) -> None:
    text = message(f"{field}={{kind: round_quantile, quantil: 0.5}}")
    assert f"unknown field '{field}.quantil', did you mean 'quantile'?" in text
    assert "known here: kind, quantile, dead_band" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("label.threshold={kind: round_quantil}", ["unknown kind 'round_quantil'", "did you mean 'round_quantile'"]),
        ("label.threshold=hihg", ["unknown kind 'hihg'", "known: absolute, round_quantile, prompt_quantile, top_bot"]),
        ("label.threshold=true", ["unknown kind 'True'"]),
        ("label.threshold=[1]", ["unknown kind '[1]'"]),
        ("label.scorers.shapes.threshold.kind=top_botom", ["unknown kind 'top_botom'", "did you mean 'top_bottom'"]),
        ("label.combine=majorty", ["unknown kind 'majorty'", "did you mean 'majority'", "known: weighted_sum, agree"]),
        ("label.combine=null", ["unknown kind 'None'", "agreement"]),
    ],
)
def test_unknown_kind_names_the_nearest_and_the_known(override: str, said: list[str]) -> None:
    text = message(override)
    assert text.startswith(override.partition("=")[0].removesuffix(".kind") + ": ")
    assert all(words in text for words in said)


@pytest.mark.parametrize(
    ("overrides", "unknown"),
    [
        (["label.combine=agreement", "label.combine.calibration=round"], "label.combine.calibration"),
        (["label.threshold=0.5", "label.threshold.kind=round_quantile"], "label.threshold.value"),
        (["label.threshold=top_bottom", "label.threshold.quantile=0.5"], "label.threshold.quantile"),
    ],
)
def test_an_override_into_a_short_form_does_not_forget_its_kind(overrides: list[str], unknown: str) -> None:
    assert f"unknown field {unknown!r}" in message(*overrides)


def test_unknown_key_lists_what_is_known() -> None:
    assert "known here: tensorboard, wandb_project, mlflow_uri" in message("tracking.zzzzz=1")


@pytest.mark.parametrize(
    ("override", "given"),
    [
        ("rounds=many", "'many'"),
        ("rounds=1.5", "1.5"),
        ("rounds=0", "0"),
        ("train.objective.beta=-1", "-1"),
        ("train=3", "3"),
        ("rounds.x=3", "{'x': 3}"),
        ("train.noise_range=[0]", "[0]"),
        ("label.threshold=.nan", "nan"),
        ("label.threshold={kind: round_quantile, quantile: 0}", "0"),
        ("label.threshold={kind: prompt_quantile, quantile: 1}", "1"),
        ("label.threshold={kind: running_mean, decay: 2}", "2"),
        ("label.threshold={quantile: 0.5}", "{'kind': 'absolute', 'quantile': 0.5}"),
        ("label.combine={calibration: never}", "'never'"),
        ("label.scorers.shapes.weight=0", "0"),
        ("label.scorers.shapes.std=0", "0"),
        ("label.scorers.shapes=3", "3"),
        ("label.scorers=3", "3"),
        ("label.scorers=[shapes, {redness: 1}]", "['shapes', {'redness': 1}]"),
        ("label.on_one_class=widne", "'widne'"),
        ("label.watch.rounds=2", "2"),
        ("train.watch=always", "always"),
        ("train.watch.diversity=1", "1"),
        ("replay={labels: strict}", "{'labels': 'strict'}"),
    ],
)
def test_wrong_type_or_value_is_named_with_its_field(override: str, given: str) -> None:
    text = message(override)
    field = override.partition("=")[0].removesuffix(".x")
    assert field in text
    assert "should" in text or "required" in text
    assert given in text


def test_a_wrong_choice_lists_the_choices() -> None:
    text = message("train.objective.utility=happiness")
    assert "train.objective.utility" in text
    assert "'happiness'" in text
    assert "kahneman_tversky" in text


@pytest.mark.parametrize("gamma", ["0", "1", "1.5", "-0.1", ".nan"])
def test_gamma_must_be_a_proper_probability(gamma: str) -> None:
    text = message(f"train.gamma={gamma}")
    assert "train.gamma" in text
    assert "given: " in text
    assert any(words in text for words in ("greater than 0", "less than 1", "finite number"))


def test_a_step_has_samples_of_each_part_of_the_noise_range() -> None:
    text = message("train.objective.reference_point=noise_mean", "train.objective.noise_parts=65")
    assert "objective.noise_parts (65) must be at most global_batch (64)" in text
    assert load(None, ["train.objective.reference_point=noise_mean", "train.objective.noise_parts=64"])
    assert "train.objective.memory" in message("train.objective.memory=1")


def test_replayed_rounds_have_no_policy_to_be_measured_against() -> None:
    text = message("train.objective.reference=ema", "replay.run=runs/earlier")
    assert "train.objective (diffusion_kto, reference: ema)" in text
    assert "with reference: fixed or round" in text
    assert load(None, ["train.objective.reference=ema"])
    assert load(None, ["train.objective.reference=round", "replay.run=runs/earlier"])


def test_a_batch_of_one_has_no_batch_reference_point() -> None:
    text = message("train.global_batch=1", "train.micro_batch=1")
    assert "global_batch 1" in text
    assert "batch_kl" in text
    assert "global_batch >= 2" in text
    assert "objective.reference_point: zero" in text
    assert load(None, ["train.global_batch=1", "train.micro_batch=1", "train.objective.reference_point=zero"])


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["train.global_batch=10", "train.workers=3"], ["global_batch (10)", "workers (3)", "multiple"]),
        (["train.global_batch=64", "train.micro_batch=24"], ["global_batch (64)", "micro_batch (24)", "multiple"]),
        (["train.noise_range=[0.5, 0.5]"], ["noise_range [0.5, 0.5]", "for instance [0, 1]"]),
        (["keep_policies=2", "train.keep_checkpoints=3"], ["keep_policies (2)", "at least train.keep_checkpoints (3)"]),
        (["generate.min_replicas=3"], ["max_replicas (1)", "min_replicas (3)", "at least"]),
        (["label.scorers.shapes.min_actors=3"], ["label.scorers.shapes: max_actors (2)", "min_actors (3)", "at least"]),
        (
            ["label.threshold={kind: top_bottom, top: 0.7, bottom: 0.4}"],
            ["label.threshold: top (0.7) and bottom (0.4)", "not be more than 1"],
        ),
        (["label.scorers.shapes.held_out=true"], ["label: scorers", "at least one that is not held_out"]),
        (["label.scorers=[]"], ["label: scorers", "at least one"]),
        (["label.scorers=[my.mod:Name, your.mod:Name]"], ["label.scorers: two scorers of one name", "{scorer: ...}"]),
        (
            ["label.scorers.shapes.threshold=0.7"],
            ["label: scorers.shapes.threshold", "weighted_sum", "label.threshold", "combine=agreement"],
        ),
        (
            ["label.threshold=prompt_quantile"],
            ["generate.images_per_prompt (1)", "at least 2", "prompt_quantile"],
        ),
        (
            ["label.combine=majority", "label.scorers.shapes.threshold=prompt_quantile"],
            ["generate.images_per_prompt (1)", "at least 2", "prompt_quantile"],
        ),
        (
            ["generate.images_per_round=100", "generate.images_per_prompt=3"],
            ["generate.images_per_round (100)", "multiple", "generate.images_per_prompt (3)"],
        ),
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


@pytest.mark.parametrize(
    "name", ["", "my run", "team/exp", "../outside", ".hidden", "-x", "Läufe", "a%b", "x?y", "x#y", "a;b", "a" * 101]
)
def test_a_name_that_no_run_can_have_is_refused(name: str) -> None:
    text = message(f"run={name!r}")
    assert text.startswith(f"run: {name!r} cannot be the name of a run")
    assert "letters, digits, '.', '_' and '-', beginning with a letter or digit, 100 at most" in text


@pytest.mark.parametrize("name", ["demo", "SD1.5_lora-2", "2026-11-25", "a" * 100])
def test_a_name_that_a_run_can_have(name: str) -> None:
    assert load(None, [f"run={name}"]).run == name


def test_a_name_that_is_a_number_to_yaml_is_to_be_quoted() -> None:
    assert "run: 42 is not a text to YAML" in message("run=42")
    assert load(None, ['run="42"']).run == "42"


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
    saved = load("shapes_demo", ["train.objective.beta=100", "label.scorers.shapes.args.x=1"])
    with pytest.raises(UserError) as caught:
        require_same(
            load("shapes_demo", ["train.objective.beta=200", "seed=7", "label.scorers.shapes.args.x=2"]), saved
        )
    text = str(caught.value)
    assert "train.objective.beta: the run has 100.0, this command says 200.0" in text
    assert "seed: the run has 0, this command says 7" in text
    assert "label.scorers.shapes.args.x: the run has 1, this command says 2" in text
    assert "learning_rate" not in text
    assert "another `run` name" in text


@pytest.mark.parametrize(
    "override",
    [
        *("rounds=99", "runs_folder=elsewhere", "evaluate.every=3", "evaluate.stop_at_pass_rate=0.9"),
        *("cluster.wait_s=1", "label.scorers.shapes.resources.num_cpus=9", "label.scorers.shapes.timeout_s=9"),
        *("label.scorers.shapes.max_actors=9", "label.scorers.shapes.max_retries=9", "label.scorers.shapes.env=mine"),
        *("label.on_one_class=widen", "label.min_verdicts=9", "label.watch.action=stop", "label.deadline_s=9"),
        # Out of memory, or other machines.
        *("generate.batch_size=1", "generate.compile=true", "generate.device=cpu", "generate.max_ongoing_requests=1"),
        *("train.micro_batch=8", "train.gradient_checkpointing=true", "train.compile=true", "train.device=cpu"),
        *("label.watch=off", "train.watch=stop", "train.watch.saturated=0.9"),
    ],
)
def test_what_may_change_on_resume_may(override: str) -> None:
    assert load("shapes_demo", [override]) != load("shapes_demo")
    require_same(load("shapes_demo", [override]), load("shapes_demo"))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("label.scorers.shapes.args.timeout_s=9", "label.scorers.shapes.args.timeout_s"),
        ("label.scorers.shapes.args={env: mine}", "label.scorers.shapes.args.env"),
        ("label.scorers.shapes.scorer=tests.plugins:CoinScorer", "label.scorers.shapes.scorer"),
        ("label.scorers.shapes.weight=2", "label.scorers.shapes.weight"),
        ("label.scorers.redness=null", "label.scorers.redness"),
        ("label.threshold=0.7", "label.threshold.value"),
        ("label.threshold=round_quantile", "label.threshold"),
        ("label.combine=majority", "label.combine"),
        ("generate.images_per_prompt=2", "generate.images_per_prompt"),
        ("replay.run=elsewhere", "replay"),
    ],
)
def test_what_makes_another_experiment_may_not(override: str, field: str) -> None:
    with pytest.raises(UserError, match=rf"  {field}: the run has .*, this command says "):
        require_same(load("shapes_demo", [override]), load("shapes_demo"))


def test_settings_of_a_scorer_may_change_but_not_arguments_of_the_same_name() -> None:
    arguments = ["label.scorers.shapes.args={timeout_s: 1, env: a, resources: {gpus: 1}}"]
    for changed in ("timeout_s=2", "env=b", "resources.gpus=2"):
        with pytest.raises(UserError, match=r"label\.scorers\.shapes\.args\."):
            require_same(
                load("shapes_demo", [*arguments, f"label.scorers.shapes.args.{changed}"]),
                load("shapes_demo", arguments),
            )


def test_every_field_has_decided_whether_it_may_change() -> None:
    """A new field says `Fixed`, `ByContent`, `Noted` or `Free`; see `kto_ray/identity.py`."""
    undecided = []
    for section, keys in sections(RunConfig, ()):
        for name, field in section.model_fields.items():
            marks = [mark for mark in field.metadata if isinstance(mark, OnResume)]
            only_a_section = inspect.isclass(field.annotation) and issubclass(field.annotation, Section)
            names_its_kind = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
            if len(marks) != 1 and not (only_a_section or names_its_kind):
                undecided.append(".".join((*keys, name)))
    assert not undecided


def sections(section: type[Section], keys: tuple[str, ...]) -> Iterator[tuple[type[Section], tuple[str, ...]]]:
    yield section, keys
    for name, field in section.model_fields.items():
        for found in within(field.annotation):
            yield from sections(found, (*keys, name))


def within(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from within(part)


def test_sections_are_found_behind_kinds_and_names() -> None:
    found = {section.__name__ for section, _ in sections(RunConfig, ())}
    assert {"Resources", "ScorerSettings", "PromptQuantile", "RouteRandom", "Replay", "Adapter"} <= found


class Curious:
    def __init__(self, question: str, device: Noted[str] = "auto", retries: Free[int] = 3) -> None: ...


def test_arguments_of_a_plug_in_may_change_where_it_says_so() -> None:
    saved = load("shapes_demo", ["label.scorers.shapes.args={question: why, device: cpu}"])
    marks = {"label.scorers.shapes.args": marks_of(Curious)}
    free = load("shapes_demo", ["label.scorers.shapes.args={question: why, device: cuda, retries: 9}"])
    assert [(change.field, change.before, change.after) for change in require_same(free, saved, marks)] == [
        ("label.scorers.shapes.args.device", "cpu", "cuda"),
        ("label.scorers.shapes.args.retries", None, 9),
    ]
    with pytest.raises(UserError, match=r"label\.scorers\.shapes\.args\.question: the run has 'why'"):
        require_same(load("shapes_demo", ["label.scorers.shapes.args={question: how, device: cpu}"]), saved, marks)


def test_a_name_may_change_when_its_content_is_known_to_be_the_same() -> None:
    moved, saved = load("shapes_demo", ["model.name=/elsewhere"]), load("shapes_demo")
    with pytest.raises(UserError, match=r"model\.name: the run has 'shapes', this command says '/elsewhere'"):
        require_same(moved, saved, same_content=["prompts", "mode"])
    assert [change.field for change in require_same(moved, saved, same_content=["model"])] == ["model.name"]


def test_changes_are_written_down_with_the_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, saved = Storage(str(tmp_path)), load("shapes_demo")
    overrides = ["rounds=99", "train.micro_batch=8", "generate.batch_size=1"]
    changes = require_same(load("shapes_demo", overrides), saved)
    for _ in range(2):  # a start that ended before it came further
        write_down(changes, run, 3)
    write_down([], run, 4)
    assert changes_of(run) == [
        {"round": 3, "field": "rounds", "before": saved.rounds, "after": 99},
        {"round": 3, "field": "generate.batch_size", "before": saved.generate.batch_size, "after": 1},
        {"round": 3, "field": "train.micro_batch", "before": saved.train.micro_batch, "after": 8},
    ]
    assert "generate.batch_size, train.micro_batch changed: from round 3 on" in caplog.text
    assert "rounds" not in caplog.text.partition("changed")[0]
    assert changes_of(Storage(str(tmp_path / "another"))) == []
