"""Label sets: old rounds judged anew without a byte of theirs changed, and replayed with either verdicts."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kto_ray.config import Replay, RunConfig, load, to_yaml
from kto_ray.errors import UserError
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.preflight import Preflight
from kto_ray.records import Score, Verdict, scores_to_table, table_to_verdicts
from kto_ray.relabel import RelabeledRound, Replayed, relabel, saved_config, sealed_rounds
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from tests.factories import make_samples, write_prompts

VALUES = [[0.1, 0.6, 0.7, None], [0.2, 0.3, 0.8, 0.9], [0.4, 0.9, 0.9, 1.0]]
OTHERS = [[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, None], [0.0, 1.0, 0.0, 1.0]]


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    scorers = "label.scorers={shapes: , redness: {held_out: true}}"
    return load("shapes_demo", [f"runs_folder={tmp_path}", scorers, *overrides])


def judged_by_the_labeler(config: RunConfig) -> list[list[Verdict]]:
    """What the run itself would have said, had it had this configuration."""

    async def judge() -> list[list[Verdict]]:
        labeler, rounds = ThresholdLabeler(config.label), []
        await labeler.start({})
        for index in range(len(VALUES)):
            stage = f"round-{index:05}"
            await labeler.submit(make_samples(stage, 4))
            await labeler.scored(stage, scores(index))
            await labeler.finish(stage)
            rounds.append(list(await labeler.collect()))
        return rounds

    return asyncio.run(judge())


def scores(index: int) -> list[Score]:
    samples = make_samples(f"round-{index:05}", 4)
    return [
        Score(sample.id, scorer, "1", value, None if value is not None else f"RuntimeError: no {scorer}")
        for scorer, values in (("shapes", VALUES[index]), ("redness", OTHERS[index]))
        for sample, value in zip(samples, values, strict=True)
    ]


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run of three sealed rounds that "shapes" has judged, and a fourth that is open."""
    folder = Storage(str(tmp_path / "demo") if request.param == "local" else f"memory:/{tmp_path}/demo")
    config = config_of(tmp_path)
    folder.write("config.yaml", to_yaml(config).encode())
    for index, verdicts in enumerate(judged_by_the_labeler(config)):
        round_ = RoundStore(folder).round(index)
        round_.add_samples(make_samples(f"round-{index:05}", 4))
        round_.add_scores(scores(index))
        round_.add_verdicts(verdicts)
        round_.seal(round=index)
    RoundStore(folder).round(3).add_samples(make_samples("round-00003", 1))
    return folder


def label_set(run: Storage, name: str) -> list[list[Verdict]]:
    folder = run / "labels" / name
    rounds = [index for index in folder.names() if index.isdigit()]
    return [table_to_verdicts((folder / index).read_table("verdicts.parquet")) for index in rounds]


def labels(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.label for verdict in verdicts]


def bytes_of_rounds(run: Storage) -> dict[str, bytes]:
    names = [
        f"rounds/{index}/{kind}/{name}"
        for index in run.names("rounds")
        for kind in ("samples", "scores", "verdicts")
        for name in run.names(f"rounds/{index}/{kind}")
    ]
    return {name: run.read(name) for name in [*names, "config.yaml", "rounds/00000/manifest.json"]}


def message(run: Storage, *overrides: str, name: str = "strict") -> str:
    with pytest.raises(UserError) as caught:
        relabel(run, name, overrides)
    assert not run.exists(f"labels/{name}/labels.json") or name == "taken"
    return str(caught.value)


# -- label sets -------------------------------------------------------------------------------------------------------


def test_a_run_whose_name_is_no_longer_allowed_still_opens(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "my run"))
    run.write("config.yaml", to_yaml(RunConfig(run="my run")).encode())
    assert saved_config(run).run == "my run"
    with pytest.raises(UserError, match="has no sealed round yet"):
        relabel(run, "strict", ["label.threshold=0.9"])


def test_old_rounds_are_left_to_the_byte_and_still_verify(run: Storage) -> None:
    before = bytes_of_rounds(run)
    relabel(run, "strict", ["label.threshold=0.75"])
    assert bytes_of_rounds(run) == before
    for round_ in sealed_rounds(run):
        round_.verify()
    assert RoundStore(run).ledger().labeled == 11


