"""Everything that can be wrong before machine time is spent is said before, with field, value and remedy."""

import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kto_ray.config import Model, RunConfig, load, recipe_names, to_yaml
from kto_ray.config.resuming import changes_of
from kto_ray.diffusion import source
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.geometry import image_size
from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore
from kto_ray.preflight import Preflight, describe, disk_bytes
from kto_ray.prompts import FILES, keep
from kto_ray.records import Prompt
from kto_ray.relabel import relabel, saved_config
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.train.checkpoints import REWINDING
from tests.factories import make_samples, make_score, make_verdict, write_pipeline, write_prompts

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture
def base(tmp_path: Path, model: Path) -> list[str]:
    """Overrides of a run that is well."""
    return [
        f"runs_folder={tmp_path / 'runs'}",
        f"model={model}",
        f"prompts.train={write_prompts(tmp_path / 'train.jsonl', ['a cat', 'a dog'])}",
        f"prompts.held_out={write_prompts(tmp_path / 'held_out.jsonl', ['a cow'])}",
    ]


def begin(config: RunConfig) -> Preflight:
    """As a run does it."""
    found = Preflight.check(config)
    found.begin(config)
    return found


def message(base: list[str], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Preflight.check(load("shapes_demo", [*base, *overrides]))
    return str(caught.value)


def test_a_run_that_is_well_is_ready(base: list[str], tmp_path: Path, model: Path) -> None:
    config = load("shapes_demo", base)
    found = begin(config)
    assert [prompt.text for prompt in found.train_prompts] == ["a cat", "a dog"]
    assert [prompt.text for prompt in found.held_out_prompts] == ["a cow"]
    assert found.reference_digest == source.reference_digest(model, Model())
    assert found.run.local == tmp_path / "runs" / "demo"
    assert load(str(tmp_path / "runs" / "demo" / "config.yaml")) == config


def test_every_recipe_of_the_embedded_world_is_ready(tmp_path: Path) -> None:
    for recipe in recipe_names():
        if load(recipe).model.name == "shapes":
            begin(load(recipe, [f"runs_folder={tmp_path}"]))


def test_remote_run_folders_are_checked_too(base: list[str], tmp_path: Path) -> None:
    config = load("shapes_demo", [*base, f"runs_folder=memory:/{tmp_path}"])
    assert begin(config).run.read("config.yaml").decode() == to_yaml(config)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["prompts.train", "prompts.held_out"])
def test_an_empty_prompts_file(base: list[str], tmp_path: Path, field: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    text = message(base, f"{field}={tmp_path / 'empty.jsonl'}")
    assert field in text
    assert "empty.jsonl" in text
    assert "at least one prompt" in text


def test_held_out_prompts_that_are_trained_on(base: list[str], tmp_path: Path) -> None:
    text = message(base, f"prompts.held_out={write_prompts(tmp_path / 'other.jsonl', ['a cow', 'a dog'])}")
    assert "prompts.held_out: 1 of its prompts" in text
    assert "'a dog'" in text
    assert "must not be in prompts.train" in text


def test_held_out_prompts_that_differ_in_case_and_spaces_only(base: list[str], tmp_path: Path) -> None:
    text = message(base, f"prompts.held_out={write_prompts(tmp_path / 'other.jsonl', ['a cow', ' A   DOG '])}")
    assert "prompts.held_out: 1 of its prompts" in text
    assert "' A   DOG '" in text


def test_a_prefix_takes_room_from_the_prompt(base: list[str], caplog: pytest.LogCaptureFixture) -> None:
    describe(load("shapes_demo", [*base, "train.objective=csft"]))
    assert "the model reads only the first 8 tokens" in caplog.text


def test_held_out_prompts_that_the_model_reads_as_one_it_is_trained_on(
    base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a red circle on a black square and "
    train = write_prompts(tmp_path / "long.jsonl", ["a cat", f"{long} one"])
    held_out = write_prompts(tmp_path / "held.jsonl", [f"{long} two"])
    describe(load("shapes_demo", [*base, f"prompts.train={train}", f"prompts.held_out={held_out}"]))
    assert "prompts.train: of 1 of 2 prompts the model reads only the first 8 tokens" in caplog.text
    assert f"most is lost of '{long} one': 'square and one'" in caplog.text
    assert "prompts.held_out: 1 of its prompts are in their first 8 tokens" in caplog.text


@pytest.mark.parametrize("which", ["train", "held_out"])
@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a bat", "a cow"], ["number 1 was 'a cow' (id 'a cow')", "is 'a bat'"]),
        (["a cow"], ["number 2 was 'a dog' (id 'a dog')", "is not there now"]),
        (["a cow", "a dog", "a bat"], ["number 3 was not there", "is 'a bat' (id 'a bat') now"]),
    ],
)
def test_prompts_that_changed_since_the_run_began(
    base: list[str], tmp_path: Path, which: str, texts: list[str], said: list[str]
) -> None:
    file = write_prompts(tmp_path / "edited.jsonl", ["a cow", "a dog"])
    others = write_prompts(tmp_path / "others.jsonl", ["a hen"])
    files = [f"prompts.{name}={file if name == which else others}" for name in ("train", "held_out")]
    begin(load("shapes_demo", [*base, *files]))
    begin(load("shapes_demo", [*base, *files]))
    write_prompts(file, texts)
    text = message(base, *files)
    assert text.startswith(f"prompts.{which}: the run began with other prompts")
    assert [words for words in [*said, "another `run` name"] if words not in text] == []


