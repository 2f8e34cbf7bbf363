"""A run's folder as programs read it, and the commands that show it: compare, report and sample."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import kto_ray
from kto_ray import prompts
from kto_ray.cli import main
from kto_ray.config import RunConfig, to_yaml
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import load_family
from kto_ray.diffusion.policy import make_policy
from kto_ray.diffusion.sampling import draw
from kto_ray.diffusion.texts import Texts
from kto_ray.errors import UserError
from kto_ray.evaluate import comparison
from kto_ray.export.picturing import GAP
from kto_ray.policies import PolicyStore
from kto_ray.records import Prompt
from kto_ray.rounds import RoundStore
from kto_ray.run_folder import RunFolder
from kto_ray.storage import Storage
from tests.factories import make_samples, make_score, make_verdict

ROOT = Path(__file__).parents[2]
ROWS = [
    {"kind": "evaluation", "step": 0, "images": 4, "pass_rate": 0.5, "pass_rate_low": 0.4, "pass_rate_high": 0.6},
    {"kind": "round", "step": 0, "desirable": 3, "undesirable": 1, "abstained": 0, "failed": 0, "pending": 0},
    {"kind": "round", "step": 1, "desirable": 5, "undesirable": 0, "abstained": 1, "failed": 0, "pending": 0},
    {"kind": "evaluation", "step": 2, "images": 4, "pass_rate": 0.75, "pass_rate_low": 0.7, "pass_rate_high": 0.8,
     "win_rate": 0.6, "score/shapes": 0.25},
]  # fmt: skip


def make_run(folder: Path, name: str) -> Path:
    """One sealed round of four samples, figures of two, and one policy of the embedded world's model."""
    config = RunConfig.model_validate({"run": name, "label": {"scorers": "shapes"}, "generate": {"steps": 2}})
    run = Storage(str(folder / name))
    run.write("config.yaml", to_yaml(config).encode())
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    prompts.keep(run, "prompts.held_out", [Prompt("p0", "a red circle on black")])
    round_, samples = RoundStore(run).round(0), make_samples("round-00000", 4)
    round_.add_samples(samples)
    round_.add_scores([make_score(sample.id, place / 4) for place, sample in enumerate(samples[1:])])
    round_.add_scores([make_score(samples[0].id, None, "it failed")])
    round_.add_verdicts([make_verdict(sample.id, place > 1) for place, sample in enumerate(samples[1:])])
    round_.seal()
    place = source.resolve(config.model)
    family = load_family(place, config.model, torch.device("cpu"), torch.float32)
    policy = make_policy(family, config.train.adapter)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(0.1)
    store = PolicyStore(run)
    store.publish_base(source.reference_digest(place, config.model), source.component_digests(place, config.model))
    store.publish(1, policy.tensors(), policy.metadata())
    return folder / name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs"), "first")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, words, env={"COLUMNS": "300"})


def test_the_notebook_reads_a_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells, one after the other."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/notebooks/reading_a_run.ipynb").read_text())
    found: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), found)
    assert "policy 2: 75% pass (70% to 80%)" in capsys.readouterr().out
    assert found["counts"] == {"desirable": 1, "undesirable": 2, None: 1}
    images_NHWC = RunFolder(str(run)).images(0)
    assert np.array_equal(np.asarray(found["picture"]), np.concatenate(list(images_NHWC), axis=1))
    assert all(bool((tensor == 0.1).all()) for tensor in found["tensors"].values())


def test_rounds_are_tables(run: Path) -> None:
    folder = RunFolder(str(run))
    assert folder.rounds == [0]
    table = folder.table(0)
    assert table.num_rows == folder.samples(0).num_rows == folder.images(0).shape[0] == 4
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    scored = {row["sample_id"]: row["value"] for row in folder.scores(0).to_pylist()}
    judged = {row["sample_id"]: row["label"] for row in folder.verdicts(0).to_pylist()}
    (scorer,) = [name for name in table.column_names if name.startswith("score/")]
    assert {id_: row[scorer] for id_, row in rows.items()} == scored
    assert list(scored.values()).count(None) == 1
    assert {id_: row["label"] for id_, row in rows.items() if row["label"]} == judged
    assert len(judged) == 3
    assert folder.latents(0).dtype == np.float32
    with pytest.raises(UserError, match="has no sealed round 1; it has \\[0\\]"):
        folder.table(1)