def test_a_label_set_is_complete_and_says_what_it_was_made_with(run: Storage) -> None:
    relabel(run, "strict", ["label.threshold=0.75"])
    verdicts = label_set(run, "strict")
    assert [[v.sample_id for v in round_] for round_ in verdicts] == [
        [sample.id for sample in make_samples(f"round-{index:05}", 4)] for index in range(3)
    ]
    assert [labels(round_) for round_ in verdicts] == [
        ["undesirable", "undesirable", "undesirable", "failed"],
        ["undesirable", "undesirable", "desirable", "desirable"],
        ["undesirable", "desirable", "desirable", "desirable"],
    ]
    assert verdicts[0][0].rule == "absolute@1(value=0.75, dead_band=0): shapes >= 0.75"
    assert verdicts[0][3].rule == "no score of shapes: RuntimeError: no shapes"
    written = run.read_json("labels/strict/labels.json")
    assert (written["rounds"], written["label"]["threshold"]["value"]) == (3, 0.75)


def test_the_report_counts_labels_and_changes(run: Storage) -> None:
    report = relabel(run, "strict", ["label.threshold=0.75"])
    assert report == [
        RelabeledRound(0, Counter(undesirable=3, failed=1), 0.5),
        RelabeledRound(1, Counter(desirable=2, undesirable=2), 0),
        RelabeledRound(2, Counter(desirable=3, undesirable=1), 0),
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["label.threshold=running_mean"],
        ["label.threshold={kind: round_quantile, quantile: 0.7, dead_band: 0.1}"],
        ["label.threshold=99", "label.on_one_class=widen"],
        ["label.scorers.redness.held_out=false", "label.combine=majority", "label.threshold=round_quantile"],
        ["label.scorers.redness.held_out=false", "label.combine.calibration=running", "label.threshold=0"],
        ["label.scorers=redness", "label.threshold=2"],
    ],
)
def test_old_rounds_are_judged_as_the_run_would_have_judged_them(
    run: Storage, tmp_path: Path, overrides: list[str]
) -> None:
    relabel(run, "anew", overrides)
    expected = judged_by_the_labeler(config_of(tmp_path, *overrides))
    assert label_set(run, "anew") == expected


def test_people_s_rounds_can_be_judged_by_thresholds(run: Storage, tmp_path: Path) -> None:
    people = config_of(tmp_path, "label.labeler=my_pkg.mod:People", "label.scorers.shapes.held_out=true")
    run.write("config.yaml", to_yaml(people).encode())
    assert "at least one that is not held_out" in message(run)
    relabel(run, "strict", ["label.scorers.shapes.held_out=false"])
    assert labels(label_set(run, "strict")[1]) == ["undesirable", "undesirable", "desirable", "desirable"]


def test_a_half_made_label_set_is_made_again(run: Storage) -> None:
    (run / "labels" / "strict" / "00000").write("verdicts.parquet", b"half")
    relabel(run, "strict", [])
    assert len(label_set(run, "strict")) == 3


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_name_is_taken_once(run: Storage) -> None:
    relabel(run, "taken", [])
    assert "has a label set 'taken' already" in message(run, "label.threshold=0.9", name="taken")
    assert run.read_json("labels/taken/labels.json")["label"]["threshold"]["value"] == 0.5


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../rounds", "a b", "a.b"])
def test_a_name_is_a_plain_word(run: Storage, name: str) -> None:
    text = message(run, name=name)
    assert text.startswith(f"name: {name!r}")
    assert "letters, digits" in text


@pytest.mark.parametrize("override", ["train.objective.beta=3", "rounds=99", "label={threshold: 0.9}", "labels=1"])
def test_only_fields_of_label_can_be_given(run: Storage, override: str) -> None:
    text = message(run, "label.threshold=0.9", override)
    assert repr(override) in text
    assert "only fields of `label`" in text


def test_a_wrong_override_is_named_as_ever(run: Storage) -> None:
    assert "did you mean 'quantile'" in message(run, "label.threshold={kind: round_quantile, quantil: 0.7}")
    assert "must be at least 2" in message(run, "label.threshold=prompt_quantile")


def test_scores_that_the_run_does_not_have(run: Storage) -> None:
    text = message(run, "label.scorers.aesthetic=null")
    assert text == f"label.scorers: {run} has no scores of 'aesthetic'; it has those of: redness, shapes"


@pytest.mark.parametrize("content", [None, b"a: [", b"just text", b"begun_by: another version\n", b""])
def test_what_is_no_run_of_this_version(tmp_path: Path, content: bytes | None) -> None:
    folder = Storage(str(tmp_path / "nothing"))
    if content is not None:
        folder.write("config.yaml", content)
    text = message(folder)
    assert text.startswith(f"run: {folder}")
    assert ("is not a run folder" if content is None else "is not a configuration of this version") in text