def test_a_run_without_ids_goes_on_with_its_numbers(base: list[str], tmp_path: Path) -> None:
    """Its prompts were named by their place in the file, which it has kept."""
    file = tmp_path / "plain.txt"
    file.write_text("a cat\na dog\n")
    settings = load("shapes_demo", [*base, f"prompts.train={file}"])
    run = begin(settings).run
    numbered = [Prompt("1", "a cat"), Prompt("2", "a dog")]
    run.delete(FILES["prompts.train"])
    keep(run, "prompts.train", numbered)
    assert begin(settings).train_prompts == numbered
    run.local and shutil.rmtree(run.local / "prompts")  # as a run of release 0.1.0 has none
    assert begin(settings).train_prompts == numbered


def test_a_file_of_the_same_prompts_may_move(base: list[str], tmp_path: Path) -> None:
    run = begin(load("shapes_demo", base)).run
    moved = write_prompts(tmp_path / "moved.jsonl", ["a cat", "a dog"])
    begin(load("shapes_demo", [*base, f"prompts.train={moved}"]))
    assert [row["field"] for row in changes_of(run)] == ["prompts.train.source"]
    run.local and shutil.rmtree(run.local / "prompts")  # as a run of release 0.1.0 has none
    assert "prompts.train.source: the run has" in message(base)


# -- plug-ins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("label.scorers=shape", ["label.scorers.shape: ", "'shape'", "did you mean 'shapes'"]),
        ("label.scorers=nowhere.mod:Scorer", ["label.scorers.Scorer: ", "'nowhere.mod'", "cannot import"]),
        ("label.scorers.mine={scorer: rednes, held_out: true}", ["label.scorers.mine: ", "did you mean 'redness'"]),
        (
            "label.scorers=tests.plugins:nothing",
            ["label.scorers.nothing: ", "'tests.plugins'", "no class or function 'nothing'"],
        ),
        ("label.labeler=peoples", ["label.labeler", "'peoples'", "package.module:Name"]),
        ("label.labeler=tests.plugins:Nobody", ["label.labeler", "'tests.plugins'", "no class 'Nobody'"]),
    ],
)
def test_an_unknown_plug_in(base: list[str], override: str, said: list[str]) -> None:
    text = message(base, override)
    assert all(words in text for words in said)


def brightness(images_BHWC: npt.NDArray[np.uint8], _: Sequence[Prompt]) -> list[float]:
    return [float(image.mean()) for image in images_BHWC]


