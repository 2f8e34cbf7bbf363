"""Policies against each other: medians of the same held-out prompts and seeds, by every scorer."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from kto_ray.config import load
from kto_ray.errors import UserError
from kto_ray.evaluate.duels import Contestant, duel, duels, markdown
from kto_ray.records import Prompt, SampleRequest
from kto_ray.rounds import Round
from kto_ray.storage import Storage
from tests.factories import make_sample, make_score

JOB = Path(__file__).parents[2] / "jobs" / "paper_table.py"


@pytest.fixture
def paper_table() -> ModuleType:
    """The job as a module: `jobs` is no package."""
    spec = importlib.util.spec_from_file_location("paper_table", JOB)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluated(folder: Path, title: str, *values: list[float | None]) -> Contestant:
    """A prompt each list, with the scores of its images."""
    round_ = Round(Storage(str(folder / title)), "evaluation")
    for number, of_prompt in enumerate(values):
        prompt = Prompt(f"p{number}", f"prompt {number}")
        requests = [SampleRequest.make(0, "evaluation", prompt, index) for index in range(len(of_prompt))]
        samples = [make_sample(request) for request in requests]
        round_.add_samples(samples)
        scored = zip(samples, of_prompt, strict=True)
        round_.add_scores(
            [make_score(sample.id, value, None if value is not None else "?") for sample, value in scored]
        )
    round_.seal()
    return Contestant(title, Round(Storage(str(folder / title)), "evaluation"))


def test_the_median_image_of_each_prompt_fights(tmp_path: Path) -> None:
    one = evaluated(tmp_path, "one", [0.9, 0.5, None], [0.1, 0.2, 0.9], [0.5, 0.5, 0.5], [None] * 3)
    other = evaluated(tmp_path, "other", [0.8, 0.6, 0.1], [0.3, 0.3, 0.3], [0.5, 0.1, 0.9], [0.5] * 3)
    found = duel(one, other, "shapes")  # medians 0.7 to 0.6, 0.2 to 0.3, a tie, and one without scores
    assert (found.value, found.used, found.left_out) == (0.5, 3, 1)
    better = evaluated(tmp_path, "better", [0.9] * 3, [0.9] * 3, [0.9] * 3, [0.9] * 3)
    assert duel(better, other, "shapes").value == 1
    table = markdown(better, duels(better, [one, other], ["shapes"])).splitlines()
    assert table[0] == "| better against | shapes |"
    assert [line.split("\u202f")[0] for line in table[2:]] == ["| one | 100", "| other | 100"]


def test_what_was_evaluated_otherwise_is_no_opponent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other held-out prompts or seeds: 4 and 6 images, 4 of them in common"):
        duel(evaluated(tmp_path, "a", [0.1] * 4), evaluated(tmp_path, "b", [0.1] * 4, [0.2] * 2), "shapes")
    alone = evaluated(tmp_path, "c", [0.1] * 4)
    with pytest.raises(UserError, match="by clip: no prompt to compare"):
        duel(alone, alone, "clip")


def test_the_papers_runs_differ_in_their_objective_alone(paper_table: ModuleType) -> None:
    configs = paper_table.configs_of("paper", ["data=liked/", "run=mine"])
    assert [config.run for config in configs.values()] == ["mine-kto", "mine-sft", "mine-csft"]
    assert [config.train.objective.kind for config in configs.values()] == ["diffusion_kto", "sft", "csft"]
    for config in configs.values():
        assert config.offline
        assert config.rounds * config.optimizer_steps_per_round == 10_000
        assert config.evaluate.images_per_prompt == 5
        kto = configs["kto"]
        same = {"run": kto.run, "train": config.train.model_copy(update={"objective": kto.train.objective})}
        assert config.model_copy(update=same) == kto
    train = load("paper", []).train
    assert (train.gamma, train.prompt_dropout, train.learning_rate, train.warmup_steps) == (0.8, 0.2, 1e-7, 1000)
    steps = paper_table.configs_of("paper", ["data=liked/", "data.stream.steps=3"])["kto"]
    assert steps.optimizer_steps_per_round == 3