def test_a_run_without_sealed_rounds(tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "new"))
    folder.write("config.yaml", to_yaml(config_of(tmp_path)).encode())
    RoundStore(folder).round(0).add_samples(make_samples("round-00000", 2))
    assert message(folder) == f"run: {folder} has no sealed round yet"


# -- replay -----------------------------------------------------------------------------------------------------------


def replayed(run: Storage, target: RoundStore, labels: str | None = None) -> Replayed:
    """All its rounds, copied into another run."""
    rounds = Replayed(Replay(run=str(run), labels=labels), saved_config(run))
    for index in range(rounds.rounds):
        round_ = target.round(index)
        rounds.fill(index, round_)
        round_.seal(replayed_from=str(run))
    return rounds


@pytest.mark.parametrize(("name", "first"), [(None, [False, True, True]), ("strict", [False, False, False])])
def test_a_replayed_round_is_trained_on_as_its_label_set_says(
    run: Storage, tmp_path: Path, name: str | None, first: list[bool]
) -> None:
    relabel(run, "strict", ["label.threshold=0.75"])
    target = RoundStore(Storage(str(tmp_path / "target")))
    assert replayed(run, target, name).rounds == 3
    samples, desirable = target.trainable(0, policy_version=7, max_policy_lag=0)
    assert [sample.id for sample in samples] == [sample.id for sample in make_samples("round-00000", 4)[:3]]
    assert desirable == first
    assert np.array_equal(target.latents_of(samples)[0], make_samples("round-00000", 1 + 3)[0].latents_CHW)
    assert target.trainable(2, 9, 0)[1] == [False, True, True, True]


def test_a_replayed_round_has_all_scores_and_its_ledger_balances(run: Storage, tmp_path: Path) -> None:
    target = RoundStore(Storage(str(tmp_path / "target")))
    replayed(run, target)
    for index in range(3):
        assert target.round(index).scores() == RoundStore(run).round(index).scores()
        assert target.round(index).verdicts() == RoundStore(run).round(index).verdicts()
    ledger = target.ledger()
    assert (ledger.generated, ledger.labeled, ledger.failed) == (12, 11, 1)
    assert ledger.balances


def test_filling_twice_changes_nothing(run: Storage, tmp_path: Path) -> None:
    rounds = Replayed(Replay(run=str(run)), saved_config(run))
    target = RoundStore(Storage(str(tmp_path / "target")))
    for _ in range(2):
        rounds.fill(0, target.round(0))
    assert (len(target.round(0).samples()), len(target.round(0).verdicts())) == (4, 4)


def test_rounds_sealed_after_the_label_set_was_made_are_not_replayed(run: Storage) -> None:
    relabel(run, "strict", [])
    round_ = RoundStore(run).round(3)
    round_.seal()
    assert Replayed(Replay(run=str(run), labels="strict"), saved_config(run)).rounds == 3
    assert Replayed(Replay(run=str(run)), saved_config(run)).rounds == 4


def test_a_round_that_has_changed_is_not_replayed(run: Storage, tmp_path: Path) -> None:
    round_ = RoundStore(run).round(1)
    round_.storage.write_table("scores.parquet", scores_to_table(scores(1)[:4]))
    with pytest.raises(ValueError, match="has changed since the round was sealed"):
        replayed(run, RoundStore(Storage(str(tmp_path / "target"))))


def test_how_many_rounds_are_replayed_is_settled_once(run: Storage, tmp_path: Path) -> None:
    here, settings = Storage(str(tmp_path / "here")), Replay(run=str(run))
    first = Replayed(settings, config_of(tmp_path))
    first.settle(here)
    RoundStore(run).round(3).seal(round=3)
    again = Replayed(settings, config_of(tmp_path))
    assert (first.rounds, again.rounds) == (3, 4)
    again.settle(here)
    assert again.rounds == 3


def test_prompts_held_out_here_are_not_replayed(run: Storage, tmp_path: Path) -> None:
    held_out = write_prompts(tmp_path / "held_out.jsonl", ["prompt 2", "something else"])
    config = config_of(tmp_path, "run=here", f"replay={{run: '{run}'}}", f"prompts.held_out={held_out}")
    with pytest.raises(
        UserError, match=r"replay\.run: .* trained on 1 of the prompts\.held_out, for instance 'prompt 2'"
    ):
        Preflight.check(config)