def test_classes_and_functions_of_ones_own_are_found(base: list[str]) -> None:
    scorers = f"label.scorers=[shapes, tests.plugins:CoinScorer, {__name__}:brightness]"
    begin(load("shapes_demo", [*base, scorers]))


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ("hpsv3", ["unknown environment 'hpsv3'", "did you mean 'hpsv2'"]),
        ("hpsv2", ["'hpsv2' is not built", "kto-ray env build hpsv2"]),
        ("/no/such/python", ["/no/such/python", "path of a Python"]),
    ],
)
def test_an_environment_that_is_not_there(
    base: list[str], env: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTO_RAY_ENVS", str(tmp_path / "environments"))
    text = message(base, f"label.scorers.shapes.env={env}")
    assert text.startswith("label.scorers.shapes.env: ")
    assert all(words in text for words in said)


def test_an_environment_may_be_a_python_of_ones_own(base: list[str]) -> None:
    begin(load("shapes_demo", [*base, f"label.scorers.shapes.env={sys.executable}"]))


# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(base: list[str]) -> Storage:
    """An earlier run of one sealed round, with a label set."""
    run = begin(load("shapes_demo", [*base, "run=earlier"])).run
    round_, samples = RoundStore(run).round(0), make_samples("round-00000", 2)
    round_.add_samples(samples)
    round_.add_scores([make_score(sample.id) for sample in samples])
    round_.add_verdicts([make_verdict(sample.id) for sample in samples])
    round_.seal()
    relabel(run, "strict", ["label.threshold=0.9"])
    return run


def test_rounds_that_can_be_replayed(base: list[str], earlier: Storage) -> None:
    for labels in ("null", "strict"):
        overrides = [*base, f"replay={{run: {earlier}, labels: {labels}}}", f"run=replay_{labels}"]
        begin(load("shapes_demo", overrides))


def test_a_replay_of_what_is_no_run(base: list[str], tmp_path: Path) -> None:
    text = message(base, f"replay.run={tmp_path / 'nowhere'}")
    assert text.startswith("replay.run: ")
    assert f"{tmp_path / 'nowhere'} is not a run folder" in text
    assert not (tmp_path / "nowhere").exists()


def test_a_replay_of_a_run_without_rounds(base: list[str]) -> None:
    run = begin(load("shapes_demo", [*base, "run=empty"])).run
    assert message(base, f"replay.run={run}") == f"replay.run: {run} has no sealed round yet"


def test_a_replay_of_another_model(base: list[str], tmp_path: Path, model: Path, earlier: Storage) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    text = message([*base, f"model={other}"], f"replay.run={earlier}")
    assert text.startswith("replay.run: ")
    assert str(model) in text
    assert str(other) in text


def test_a_replay_of_the_same_model_elsewhere(base: list[str], tmp_path: Path, model: Path, earlier: Storage) -> None:
    PolicyStore(earlier).publish_base(source.reference_digest(model, Model()), source.component_digests(model, Model()))
    moved = shutil.copytree(model, tmp_path / "moved")
    begin(load("shapes_demo", [*base, f"model={moved}", f"replay.run={earlier}", "run=again"]))


def test_a_replay_of_an_unknown_label_set(base: list[str], earlier: Storage) -> None:
    text = message(base, f"replay={{run: {earlier}, labels: strickt}}")
    assert text.startswith("replay.labels: ")
    assert "'strickt'" in text
    assert "it has: strict" in text
    assert f"kto-ray relabel {earlier} --name strickt" in text


# -- model ------------------------------------------------------------------------------------------------------------


def test_a_missing_model(base: list[str], tmp_path: Path) -> None:
    text = message(base, f"model={tmp_path / 'missing'}")
    assert "model.name" in text
    assert str(tmp_path / "missing") in text
    assert "give a diffusers pipeline folder" in text


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-model", "not a/hub name"])
def test_a_model_that_the_hub_does_not_give(base: list[str], name: str) -> None:
    text = message(base, f"model={name}")
    assert f"model.name: {name!r}" in text
    assert "check the name, the network" in text


def test_a_truncated_model(base: list[str], tmp_path: Path, model: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    text = message(base, f"model={copy}")
    assert "model.name" in text
    assert str(weights) in text
    assert "download it again" in text


def test_a_model_of_an_unsupported_family(base: list[str], tmp_path: Path, model: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    text = message(base, f"model={copy}")
    assert "model.name" in text
    assert "WanPipeline" in text
    assert "supported: StableDiffusionPipeline" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DDIMSchedular", ["unknown to diffusers", "did you mean 'DDIMScheduler'"]),
        (
            "EDMEulerScheduler",
            ["for models that were trained with EDM's own noise levels", "fitting: ", "DDIMScheduler"],
        ),
        ("FlowMatchEulerDiscreteScheduler", ["not compatible", "fitting: ", "DDIMScheduler"]),
    ],
)
def test_a_scheduler_that_does_not_fit(base: list[str], name: str, said: list[str]) -> None:
    text = message(base, f"generate.scheduler={name}")
    assert f"generate.scheduler: {name!r}" in text
    assert all(words in text for words in said)


def test_a_model_that_predicts_something_else(base: list[str], tmp_path: Path, model: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("v_prediction", "sample"))
    text = message(base, f"model={copy}")
    assert "model.name" in text
    assert "'sample'" in text
    assert "supported: epsilon, v_prediction" in text


# -- run folder -------------------------------------------------------------------------------------------------------


def test_a_run_begun_with_another_configuration_names_each_difference(base: list[str]) -> None:
    begin(load("shapes_demo", [*base, "train.objective.beta=150", "seed=0"]))
    text = message(base, "train.objective.beta=99", "seed=5")
    assert "run 'demo'" in text
    assert "train.objective.beta: the run has 150.0, this command says 99.0" in text
    assert "seed: the run has 0, this command says 5" in text
    assert "another `run` name" in text


def test_a_refused_configuration_does_not_replace_the_saved_one(base: list[str], tmp_path: Path) -> None:
    begin(load("shapes_demo", base))
    message(base, "train.objective.beta=99")
    assert load(str(tmp_path / "runs" / "demo" / "config.yaml")) == load("shapes_demo", base)


def test_a_run_does_not_go_on_with_other_arguments_of_its_scorer(base: list[str]) -> None:
    coins = "label.scorers.shapes={scorer: tests.plugins:CoinScorer, args: {seconds: 0.0}}"
    begin(load("shapes_demo", [*base, coins]))
    begin(load("shapes_demo", [*base, coins, "label.scorers.shapes.resources.num_cpus=0.1"]))
    text = message(base, coins, "label.scorers.shapes.args.seconds=1.0")
    assert "label.scorers.shapes.args.seconds: the run has 0.0, this command says 1.0" in text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("generate.scheduler=PNDMScheduler", "generate.scheduler=null"),
        ("generate.scheduler=null", "generate.scheduler=PNDMScheduler"),
        ("train.adapter.target_modules=[to_q,to_k,to_v,to_out.0]", "train.adapter.target_modules=null"),
    ],
)
def test_what_is_said_and_what_it_stands_for_are_the_same(
    base: list[str], tiny_sd1_folder: Path, before: str, after: str
) -> None:
    base = [*base, f"model={tiny_sd1_folder}"]
    begin(load("shapes_demo", [*base, before]))
    begin(load("shapes_demo", [*base, after]))
    other = f"{before.partition('=')[0]}={'DDIMScheduler' if 'scheduler' in before else '[to_q]'}"
    assert f"{before.partition('=')[0]}: the run has" in message(base, other)


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (0, "train.optimizer: adamw_paged moves its state between a GPU and the host, and train."),
        (0, "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed"),
        (1, "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed"),
    ],
)
def test_an_optimizer_that_cannot_be_had(
    base: list[str], monkeypatch: pytest.MonkeyPatch, gpus: int, said: str
) -> None:
    monkeypatch.setattr("kto_ray.train.optimizers.find_spec", lambda name: None)
    overrides = [f"train.optimizer={said.split()[1]}", f"train.resources.num_gpus={gpus}"]
    assert message(base, *overrides).startswith(said)


