"""The examples keep their promises, compute what they say, and are the ones that the documentation shows."""

import ast
import asyncio
import csv
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import ndimage

import kto_ray
from examples import csv_people, my_prompts, my_taste
from kto_ray.check.contract import ask_all, check_labeler, check_prompts
from kto_ray.check.finding import Finding
from kto_ray.check.scorer_trial import ScorerTrial
from kto_ray.config import PromptSet, RunConfig
from kto_ray.records import Prompt
from kto_ray.samples import Samples
from kto_ray.score.scorers import load_scorer
from tests.factories import make_samples

ROOT = Path(kto_ray.__file__).parents[1]


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("scorer", ["Sharpness", "daylight"])
def test_the_scorers_pass_their_checks(scorer: str, size: tuple[int, int]) -> None:
    trial = ScorerTrial(f"examples.my_taste:{scorer}", {}, size)
    findings = ask_all(lambda name: Finding(*trial.check(name)))
    assert [finding for finding in findings if not finding.passed] == []
    assert {finding.name: finding.words for finding in findings}["sees what is no batch"] == ""


def test_the_labeler_passes_its_checks() -> None:
    findings = check_labeler("examples.my_taste:NeitherDarkNorGlaring", {"low": 50, "high": 150}, wait_s=5)
    assert [finding for finding in findings if not finding.passed] == []
    assert {finding.name: finding.words for finding in findings}["answers"].startswith("within ")


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """Against scipy's convolution, inside of the border."""
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], float)
    expected = [
        ndimage.convolve(image @ np.array([0.299, 0.587, 0.114]), kernel)[1:-1, 1:-1].var() for image in images_BHWC
    ]
    scores = my_taste.Sharpness().score(images_BHWC, [Prompt("1", "noise")] * 3)
    assert scores == pytest.approx(expected, rel=1e-5)


def test_blur_is_less_sharp_and_a_flat_image_not_at_all() -> None:
    image_HWC = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    blurred = [ndimage.gaussian_filter(image_HWC, (sigma, sigma, 0)) for sigma in (0.5, 1, 2)]
    batch_BHWC = np.stack([image_HWC, *blurred, np.full_like(image_HWC, 77)])
    scores = my_taste.Sharpness().score(batch_BHWC, [Prompt("1", "noise")] * 5)
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 5
    assert scores[-1] == pytest.approx(0, abs=1e-6)


def test_the_most_there_can_be_is_what_the_docstring_says() -> None:
    board = (np.indices((10, 10)).sum(0) % 2 * 255).astype(np.uint8)
    (score,) = my_taste.Sharpness().score(np.repeat(board[None, ..., None], 3, -1), [Prompt("1", "a chessboard")])
    assert score == pytest.approx(1020**2, rel=1e-5)
    assert str(1020**2) in (my_taste.Sharpness.__doc__ or "")


def test_an_image_without_inside_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3x3"):
        my_taste.Sharpness().score(np.zeros((1, 2, 9, 3), np.uint8), [Prompt("1", "a line")])


def test_a_night_is_to_be_dark() -> None:
    images_BHWC = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (0, 200, 0, 200)])
    prompts = [Prompt(str(i), text) for i, text in enumerate(["a day", "a day", "a night", "a night"])]
    assert my_taste.daylight(images_BHWC, prompts) == [0, 200, 255, 55]


async def test_the_labeler_judges_by_brightness() -> None:
    levels = [0, 59, 60, 130, 200, 201, 255]
    samples = [
        replace(sample, pixels_HWC=np.full((8, 8, 3), level, np.uint8))
        for sample, level in zip(make_samples("round-00000", len(levels)), levels, strict=True)
    ]
    labeler = my_taste.NeitherDarkNorGlaring()
    await labeler.submit(Samples.of(samples))
    verdicts = await labeler.collect()
    assert [verdict.sample_id for verdict in verdicts] == [sample.id for sample in samples]
    assert [verdict.label == "desirable" for verdict in verdicts] == [False, False, True, True, True, False, False]
    assert {verdict.rule for verdict in verdicts} == {"60 <= mean brightness <= 200"}


def test_a_run_takes_the_scorer_as_documented() -> None:
    scorers = "label.scorers={sharpness: {scorer: 'examples.my_taste:Sharpness', args: {luma: [0, 1, 0]}}}"
    outcome = subprocess.run(
        [sys.executable, "jobs/online_kto.py", "--dry-run", scorers, "label.threshold=100"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    config = RunConfig.model_validate(yaml.safe_load(outcome.stdout.partition("\n\n")[0]))
    settings = config.label.voting["sharpness"]
    scorer = load_scorer(settings.scorer or "")(**settings.args)
    assert isinstance(scorer, my_taste.Sharpness)
    assert scorer.luma.tolist() == [0, 1, 0]


async def test_verdicts_are_pulled_from_a_csv_that_grows(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 3)
    labeler = csv_people.GrowingCsv(str(tmp_path), poll_s=0.01)
    await labeler.start({})
    await labeler.submit(Samples.of(samples))
    await labeler.submit(Samples.of(samples))
    asked = list(csv.reader((tmp_path / "to_judge.csv").read_text().splitlines()))
    assert asked == [[sample.id, sample.prompt.text] for sample in samples]
    assert np.array_equal(Image.open(tmp_path / f"{samples[1].id}.png"), samples[1].pixels_HWC)

    answer = asyncio.create_task(labeler.collect())
    await asyncio.sleep(0.05)
    assert not answer.done()
    verdicts = tmp_path / "verdicts.csv"
    verdicts.write_text(f"{samples[2].id},desirable\n{samples[0].id},unde")  # half a line is still being written
    assert [(verdict.sample_id, verdict.label) for verdict in await answer] == [(samples[2].id, "desirable")]
    with verdicts.open("a") as file:
        file.write("sirable\n")

    again = csv_people.GrowingCsv(str(tmp_path), poll_s=0.01)  # the run goes on after a crash
    await again.start(labeler.memory())
    assert [(verdict.sample_id, verdict.label) for verdict in await again.collect()] == [(samples[0].id, "undesirable")]


def test_the_csv_labeler_passes_its_checks(tmp_path: Path) -> None:
    findings = check_labeler("examples.csv_people:GrowingCsv", {"folder": str(tmp_path)}, wait_s=1)
    assert [finding for finding in findings if not finding.passed] == []


def test_the_prompts_pass_their_checks() -> None:
    of = PromptSet(source="examples.my_prompts:Scenes", args={"things": ["cat", "car"], "count": 20})
    findings = {finding.name: finding for finding in check_prompts(of)}
    assert [finding for finding in findings.values() if not finding.passed] == []
    assert "20 prompts" in findings["gives prompts"].words


@pytest.mark.parametrize(("module", "page"), [(my_taste, "plugins"), (csv_people, "plugins"), (my_prompts, "prompts")])
def test_the_documentation_shows_the_examples_whole(module: ModuleType, page: str) -> None:
    page = (ROOT / "docs" / f"{page}.md").read_text()
    tree = ast.parse(inspect.getsource(module))
    shown = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert shown
    for name in shown:
        assert inspect.getsource(getattr(module, name)).strip() in page
        assert f"{module.__name__}:{name}" in page