def test_policies_are_state_dicts(run: Path) -> None:
    folder = RunFolder(str(run))
    assert folder.policies == [0, 1]
    assert folder.policy(0) is None
    tensors = folder.policy(1)
    assert tensors
    assert all(tensor.dtype == torch.float32 and bool((tensor == 0.1).all()) for tensor in tensors.values())
    with pytest.raises(UserError, match="has no policy 7; it has \\[0, 1\\]"):
        folder.policy(7)


def test_figures_are_rows(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(run))
    assert [row["step"] for row in folder.figures("evaluation")] == [0, 2]
    assert folder.figures() == [row for row in ROWS if row["kind"] == "round"]
    assert folder.summary is None
    with pytest.raises(ValueError, match="'epoch' is none of round, evaluation, fresh_evaluation"):
        folder.figures("epoch")
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder(str(tmp_path))


def test_figures_stand_over_images_drawn() -> None:
    rounds, evaluations = ([row for row in ROWS if row["kind"] == kind] for kind in ("round", "evaluation"))
    base, last = comparison.points_of("first", rounds, evaluations)
    assert (base.policy, base.images, last.policy, last.images) == (0, 0, 2, 10)
    assert last.as_row()["pass_rate_high"] == 0.8
    assert comparison.shown(last, "score/shapes") == "0.25"
    assert comparison.shown(base, "win_rate") == "\N{EN DASH}"
    assert comparison.figure_names([base, last]) == ["pass_rate", "win_rate", "score/shapes"]


def test_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, "second")
    said = invoke("compare", str(run), str(other), "--out", str(tmp_path / "page.html"))
    assert said.exit_code == 0, said.output
    lines = [line for line in said.stdout.splitlines() if "second" in line]
    assert len(lines) == 2
    assert "│ 2      │ 10     │ 75" in lines[1]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<tr>") == 5
    assert "data:image/svg+xml" in page
    rows = json.loads(invoke("compare", str(run), str(other), "--json", "--out", str(tmp_path / "c.png")).stdout)
    assert [(row["run"], row["images"]) for row in rows] == [("first", 0), ("first", 10), ("second", 0), ("second", 10)]
    with Image.open(tmp_path / "c.png") as drawn:
        assert drawn.width > 400
    assert invoke("compare", str(run), str(run)).exit_code == 2
    assert invoke("compare", str(run), "--out", "chart.pdf").exit_code == 2


def test_a_picture_shows_base_and_policy_from_the_same_seed(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "beside.png"
    said = invoke(
        "sample", str(run), "--prompt", "a red circle on black", "--seed", "3", "--count", "2", "--out", str(file)
    )
    assert said.exit_code == 0, said.output
    assert "the base on the left, policy 1 (" in said.stdout
    assert said.stdout.endswith("on the right, seeds 3 to 4\n")
    config = RunFolder(str(run)).config
    family = load_family(source.resolve(config.model), config.model, torch.device("cpu"), torch.float32)
    settings = config.held_out
    _, pixels_BHWC, _ = draw(family, Texts(lambda: family), ["a red circle on black"] * 2, [3, 4], settings)
    sheet = np.asarray(Image.open(file))
    height, width = pixels_BHWC.shape[1:3]
    left, right = sheet[:, :width], sheet[:, width + GAP :]
    assert np.array_equal(left[:height], pixels_BHWC[0])
    assert np.array_equal(left[height + GAP :], pixels_BHWC[1])
    assert not np.array_equal(left, right)


def test_a_picture_of_what_is_not_there_is_refused(run: Path) -> None:
    for words in (("--policy", "5"), ("--out", "picture.gif")):
        said = invoke("sample", str(run), "--prompt", "a ring", *words)
        assert said.exit_code == 2
        assert words[0] in said.stderr


def test_a_run_that_evaluated_nothing_has_no_report(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    said = invoke("report", str(tmp_path))
    assert said.exit_code == 2
    assert "nothing to report" in said.stderr


def test_the_public_names_are_there_and_documented() -> None:
    page = (ROOT / "docs/python.md").read_text()
    for name in kto_ray.PUBLIC:
        assert getattr(kto_ray, name).__doc__
        assert f"`{name}`" in page
        assert name in dir(kto_ray)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = kto_ray.Nothing


def test_reading_a_run_needs_no_ray(run: Path) -> None:
    script = f"import sys, kto_ray; kto_ray.RunFolder({str(run)!r}).table(0); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