def test_a_longer_run_continues(base: list[str]) -> None:
    begin(load("shapes_demo", base))
    begin(load("shapes_demo", [*base, "rounds=30"]))


def test_a_run_that_ran_out_of_memory_goes_on_with_less(base: list[str]) -> None:
    coins = "label.scorers.shapes={scorer: tests.plugins:CoinScorer, args: {seconds: 0.0}}"
    run = begin(load("shapes_demo", [*base, coins])).run
    run.write("rounds/00000/training.json", b"{}")
    less = ["generate.batch_size=1", "train.gradient_checkpointing=true", "train.micro_batch=1"]
    begin(load("shapes_demo", [*base, coins, *less, "label.scorers.shapes.args.device=cpu"]))
    rows = changes_of(run)
    assert {row["round"] for row in rows} == {1}
    assert [(row["field"], row["after"]) for row in rows] == [
        ("generate.batch_size", 1),
        ("label.scorers.shapes.args.device", "cpu"),
        ("train.micro_batch", 1),
        ("train.gradient_checkpointing", True),
    ]
    assert saved_config(run).generate.batch_size == 1


def test_a_policy_whose_weights_went_is_not_evaluated_after_all(base: list[str]) -> None:
    base = [*base, "keep_policies=2", "evaluate.every=2"]
    run = begin(load("shapes_demo", [*base, "rounds=9"])).run
    store = PolicyStore(run)
    for version in range(1, 9):
        store.publish(version, {"weight": torch.full((1,), float(version))}, {})
    for version in (0, 2, 4, 6):
        run.write_json(f"evaluations/{version:05}/manifest.json", {})
    store.drop_before(7)
    text = message(base, "rounds=9", "evaluate.every=1")
    assert "evaluate.every (1) and rounds (9)" in text
    assert "gone (keep_policies): 1, 3, 5; give the values of the run, 2 and 9, or more rounds" in text
    assert "gone (keep_policies): 5;" in message(base, "rounds=5")
    for well in (["rounds=9"], ["rounds=6"], ["rounds=7"], ["rounds=30"], ["rounds=9", "evaluate.every=4"]):
        Preflight.check(load("shapes_demo", [*base, *well]))
    begin(load("shapes_demo", [*base, "rounds=9", "keep_policies=all"]))


