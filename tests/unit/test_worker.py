"""The train worker's rounds without Ray Train: what is trained, committed, published, trained again, and given up."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint

from kto_ray.config import RunConfig
from kto_ray.config.preparing import StreamSettings as Streaming
from kto_ray.policies import PolicyStore, digest_of
from kto_ray.prepared import is_labelled, keep_set
from kto_ray.records import PolicyRef
from kto_ray.rounds import Round, RoundStore
from kto_ray.storage import Storage
from kto_ray.train import moving
from kto_ray.train.averaging import RunningReference
from kto_ray.train.checkpoints import BEGINNING
from kto_ray.train.coordinator import RoundTask, TrainingReport
from kto_ray.train.moving import Looks, Moving, TakenAway
from kto_ray.train.streaming import Stream
from kto_ray.train.worker import build_learner, train_worker
from tests.factories import make_samples, make_set, make_verdict

ROUNDS = 2


def remote(function: Callable[..., Any]) -> Any:
    return SimpleNamespace(remote=function)


class Office:
    """Ray Train and the coordinator, in this process: checkpoints by version, reports, and the reason to give up."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoints, self.reports = folder, dict[int, Checkpoint](), dict[int, TrainingReport]()
        self.why: str | None = None
        self.rounds = ROUNDS
        self.next_round, self.give_up = remote(self._next_round), remote(self._give_up)
        self.set_progress = remote(lambda *_: None)
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        self.drained: dict[str, float | None] = {}
        monkeypatch.setattr(ray, "get", lambda value: value)
        monkeypatch.setattr(ray, "wait", lambda references, **_: (references, []))
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "n7"))
        monkeypatch.setattr(moving, "draining_nodes", lambda: self.drained)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray.train, "get_checkpoint", self._latest)
        monkeypatch.setattr(ray.train, "report", self._report)
        monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda **_: [])
        monkeypatch.setattr(ray.train.torch, "prepare_model", self._prepare)

    def _prepare(self, module: torch.nn.Module, move_to_device: bool | torch.device, **_: Any) -> torch.nn.Module:
        self.moved_to = move_to_device
        return module

    def _latest(self) -> Checkpoint | None:
        return self.checkpoints[max(self.checkpoints)] if self.checkpoints else None

    def _report(self, metrics: dict[str, Any], checkpoint: Checkpoint) -> None:
        kept = self.folder / f"checkpoint-{metrics['version']}"
        shutil.copytree(checkpoint.path, kept, dirs_exist_ok=True)
        self.checkpoints[metrics["version"]] = Checkpoint.from_directory(kept)

    def _next_round(self, version: int, report: TrainingReport | None) -> RoundTask | None:
        if report:
            self.reports[report.version] = report
        return RoundTask(version) if version < self.rounds else None

    def _give_up(self, why: str) -> None:
        self.why = why


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Office:
    return Office(tmp_path / "train", monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """Two sealed rounds."""
    run = Storage(str(tmp_path / "run"))
    for index in range(ROUNDS):
        fill(RoundStore(run).round(index), index, PolicyRef(index, "d" * 64))
    return run


def fill(round_: Round, seed: int, policy: PolicyRef, **facts: Any) -> None:
    """Samples, half of them desirable, and the seal."""
    latents_NCHW = np.random.default_rng(seed).normal(size=(16, 4, 8, 8)).astype(np.float32)
    samples = [
        replace(sample, latents_CHW=latents_CHW)
        for sample, latents_CHW in zip(make_samples(round_.stage, 16, policy), latents_NCHW, strict=True)
    ]
    round_.add_samples(samples)
    round_.add_verdicts([make_verdict(sample.id, place % 2 == 0) for place, sample in enumerate(samples)])
    round_.seal(**facts)


def ruin(run: Storage, index: int) -> set[str]:
    """Put latents that are no numbers into a round, as older versions may have stored them; gives the samples."""
    store = RoundStore(run)
    samples, verdicts = store.round(index).samples(), store.round(index).verdicts()
    ruined = {samples[0].id, samples[1].id}
    run.move(f"rounds/{index:05}", "elsewhere")
    round_ = store.round(index)
    round_.add_samples([replace(s, latents_CHW=s.latents_CHW * (np.nan if s.id in ruined else 1)) for s in samples])
    round_.add_verdicts(verdicts)
    round_.seal()
    return ruined


def config_of(folder: Path, **train: Any) -> RunConfig:
    settings = {"global_batch": 8, "micro_batch": 8, "epochs": 1, "adapter": {"rank": 2}, "resources": {"threads": 1}}
    return RunConfig.model_validate({"model": str(folder), "rounds": ROUNDS, "train": settings | train})


def work(run: Storage, office: Office, folder: Path, **train: Any) -> None:
    train_worker({"config": config_of(folder, **train), "run": run, "coordinator": office})


def digests(run: Storage) -> list[str]:
    store = PolicyStore(run)
    return [store.resolve(version).digest for version in store.versions()]


def test_a_worker_that_was_given_a_card_and_is_told_to_leave_it_alone_does(
    run: Storage, office: Office, tiny_sd1_folder: Path
) -> None:
    work(run, office, tiny_sd1_folder, device="cpu", resources={"threads": 1, "num_gpus": 1})
    assert office.moved_to == torch.device("cpu")
    assert PolicyStore(run).versions() == [0, 1, 2]


def record(run: Storage, office: Office) -> None:
    """As the loop does with reports."""
    for version, report in office.reports.items():
        RoundStore(run).round(version - 1).record_training(report.draws, {"figures": report.figures})


def test_a_step_that_would_ruin_the_policy_is_given_up_and_leaves_no_trace(
    run: Storage, office: Office, tiny_sd1_folder: Path
) -> None:
    ruined = ruin(run, 1)
    work(run, office, tiny_sd1_folder)
    assert office.why is not None
    assert "round 1, step " in office.why
    assert "policy 1 is the last good one" in office.why
    assert any(sample_id in office.why for sample_id in ruined)
    assert list(office.checkpoints) == [1]
    assert PolicyStore(run).versions() == [0, 1]

    # The same command goes on with what train.on_nonfinite says.
    office.why = None
    work(run, office, tiny_sd1_folder, on_nonfinite="leave_out")
    assert office.why is None
    assert PolicyStore(run).versions() == [0, 1, 2]
    report = office.reports[2]
    assert set(report.left_out) <= ruined
    assert report.figures["objective/left_out"] == len(report.left_out) > 0
    assert [report.draws[sample_id] for sample_id in report.left_out] == [0] * len(report.left_out)


@pytest.mark.parametrize(("reference", "versions"), [("fixed", [0, 0]), ("round", [0, 1])])
def test_every_round_says_which_policy_it_was_measured_against(
    run: Storage, office: Office, tiny_sd1_folder: Path, reference: str, versions: list[int]
) -> None:
    work(run, office, tiny_sd1_folder, objective={"reference": reference})
    assert [office.reports[index + 1].reference for index in range(2)] == [
        (version, digests(run)[version]) for version in versions
    ]


def test_a_reference_that_follows_makes_another_policy(
    run: Storage, tiny_sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second round on: the first one's is the base in both cases."""
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    other, elsewhere = Storage(str(tmp_path / "other")), Office(tmp_path / "train of other", monkeypatch)
    work(other, elsewhere, tiny_sd1_folder, objective={"reference": "round"})
    work(run, Office(tmp_path / "train again", monkeypatch), tiny_sd1_folder)
    assert digests(other)[:2] == digests(run)[:2]
    assert digests(other)[2] != digests(run)[2]


def test_an_averaged_reference_follows_the_published_policies(
    run: Storage, office: Office, tiny_sd1_folder: Path
) -> None:
    """R_1 = (1 - anchor) (rate B + (1 - rate) P_1) + anchor B, with the base's own adapter as B."""
    work(run, office, tiny_sd1_folder, objective={"reference": "ema", "reference_rate": 0.25, "reference_anchor": 0.5})
    store = PolicyStore(run)
    published = store.load(store.resolve(1))
    assert published is not None
    learner = build_learner(config_of(tiny_sd1_folder))
    base = learner.policy.tensors()
    expected = {name: 0.5 * (0.25 * base[name] + 0.75 * published[name]) + 0.5 * base[name] for name in base}
    averaged = RunningReference(base)
    averaged.follow(published, 0.25, 0.5)
    for name in base:
        torch.testing.assert_close(averaged.tensors[name], expected[name])
    digest = digest_of(averaged.tensors, learner.policy.metadata())
    assert [office.reports[version].reference for version in (1, 2)] == [(0, digests(run)[0]), (1, digest)]


def test_a_replayed_round_is_measured_against_the_policy_that_trains_on_it(
    tmp_path: Path, office: Office, tiny_sd1_folder: Path
) -> None:
    """Another run's policy 5 drew both: that number says nothing here."""
    run = Storage(str(tmp_path / "replaying"))
    for index in range(ROUNDS):
        fill(RoundStore(run).round(index), index, PolicyRef(5, "d" * 64), replayed_from="another run")
    work(run, office, tiny_sd1_folder, objective={"reference": "round"})
    assert [office.reports[version].reference for version in (1, 2)] == list(enumerate(digests(run)[:2]))


@pytest.mark.parametrize("reference", ["ema", "round"])
def test_what_draws_is_what_is_published_and_measured_against(
    run: Storage, office: Office, tiny_sd1_folder: Path, reference: str
) -> None:
    """The average of the weights, with a digest of its own, while training goes on from the weights themselves."""
    work(run, office, tiny_sd1_folder, objective={"reference": reference}, sampling_policy="ema")
    state = torch.load(Path(office.checkpoints[2].path) / "state.pt", weights_only=True)["learner"]
    store = PolicyStore(run)
    published = store.load(store.resolve(2))
    assert published is not None
    assert any(not torch.equal(published[name], state["policy"][name]) for name in published)
    if reference == "round":
        assert office.reports[2].reference == (1, digests(run)[1])


@pytest.mark.parametrize("objective", [{}, {"kind": "sft"}, {"kind": "csft"}, {"kind": "dpo"}])
def test_intervals_of_a_prepared_set_are_trained_as_rounds_are_and_again_to_the_same_bytes(
    office: Office, tiny_sd1_folder: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    run = Storage(str(tmp_path / "offline"))
    prompts = [("a red circle", "a blue square")[n // 2 % 2] for n in range(32)]
    prepared = make_set(tmp_path / "set", [n % 2 == 0 for n in range(32)], [n // 16 for n in range(32)], prompts, 64)
    keep_set(run, prepared)
    data = {"sources": "not asked any more", "stream": {"steps": 3}}
    settings = {"objective": objective, "global_batch": 4, "micro_batch": 4, "adapter": {"rank": 2}}
    config = RunConfig.model_validate(
        {"model": str(tiny_sd1_folder), "rounds": ROUNDS, "data": data, "train": settings}
    )

    def train() -> None:
        train_worker({"config": config, "run": run, "coordinator": office})

    train()
    assert office.why is None
    before, reports = digests(run), dict(office.reports)
    assert len(set(before)) == 3
    stream = Stream(prepared, config.train, Streaming(steps=3), 0)
    for version, report in reports.items():
        interval = stream.interval(version - 1)
        assert report.draws == dict(zip(interval.ids, interval.draws_N.tolist(), strict=True))
        assert sum(report.draws.values()) == 3 * 4
    del office.checkpoints[2]
    office.reports.clear()
    train()
    assert digests(run) == before
    assert office.reports[2].draws == reports[2].draws


def test_labelled_images_are_mixed_into_rounds_and_counted_apart(
    run: Storage, office: Office, tiny_sd1_folder: Path, tmp_path: Path
) -> None:
    keep_set(run, make_set(tmp_path / "set", [n % 2 == 0 for n in range(32)], side=64))
    config = config_of(tiny_sd1_folder, objective={"reference": "round"}).model_dump()
    config |= {"data": {"mix": {"source": "not asked any more", "share": 0.25}}}
    train_worker({"config": RunConfig.model_validate(config), "run": run, "coordinator": office})
    assert office.why is None
    record(run, office)
    assert len(set(digests(run))) == 3
    for report in office.reports.values():
        mixed = {name: count for name, count in report.draws.items() if is_labelled(name) and count}
        assert report.figures["mixed/draws"] == sum(mixed.values()) == sum(report.draws.values()) / 4
        assert report.figures["mixed/images"] == len(mixed)
    ledger = RoundStore(run).ledger()
    assert (ledger.generated, ledger.trained_twice) == (32, 0)
    assert 0 < ledger.trained <= 32


FOLLOWING = {"reference": "round", "reference_point": "noise_mean", "noise_parts": 4}
AVERAGED = {"reference": "ema", "target_margin": 1, "scale_by_noise": True, "noise_parts": 4}


@pytest.mark.parametrize("objective", [{}, FOLLOWING, AVERAGED, {"kind": "nft"}])
def test_rounds_after_an_older_checkpoint_are_trained_again_to_the_same_bytes(
    run: Storage, office: Office, tiny_sd1_folder: Path, objective: dict[str, Any]
) -> None:
    work(run, office, tiny_sd1_folder, objective=objective)
    record(run, office)
    before, reports = digests(run), dict(office.reports)
    assert len(before) == 3
    del office.checkpoints[2]  # damaged
    PolicyStore(run).drop_before(2)
    office.reports.clear()
    work(run, office, tiny_sd1_folder, objective=objective)
    assert office.why is None
    assert digests(run) == before
    assert not PolicyStore(run).has_weights(1)  # it is proved by its digest, and stored no more
    assert list(office.checkpoints) == [1, 2]
    assert office.reports[2].draws == reports[2].draws


def test_where_it_does_not_come_to_the_same_nothing_is_committed(
    run: Storage, office: Office, tiny_sd1_folder: Path
) -> None:
    work(run, office, tiny_sd1_folder)
    record(run, office)
    del office.checkpoints[2]
    work(run, office, tiny_sd1_folder, learning_rate=1e-3)
    assert "policy 2, trained again from an older checkpoint, is not to the last bit" in str(office.why)
    assert list(office.checkpoints) == [1]


def test_a_rewound_run_without_checkpoint_begins_from_the_published_policy(
    run: Storage, office: Office, tiny_sd1_folder: Path
) -> None:
    work(run, office, tiny_sd1_folder)
    before, folder = digests(run), PolicyStore(run).storage
    office.checkpoints.clear()
    run.move("policies/00002", "elsewhere")
    run.write_json(BEGINNING, {"to": 1})
    work(run, office, tiny_sd1_folder)
    assert office.why is None
    assert digests(run)[:2] == before[:2]
    assert folder.exists("00002/policy.json")
    assert list(office.checkpoints) == [2]


def test_workers_whose_node_is_taken_away_leave_between_rounds(
    run: Storage, office: Office, tiny_sd1_folder: Path
) -> None:
    """Although there is time for another one: elsewhere it can be trained whole."""
    office.drained = {"n1": 1, "n7": 3600}
    with pytest.raises(TakenAway, match=r"the node of rank 0 is taken away in 3600 s \(n7\)") as left:
        work(run, office, tiny_sd1_folder)
    assert left.value.preempted  # by which Ray Train tells it from a failure
    assert pickle.loads(pickle.dumps(left.value)).preempted
    assert not office.checkpoints


@pytest.mark.parametrize(("left_s", "committed"), [(3600, [1]), (None, [1]), (1, [])])
def test_a_round_that_ends_in_time_is_committed_and_another_one_left_at_once(
    run: Storage, office: Office, tiny_sd1_folder: Path, left_s: float | None, committed: list[int]
) -> None:
    steps = list[int]()

    def on_progress(*progress: int) -> None:
        steps.append(progress[1])
        office.drained = {"n7": left_s}

    office.set_progress = remote(on_progress)
    with pytest.raises(TakenAway):
        work(run, office, tiny_sd1_folder, epochs=2)
    assert list(office.checkpoints) == committed
    assert steps == ([1, 2, 3, 4] if committed else [1])

    # Elsewhere they go on, to the same bytes as undisturbed ones.
    office.drained, office.set_progress = {}, remote(lambda *_: None)
    work(run, office, tiny_sd1_folder, epochs=2)
    assert PolicyStore(run).versions() == [0, 1, 2]


def test_it_is_asked_so_often_and_no_more() -> None:
    asked = list[int]()
    told = SimpleNamespace(look=lambda needed_s: asked.append(round(needed_s)))
    looks = Looks(cast(Moving, told))
    for step in range(1, 101):
        looks.after_step(step, 100)
    assert len(asked) == 33
    looks = Looks(cast(Moving, told))
    looks.after_step(1, 1)
    assert len(asked) == 33  # after the last step there is only the commit
