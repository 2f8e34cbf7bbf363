"""`kto-ray init`: recipes that are commented, whole, and pass the dry run; answers that do not go together."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kto_ray.beginning import COMMENTS, JUDGES, Answers, recipe_for, write_recipe
from kto_ray.cli import main
from kto_ray.config import RunConfig, from_tree, load, recipe_names, yaml12
from kto_ray.score.scorers import SCORERS


def made(*answers: object) -> RunConfig:
    return from_tree(yaml12.load(write_recipe(Answers(*answers))))  # type: ignore[arg-type]


def init(*words: str, typed: str = "") -> Result:
    return CliRunner().invoke(main, ["init", *words], input=typed)


@pytest.mark.parametrize("judge", ["shapes", "people"])
def test_what_is_written_passes_the_dry_run(judge: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    said = init("--model", "shapes", "--judge", judge, "--gpus", "0", "--out", str(file))
    assert said.exit_code == 0, said.output
    dry = CliRunner().invoke(main, ["run", "--recipe", str(file), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    config, text = load(str(file)), file.read_text()
    assert config.label.labeler == ("human" if judge == "people" else "threshold")
    assert all(f"# {comment}" in text for name, comment in COMMENTS.items() if f"\n{name}:" in text)
    assert init("--model", "shapes", "--judge", judge, "--gpus", "0", "--out", str(file)).exit_code == 2


def test_what_is_not_given_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "asked.yaml"
    said = init("--out", str(file), typed="acme/some-xl-model\npickscore\n4\n48\na.txt\nb.txt\n")
    assert said.exit_code == 0, said.output
    config = load(str(file))
    assert config.model.name == "acme/some-xl-model"
    assert (config.prompts.train.source, config.prompts.held_out.source) == ("a.txt", "b.txt")
    assert config.cluster.gpu_gb == 48
    assert (config.train.workers, config.generate.max_replicas) == (2, 2)
    assert config.generate.steps == load("sdxl_lora").generate.steps


def test_one_card_is_shared_by_all() -> None:
    config = made("acme/model", "pickscore", 1, 24.0, "mine", ("a.txt", "b.txt"))
    scorer = config.label.scorers["pickscore"].resources.num_gpus
    assert config.train.resources.num_gpus + config.generate.resources.num_gpus + scorer == 1
    assert (config.train.workers, config.generate.max_replicas) == (1, 1)


def test_every_judge_is_a_scorer_or_people() -> None:
    assert JUDGES.keys() - {"people"} <= SCORERS.keys()
    for judge in JUDGES:
        model, prompts = ("shapes", None) if judge == "shapes" else ("acme/model", ("a.txt", "b.txt"))
        config = made(model, judge, 2, None, "mine", prompts)
        assert config.label.labeler == "human" or judge in config.label.voting
    assert made("shapes", "my_taste:Sharpness", 0).label.voting["sharpness"].scorer == "my_taste:Sharpness"
    assert made("acme/model", "hpsv2", 2, None, "mine", ("a", "b")).label.scorers["hpsv2"].env == "hpsv2"


@pytest.mark.parametrize(
    ("answers", "flaw"),
    [
        (("acme/model", "shapes", 2, None, "mine", ("a", "b")), "--judge: shapes judges the images of"),
        (("acme/model", "pickscore", 0, None, "mine", ("a", "b")), "--gpus: 0 is enough for the model shapes alone"),
        (("acme/model", "pickscore", 2), "--prompts: a file of prompts"),
        (("shapes", "pickscore", 0), "--judge: pickscore needs a GPU"),
        (("shapes", "pikscore", 0), "--judge: 'pikscore' is none of"),
        (("shapes", "shapes", 0, None, "my run"), "run: 'my run' cannot be the name of a run"),
    ],
)
def test_answers_that_do_not_go_together_are_refused(answers: tuple[object, ...], flaw: str) -> None:
    with pytest.raises(Exception, match=flaw):
        made(*answers)


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl_lora"),
        ("stabilityai/stable-diffusion-3.5-medium", "sd35_medium_lora"),
        ("black-forest-labs/FLUX.1-dev", "flux1_dev_lora"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15_lora"),
    ],
)
def test_numbers_come_from_the_nearest_model(model: str, recipe: str) -> None:
    assert recipe_for(model) == recipe
    assert recipe in recipe_names()