@pytest.mark.parametrize("content", ["begun_by: another version\n", "a: [", "just text"])
def test_a_run_folder_of_another_version_is_named(base: list[str], tmp_path: Path, content: str) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "config.yaml").write_text(content)
    text = message(base)
    assert str(tmp_path / "runs" / "demo" / "config.yaml") in text
    assert "another `run` name" in text


def test_a_run_folder_that_cannot_be_written(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    text = message(base)
    assert "runs_folder" in text
    assert str(tmp_path / "runs") in text
    assert "can be written" in text


def test_a_full_disk(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 10**6, 10**6))
    text = message(base)
    assert "runs_folder" in text
    assert str(tmp_path / "runs" / "demo") in text
    assert "0.00 GB free" in text
    assert "make room" in text


def test_a_run_folder_that_nothing_opens(base: list[str]) -> None:
    text = message(base, "runs_folder=bogus://here")
    assert "runs_folder" in text
    assert "bogus://here" in text


# -- the base model of a run that goes on ------------------------------------------------------------------------------


def begin_with_base(base: list[str]) -> Storage:
    found = begin(load("shapes_demo", base))
    PolicyStore(found.run).publish_base(found.reference_digest, found.components)
    return found.run


def test_a_model_may_move(base: list[str], tmp_path: Path, model: Path) -> None:
    run = begin_with_base(base)
    moved = shutil.copytree(model, tmp_path / "moved")
    begin(load("shapes_demo", [*base, f"model={moved}"]))
    assert saved_config(run).model.name == str(moved)
    assert [row["field"] for row in changes_of(run)] == ["model.name"]


