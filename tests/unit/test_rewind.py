"""The way back: what came after a policy is set aside, nothing is lost, and a crash on the way is finished."""

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from click.testing import CliRunner

from kto_ray.cli import main
from kto_ray.config import Labeling, RunConfig, to_yaml
from kto_ray.config.people import Human
from kto_ray.config.resuming import changes_of
from kto_ray.errors import UserError
from kto_ray.images import to_png
from kto_ray.lease import held
from kto_ray.people import clock, tallies
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.desk import Desk
from kto_ray.people.rewinding import take_back
from kto_ray.people.terms import NewItem
from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef
from kto_ray.relabel import saved_config
from kto_ray.rewind import rewind
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.train.checkpoints import REWINDING, beginning, kept_checkpoints, use_good_ones
from tests.factories import make_samples, make_score, make_verdict, write_checkpoints
from tests.office import Facts, Machine, Office, stage

ROUNDS = 4


def finished(run: Storage, lag: int = 0, kept: tuple[int, ...] = (3, 4)) -> Storage:
    """The folder of a run of four rounds, each drawn by policy round - lag."""
    run.write("config.yaml", to_yaml(RunConfig(rounds=ROUNDS, max_policy_lag=lag)).encode())
    for version in range(ROUNDS + 1):
        (run / "policies").write(f"{version:05}/policy.safetensors", b"weights %d" % version)
        (run / "policies").write_json(f"{version:05}/policy.json", {"version": version, "digest": f"{version}" * 64})
        for kind in ("evaluations", "fresh_evaluations"):
            (run / kind).write(f"{version:05}/samples/a.parquet", b"images")
    store = RoundStore(run)
    for index in range(ROUNDS):
        round_, policy = store.round(index), PolicyRef(max(0, index - lag), f"{max(0, index - lag)}" * 64)
        samples = make_samples(round_.stage, 4, policy)
        round_.add_samples(samples)
        round_.add_scores([make_score(sample.id) for sample in samples])
        round_.add_verdicts([make_verdict(sample.id, place % 2 == 0) for place, sample in enumerate(samples)])
        round_.seal(round=index, labeler={})
        round_.record_training({samples[0].id: 2}, {"figures": {}})
    rows: list[dict[str, Any]] = [{"kind": "evaluation", "step": 0}]
    for index in range(ROUNDS):
        rows += [{"kind": "round", "step": index}, {"kind": "evaluation", "step": index + 1}]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    run.write_json("summary.json", {"policy_version": ROUNDS})
    run.write("report.html", b"report")
    run.write_json("labels/strict/labels.json", {"rounds": ROUNDS})
    write_checkpoints(run, kept)
    return run


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return Storage(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}")
    return Storage(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


def files(run: Storage) -> dict[str, bytes]:
    """By their names in the folder; without who last wrote to it."""
    filesystem, root = run._opened
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    names = [info.path.removeprefix(f"{root}/") for info in found if info.type == pafs.FileType.File]
    return {name: run.read(name) for name in names if not name.startswith("lease/")}


def numbers(run: Storage, kind: str) -> list[int]:
    return [int(name) for name in run.names(kind)]


def rows(run: Storage) -> list[tuple[str, int]]:
    lines = map(json.loads, run.read("metrics.jsonl").decode().splitlines())
    return [(line["kind"], line["step"]) for line in lines]


def test_the_run_stands_where_policy_n_was_published_and_nothing_is_lost(folder: Storage) -> None:
    before = files(finished(folder))
    done = rewind(folder, 3)
    # Round 3 was drawn by policy 3: it stays, and is trained again.
    assert (done.rounds, done.again, done.optimizer) == ([], [3], True)
    assert PolicyStore(folder).versions() == [0, 1, 2, 3]
    for kind in ("policies", "evaluations", "fresh_evaluations"):
        assert numbers(folder, kind) == [0, 1, 2, 3]
    rounds = RoundStore(folder).rounds()
    assert [(round_.sealed, round_.trained) for round_ in rounds] == [(True, True)] * 3 + [(True, False)]
    rounds[3].verify()
    assert rows(folder)[-1] == ("evaluation", 3)
    assert ("round", 3) not in rows(folder)
    assert [checkpoint.version for checkpoint in kept_checkpoints(folder)] == [3]
    use_good_ones(folder)
    assert RoundStore(folder).ledger().balances
    assert not folder.exists("summary.json")
    assert not folder.exists(REWINDING)

    aside = files(folder / done.folder)
    after = {name: data for name, data in files(folder).items() if not name.startswith("set-aside/")}
    moved = before.keys() - after.keys()
    assert {name: before[name] for name in moved} == {name: aside[name] for name in moved}
    assert aside["metrics.jsonl"] == before["metrics.jsonl"]
    assert "policies/00004/policy.safetensors" in moved
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == {
        "metrics.jsonl",
        "checkpoints/checkpoint_manager_snapshot.json",
    }


def test_further_back_than_checkpoints_reach_the_published_weights_are_the_beginning(folder: Storage) -> None:
    finished(folder)
    done = rewind(folder, 1)
    assert (done.rounds, done.again, done.optimizer) == ([2, 3], [1], False)
    assert numbers(folder, "rounds") == [0, 1]
    assert kept_checkpoints(folder) == []
    assert beginning(folder) == 1
    use_good_ones(folder)
    assert not folder.exists("labels/strict/labels.json")  # it judges rounds that are gone
    assert len(folder.names(f"{done.folder}/checkpoints")) == 3


def test_rounds_that_ran_ahead_were_drawn_by_policies_that_stay(folder: Storage) -> None:
    finished(folder, lag=1)
    done = rewind(folder, 2)
    assert (done.rounds, done.again) == ([], [2, 3])
    assert rewind(folder, 0).rounds == [2, 3]


def test_a_damaged_checkpoint_is_not_gone_on_from(folder: Storage) -> None:
    finished(folder)
    name = kept_checkpoints(folder)[0].name
    folder.write(f"checkpoints/{name}/state.pt", b"PK")
    assert not rewind(folder, 3).optimizer
    assert kept_checkpoints(folder) == []


@pytest.mark.parametrize("crash", range(1, 14, 3))
def test_a_crash_on_the_way_is_finished_by_the_same_command(
    tmp_path: Path, crash: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = finished(Storage(str(tmp_path / "a"))), finished(Storage(str(tmp_path / "b")))
    folder = rewind(undisturbed, 2).folder
    left, move = [crash], Storage.move

    def dying(storage: Storage, name: str, target: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        move(storage, name, target)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "move", dying)
        with pytest.raises(KeyboardInterrupt):
            rewind(disturbed, 2)
    with pytest.raises(UserError, match="half rewound to policy 2"):
        rewind(disturbed, 1)
    again = rewind(disturbed, 2)

    def outcome(run: Storage, aside: str) -> dict[str, bytes]:
        return {name.replace(aside, "aside"): data for name, data in files(run).items() if name[-12:] != "rewound.json"}

    assert outcome(disturbed, again.folder) == outcome(undisturbed, folder)


def test_training_may_change_with_it_and_the_change_is_written_down(folder: Storage) -> None:
    finished(folder)
    done = rewind(folder, 2, ["train.learning_rate=1e-6"])
    assert saved_config(folder).train.learning_rate == 1e-6
    assert saved_config(folder / done.folder).train.learning_rate == 1e-5
    (change,) = changes_of(folder)
    assert (change["round"], change["field"], change["after"]) == (2, "train.learning_rate", 1e-6)


@pytest.mark.parametrize(
    ("to", "overrides", "says"),
    [
        (7, [], "has no policy 7; it has those from 0 to 4"),
        (2, ["seed=3"], "only fields of `train` can change"),
        (2, ["train.adapter.rank=3"], "none of train.adapter"),
        (2, ["train.learning_rate=-1"], "train.learning_rate"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_moves(
    folder: Storage, to: int, overrides: list[str], says: str
) -> None:
    before = files(finished(folder))
    with pytest.raises(UserError, match=says):
        rewind(folder, to, overrides)
    assert files(folder) == before


def test_a_policy_whose_weights_went_is_refused_with_those_that_are_there(folder: Storage) -> None:
    PolicyStore(finished(folder)).drop_before(3)
    before = files(folder)
    with pytest.raises(
        UserError, match=r"weights of policy 2 of .* are gone \(keep_policies\); .*still there: 0, 3, 4$"
    ):
        rewind(folder, 2)
    assert files(folder) == before
    rewind(folder, 3)
    assert (PolicyStore(folder).versions(), PolicyStore(folder).newest()) == ([0, 1, 2, 3], 3)
    use_good_ones(folder)
    assert rewind(folder, 0).rounds == [1, 2, 3]


def test_a_run_that_a_driver_works_on_is_left_alone(folder: Storage) -> None:
    before = files(finished(folder))
    with held(folder, 10, 60), pytest.raises(UserError, match="is in use by"):
        rewind(folder, 2)
    assert files(folder) == before


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    run = finished(Storage(str(tmp_path / "run")))
    said = CliRunner().invoke(main, ["rewind", str(run), "--to", "1", "train.learning_rate=1e-6"])
    assert said.exit_code == 0, said.output
    assert "with the rounds 2, 3" in said.output
    assert "trained again: 1" in said.output
    assert "the optimizer's state after policy 1 is not kept" in said.output
    assert "goes on from policy 1, with train.learning_rate=1e-6" in said.output
    wrong = CliRunner().invoke(main, ["rewind", str(run), "--to", "9"])
    assert wrong.exit_code == 2


def test_people_are_asked_again_only_about_rounds_that_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(clock, "time", machine)
    office = Office(f"sqlite:///{tmp_path}/people.sqlite", machine, Human(), max_policy_lag=5)
    (ann,) = office.admit("ann")
    office.draw(0, 2)
    ann.label("desirable", 1)
    assert len(office.end_round(0)) == 1
    late = ann.label("undesirable", 1)  # on the other image of round 0
    office.draw(1, 2)
    ann.label("desirable", 2)
    assert len(office.end_round(1)) == 3
    take_back(office.engine, [stage(1)])
    take_back(office.engine, [stage(1)])
    assert {name[:11] for name in office.labels()} == {stage(0)}
    assert len(office.facts().answers) == 2
    # The late answer went into the round that is gone: it is sealed with the next one.
    office.draw(1, 2)
    assert len(ann.label("desirable", 2)) == 2
    assert len(office.end_round(1)) == 3
    assert late
    office.engine.dispose()


@pytest.mark.parametrize("pixels", [True, False])
async def test_images_that_people_may_judge_again_come_back_from_their_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pixels: bool
) -> None:
    monkeypatch.setattr(tallies, "RECENT", 0)
    run, human = finished(Storage(str(tmp_path / "run")), lag=1), Human()
    config = RunConfig(rounds=ROUNDS, max_policy_lag=2, label=Labeling(labeler="human"))
    run.write("config.yaml", to_yaml(config).encode())
    samples = RoundStore(run).round(0).samples()
    pngs = dict(zip([s.id for s in samples], to_png(np.stack([s.pixels_HWC for s in samples])), strict=True))
    desk = Desk(database_url(human, run), database_owner(human, run), human, max_policy_lag=2)
    ann = (await desk.badge_of("ann")).id
    await desk.add(stage(0), 0, [NewItem(sample, "p", "a prompt", png) for sample, png in pngs.items()])
    for number in range(ROUNDS):
        if number == 2:  # late: the labels go into this round
            for offer in (await desk.turn(ann, 2)).offers:
                await desk.answer(ann, offer.item, "desirable", None, 0)
        await desk.finish(stage(number), number)
        await desk.seal(stage(number))
    assert Facts.read(desk.engine).images == {}

    if not pixels:
        RoundStore(run).round(0).drop_pixels()
    assert rewind(run, 0).rounds == [2, 3]
    assert Facts.read(desk.engine).images == (pngs if pixels else {})
    said = "its pixels were not kept (keep_pixels): people are not asked about 4 of its images again" in caplog.text
    assert said == (not pixels)
    desk.engine.dispose()