@pytest.mark.parametrize("component", ["vae", "text_encoder", "unet"])
def test_a_model_that_changed_is_refused_with_the_component(
    base: list[str], tmp_path: Path, model: Path, component: str
) -> None:
    own = shutil.copytree(model, tmp_path / "own")
    begin_with_base([*base, f"model={own}"])
    (own / component / "config.json").write_text((own / component / "config.json").read_text() + " ")
    text = message(base, f"model={own}")
    assert text.startswith(f"model.name: the base model has changed since the run began: {component} is not")
    assert "give the model that the run began with, or another `run` name" in text


def test_another_model_is_another_configuration(base: list[str], tmp_path: Path, model: Path) -> None:
    begin_with_base(base)
    other = shutil.copytree(model, tmp_path / "other")
    (other / "vae" / "config.json").write_text((other / "vae" / "config.json").read_text() + " ")
    text = message(base, f"model={other}")
    assert f"model.name: the run has {str(model)!r}, this command says {str(other)!r}" in text


def test_a_run_of_an_older_version_cannot_tell_whether_its_model_moved(
    base: list[str], tmp_path: Path, model: Path
) -> None:
    run = begin_with_base(base)
    run.write_json("policies/00000/policy.json", {"version": 0, "digest": source.reference_digest(model, Model())})
    moved = shutil.copytree(model, tmp_path / "moved")
    assert "model.name: the run has" in message(base, f"model={moved}")
    begin(load("shapes_demo", base))


# -- what can be drawn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["generate.width=96"], "generate.width: 96 without the other side; give generate.height and generate.width"),
        (["generate.height=2"], "generate.height: 2 without the other side; give generate.height and generate.width"),
        (["generate.height=60", "generate.width=64"], "generate.height: 60 is no multiple of 8"),
        (["generate.height=64", "generate.width=3"], "generate.width: 3 is no multiple of 8"),
        (["generate.steps=1001"], "generate.steps: 1001 is more than the 1000 that the model was trained with"),
        (["generate.scheduler=LMSDiscreteScheduler"], "generate.scheduler: 'LMSDiscreteScheduler' is without zero"),
    ],
)
def test_what_cannot_be_drawn(base: list[str], overrides: list[str], said: str) -> None:
    assert message(base, *overrides).startswith(said)


@pytest.mark.parametrize(("size", "pixels"), [(8, (64, 64)), ([8, 12], (64, 96))])
def test_the_size_that_a_model_was_trained_on(
    base: list[str], tmp_path: Path, model: Path, size: Any, pixels: Any
) -> None:
    folder = sized(shutil.copytree(model, tmp_path / "sized"), size)
    assert image_size(load("shapes_demo").generate, family_of(folder, Model()).geometry_of(folder)) == pixels
    begin(load("shapes_demo", [*base, f"model={folder}"]))


def test_a_model_that_does_not_say_its_size(base: list[str], tmp_path: Path, model: Path) -> None:
    folder = sized(shutil.copytree(model, tmp_path / "sized"), None)
    assert "the model does not say how large" in message(base, f"model={folder}")
    begin(load("shapes_demo", [*base, f"model={folder}", "generate.height=64", "generate.width=96"]))


def sized(folder: Path, size: int | list[int] | None) -> Path:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    return folder


# -- the dry run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "prompts.held_out={train}",
        "generate.scheduler=ddim",
        "generate.width=60",
        "tracking.wandb_project=x",
        "label.scorers=shape",
        "model={train}",
        "runs_folder={train}",
        "train.gamma=0.3",
    ],
)
def test_the_dry_run_refuses_what_a_run_refuses_and_writes_nothing(
    base: list[str], tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    begin(load("shapes_demo", [*base, "run=begun"]))
    train = tmp_path / "train.jsonl"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = load("shapes_demo", [*base, override.format(train=train), "run=begun"])
    with pytest.raises(UserError) as run:
        Preflight.check(config)
    with pytest.raises(UserError) as dry_run:
        describe(config)
    assert str(dry_run.value) == str(run.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["label.labeler=human"],
        ["label.labeler=human", "label.human.database=sqlite:///{folder}/people.sqlite"],
        ["label.labeler=feedback", "label.feedback.folder={folder}/published"],
    ],
)
def test_the_dry_run_makes_neither_folder_nor_database(base: list[str], tmp_path: Path, overrides: list[str]) -> None:
    before = set(tmp_path.iterdir())
    describe(load("shapes_demo", [*base, *(override.format(folder=tmp_path) for override in overrides)]))
    assert set(tmp_path.iterdir()) == before


def test_a_database_file_needs_a_folder(base: list[str], tmp_path: Path) -> None:
    text = message(base, "label.labeler=human", f"label.human.database=sqlite:///{tmp_path}/no/people.sqlite")
    assert f"there is no folder {tmp_path}/no" in text


def test_an_application_is_looked_for_before_a_run_begins(base: list[str], tmp_path: Path) -> None:
    text = message(base, "label.labeler=feedback", f"label.feedback.path={tmp_path}/no/*.parquet")
    assert f"label.feedback.path: there is nothing at {tmp_path}/no/*.parquet" in text


# -- estimates --------------------------------------------------------------------------------------------------------


def small(model: Path, *overrides: str) -> int:
    return disk_bytes(load("shapes_demo", [f"model={model}", *overrides]), model, 10)


def test_the_estimate_covers_images_and_latents(model: Path) -> None:
    one = 64 * 64 * 3 + 8 * 8 * 4 * 4
    more, fewer = (small(model, "rounds=10", f"generate.images_per_round={images}") for images in (500, 400))
    assert more - fewer == 100 * 10 * one
    assert small(model, "generate.height=128", "generate.width=128") > 3.5 * small(model)
    assert small(model, "rounds=100") > 5 * small(model, "rounds=10")
    twice_more = small(model, "evaluate.stop_at_pass_rate=0.9") - small(model)  # base and last policy, from fresh seeds
    assert twice_more == 2 * 10 * 5 * one
    assert small(model, "train.adapter.kind=full") > small(model)
    last_two = [
        small(model, f"rounds={rounds}", "keep_policies=2", "generate.images_per_round=4") for rounds in (9, 10)
    ]
    assert last_two[1] - last_two[0] == 4 * one
    lean = ("keep_policies=2", "keep_pixels=1", "generate.images_per_round=400", "evaluate.every=1000")
    without_pixels = [small(model, f"rounds={rounds}", *lean) for rounds in (9, 10)]
    assert without_pixels[1] - without_pixels[0] == 400 * 8 * 8 * 4 * 4


def test_the_dry_run_tells_what_follows(base: list[str]) -> None:
    config: RunConfig = load("shapes_demo", base)
    text = describe(config)
    assert text.startswith(to_yaml(config))
    assert "prompts: 2 for training, 1 held out" in text
    assert "MB uncompressed" in text
    assert "downloaded" in describe(load("sd15_lora"))


def test_a_run_that_is_half_rewound_does_not_go_on(base: list[str]) -> None:
    run = begin(load("shapes_demo", base)).run
    run.write_json(REWINDING, {"to": 3})
    assert f"kto-ray rewind {run} --to 3" in message(base)


def submitted(monkeypatch: pytest.MonkeyPatch, folder: Path, **runtime_env: str) -> None:
    """As a driver finds itself behind `ray job submit`."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env, "metadata": {}}))


@pytest.mark.parametrize("given", ["runs", "./mine/runs", "{}/runs"])
def test_a_submitted_job_keeps_nothing_in_its_working_directory(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    unpacked = tmp_path / "working_dir_files"
    unpacked.mkdir()
    submitted(monkeypatch, unpacked, working_dir="gcs://_ray_pkg_1f.zip")
    with pytest.raises(UserError, match=r"^runs_folder: .*runs is in this job's working directory .*s3://bucket/runs"):
        Preflight.check(load("shapes_demo", [*base, f"runs_folder={given.format(unpacked)}"]))
    Preflight.check(load("shapes_demo", [*base, f"runs_folder={tmp_path}"]))
    submitted(monkeypatch, unpacked)  # without a working directory of its own
    Preflight.check(load("shapes_demo", [*base, "runs_folder=runs"]))
