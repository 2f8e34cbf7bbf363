"""The round store: nothing lost, nothing doubled, whatever ends the process; the ledger always balances."""

import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kto_ray.errors import UserError
from kto_ray.parts import write_part
from kto_ray.records import PolicyRef, Sample, Score, Verdict
from kto_ray.rounds import Ledger, Round, RoundStore, by_sample
from kto_ray.storage import Storage
from tests.counting import counted
from tests.factories import make_requests, make_sample, make_samples, make_score, make_verdict, same_sample


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path) if request.param == "local" else f"memory:/{tmp_path}")


def judge(round_: Round, samples: Sequence[Sample], desirable: bool | None = True) -> None:
    round_.add_scores([make_score(s.id) for s in samples])
    round_.add_verdicts([make_verdict(s.id, desirable) for s in samples])


def failed(sample_id: str) -> Verdict:
    return Verdict(sample_id, "failed", "threshold", "no score: RuntimeError: no")


def score_by(scorer: str, sample_id: str, value: float | None = 0.3) -> Score:
    return Score(sample_id, scorer, "2", value, None if value is not None else "RuntimeError: no")


def parts(run: Storage, index: int = 0) -> list[str]:
    kinds = ("samples", "scores", "verdicts")
    return [f"{kind}/{name}" for kind in kinds for name in run.names(f"rounds/{index:05}/{kind}")]


def train(store: RoundStore, index: int, policy_version: int, max_policy_lag: int = 0) -> list[str]:
    samples, _ = store.trainable(index, policy_version, max_policy_lag)
    store.round(index).record_training({sample.id: 1 for sample in samples}, {"figures": {}})
    return [sample.id for sample in samples]


# -- open rounds ------------------------------------------------------------------------------------------------------


def test_samples_come_back_in_id_order_whatever_order_they_came_in(run: Storage) -> None:
    samples = make_samples("round-00000", 6)
    round_ = RoundStore(run).round(0)
    for chunk in (samples[4:], samples[:2], samples[2:4][::-1]):
        round_.add_samples(chunk)
    again = RoundStore(run).round(0).samples()
    assert all(same_sample(a, b) for a, b in zip(samples, again, strict=True))


def test_adding_samples_again_changes_nothing(run: Storage) -> None:
    samples = make_samples("round-00000", 4)
    round_ = RoundStore(run).round(0)
    round_.add_samples(samples[:3])
    before = parts(run)
    round_.add_samples(samples[1:3])
    RoundStore(run).round(0).add_samples(samples[:1])
    assert parts(run) == before
    round_.add_samples(samples)
    assert [s.id for s in RoundStore(run).round(0).samples()] == [s.id for s in samples]


def test_a_record_twice_in_one_call_is_stored_once(run: Storage) -> None:
    (sample,) = make_samples("round-00000", 1)
    round_ = RoundStore(run).round(0)
    round_.add_samples([sample, sample])
    round_.add_scores([make_score(sample.id), make_score(sample.id, 0.1)])
    round_.add_verdicts([make_verdict(sample.id, True), make_verdict(sample.id, False)])
    assert (len(round_.samples()), round_.scores()) == (1, [make_score(sample.id)])
    assert round_.verdicts() == [make_verdict(sample.id, True)]


def test_the_first_score_and_the_first_verdict_stand(run: Storage) -> None:
    samples = make_samples("round-00000", 2)
    round_ = RoundStore(run).round(0)
    round_.add_samples(samples)
    judge(round_, samples[:1], desirable=True)
    for again in (round_, RoundStore(run).round(0)):
        judge(again, samples[:1], desirable=False)
        again.add_scores([make_score(samples[0].id, 0.1)])
    assert round_.verdicts() == [make_verdict(samples[0].id, True)]
    assert round_.scores() == [make_score(samples[0].id)]


@pytest.mark.parametrize("together", [True, False])
def test_several_scorers_may_score_the_same_samples(run: Storage, together: bool) -> None:
    samples = make_samples("round-00000", 3)
    round_ = RoundStore(run).round(0)
    mine = [make_score(sample.id) for sample in samples]
    others = [score_by("other", sample.id) for sample in samples]
    for scores in [[*others, *mine]] if together else [mine, others]:
        round_.add_scores(scores)
    expected = [score for pair in zip(others, mine, strict=True) for score in pair]
    assert round_.scores() == RoundStore(run).round(0).scores() == expected
    assert by_sample(expected)[samples[0].id] == {"other": others[0], "shapes": mine[0]}


def test_parts_whose_names_read_alike_do_not_overwrite_each_other(run: Storage) -> None:
    (sample,) = make_samples("round-00000", 1)
    round_ = RoundStore(run).round(0)
    for scorers in (("a", "bc"), ("ab", "c"), ("fg", "e"), ("g", "ef")):
        round_.add_scores([score_by(scorer, sample.id) for scorer in scorers])
    assert [score.scorer for score in round_.scores()] == ["a", "ab", "bc", "c", "e", "ef", "fg", "g"]


def test_what_one_scorer_has_said_does_not_keep_another_from_speaking(run: Storage) -> None:
    one, two = make_samples("round-00000", 2)
    RoundStore(run).round(0).add_scores([make_score(one.id), make_score(two.id)])
    round_ = RoundStore(run).round(0)
    round_.add_scores([make_score(two.id, 0.1), score_by("other", two.id)])
    assert round_.scored == {(one.id, "shapes"), (two.id, "shapes"), (two.id, "other")}
    assert round_.scored_ids == {one.id, two.id}
    assert len(round_.scores()) == 3
    assert make_score(two.id) in round_.scores()


def test_failed_scores_are_no_verdict_and_are_remembered_once_the_round_is_sealed(run: Storage) -> None:
    one, two = make_samples("round-00000", 2)
    round_ = RoundStore(run).round(0)
    round_.add_samples([one, two])
    round_.add_scores([make_score(one.id, None), make_score(two.id)])
    assert round_.failures == [make_score(one.id, None)]
    assert round_.judged_ids == set()
    round_.add_verdicts([failed(one.id)])
    assert round_.judged_ids == RoundStore(run).round(0).judged_ids == {one.id}
    round_.seal()
    assert RoundStore(run).round(0).failures == [make_score(one.id, None)]


def test_a_score_that_failed_is_asked_for_again_in_an_open_round(run: Storage) -> None:
    one, two = make_samples("round-00000", 2)
    RoundStore(run).round(0).add_scores([make_score(one.id, None), make_score(two.id)])
    again = RoundStore(run).round(0)
    assert (again.scored, again.failures) == ({(two.id, "shapes")}, [])
    again.add_scores([make_score(one.id, 0.9)])
    assert RoundStore(run).round(0).scores() == [make_score(one.id, 0.9), make_score(two.id)]
    again.seal()
    again.verify()


def test_prompts_are_read_without_their_images(run: Storage) -> None:
    samples = make_samples("round-00000", 5)
    round_ = RoundStore(run).round(0)
    for chunk in (samples[3:], samples[:3]):
        round_.add_samples(chunk)
    assert list(round_.prompt_ids().items()) == [(sample.id, sample.prompt.id) for sample in samples]


def test_a_half_round_is_resumed(run: Storage) -> None:
    requests = make_requests("round-00000", 5)
    RoundStore(run).round(0).add_samples([make_sample(request) for request in requests[1:3]])
    resumed = RoundStore(run).round(0)
    assert resumed.missing(requests) == [requests[0], *requests[3:]]
    assert not resumed.sealed


def test_scored_when_the_process_died_means_judged_again(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples("round-00000", 2)
    round_ = RoundStore(run).round(0)
    round_.add_samples(samples)
    write = Storage.write_table

    def die_before_verdicts(self: Storage, name: str, table: object) -> None:
        if name.startswith("verdicts"):
            raise KeyboardInterrupt
        write(self, name, table)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_table", die_before_verdicts)
        with pytest.raises(KeyboardInterrupt):
            judge(round_, samples)
    resumed = RoundStore(run).round(0)
    assert resumed.scored_ids == {s.id for s in samples}
    assert resumed.judged_ids == set()
    judge(resumed, samples)
    assert [v.sample_id for v in resumed.verdicts()] == [s.id for s in samples]
    assert len(resumed.scores()) == 2


# -- sealed rounds ----------------------------------------------------------------------------------------------------


def sealed_round(run: Storage, index: int = 0, count: int = 3, **facts: object) -> tuple[Round, list[Sample]]:
    store = RoundStore(run)
    samples = make_samples(store.stage(index), count, PolicyRef(index, f"{index}" * 64))
    round_ = store.round(index)
    round_.add_samples(samples)
    judge(round_, samples)
    round_.seal(**facts)
    return round_, samples


def test_the_manifest_is_the_seal(run: Storage) -> None:
    round_, samples = sealed_round(run, round=0, desirable=3)
    again = RoundStore(run).round(0)
    assert round_.sealed
    assert again.sealed
    assert (again.manifest["stage"], again.manifest["desirable"]) == ("round-00000", 3)
    assert sorted(again.manifest["files"]) == ["samples.parquet", "scores.parquet", "verdicts.parquet"]
    (part,) = again.manifest["parts"]
    again.tidy()
    assert parts(run) == [f"samples/{part}.parquet"]  # scores and verdicts lie in one file each
    assert {s.id for s in samples} == again.sample_ids


def test_an_open_round_has_no_manifest(run: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        _ = RoundStore(run).round(0).manifest


def test_a_sealed_round_takes_nothing_more(run: Storage) -> None:
    sealed_round(run)
    before = parts(run)
    round_ = RoundStore(run).round(0)
    new = [sample for sample in make_samples("round-00000", 9) if sample.id not in round_.sample_ids]
    with pytest.raises(RuntimeError, match=r"00000 is sealed, samples cannot"):
        round_.add_samples(new)
    with pytest.raises(RuntimeError, match="sealed, scores cannot"):
        judge(round_, new)
    with pytest.raises(RuntimeError, match="sealed, verdicts cannot"):
        round_.add_verdicts([make_verdict("round-00000-late")])
    assert parts(run) == before


def test_sealing_twice_keeps_the_first_manifest(run: Storage) -> None:
    round_, _ = sealed_round(run, desirable=3)
    round_.seal(desirable=99)
    RoundStore(run).round(0).seal(desirable=99)
    assert round_.manifest["desirable"] == 3


def test_verify_accepts_what_was_sealed(run: Storage) -> None:
    round_, _ = sealed_round(run)
    round_.verify()


@pytest.mark.parametrize("kind", ["samples", "scores", "verdicts"])
def test_verify_names_a_changed_table(run: Storage, kind: str) -> None:
    round_, _ = sealed_round(run)
    data = bytearray(round_.storage.read(f"{kind}.parquet"))
    data[len(data) // 2] ^= 1
    round_.storage.write(f"{kind}.parquet", bytes(data))
    with pytest.raises(ValueError, match=rf"{kind}\.parquet has changed"):
        round_.verify()


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_every_changed_byte_of_an_array_is_found_by_whoever_reads_it(run: Storage, kind: str) -> None:
    round_, samples = sealed_round(run)
    (part,) = round_.manifest["parts"]
    read = round_.latents_of if kind == "latents" else round_.pixels_of
    whole, records = round_.storage.read(f"{kind}/{part}.parquet"), round_.records()
    array = samples[1].latents_CHW if kind == "latents" else samples[1].pixels_HWC
    if (at := whole.find(array.tobytes())) < 0:  # compressed
        at = len(whole) // 3
    round_.storage.write(f"{kind}/{part}.parquet", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for check in (round_.verify, lambda: read(records)):
        with pytest.raises(ValueError, match="changed since"):
            check()
    for broken in (b"", whole[: len(whole) // 2]):
        round_.storage.write(f"{kind}/{part}.parquet", broken)
        with pytest.raises(ValueError, match="changed since"):
            read(records)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_verify_finds_a_part_that_is_gone(run: Storage, kind: str) -> None:
    round_, _ = sealed_round(run)
    (part,) = round_.manifest["parts"]
    round_.storage.delete(f"{kind}/{part}.parquet")
    with pytest.raises(ValueError, match=f"{part} was removed"):
        round_.verify()


def test_what_a_crash_left_twice_is_one_sample(run: Storage) -> None:
    """A replica wrote a batch, its answer was lost, and the images were drawn again in other company."""
    samples = make_samples("round-00000", 5)
    round_ = RoundStore(run).round(0)
    write_part(round_.storage, samples[:3])
    write_part(round_.storage, samples[1:])
    assert [sample.id for sample in RoundStore(run).round(0).samples()] == [sample.id for sample in samples]
    again = RoundStore(run).round(0)
    judge(again, samples)
    again.seal()
    again.verify()


def test_a_part_without_its_samples_is_no_part(run: Storage) -> None:
    """The replica was killed between its two files."""
    samples = make_samples("round-00000", 4)
    round_ = RoundStore(run).round(0)
    (record, *_) = write_part(round_.storage, samples[:2])
    assert record.place
    round_.storage.delete(f"samples/{record.place.part}.parquet")
    write_part(round_.storage, samples[2:])
    assert RoundStore(run).round(0).sample_ids == {sample.id for sample in samples[2:]}


def test_a_crash_between_the_tables_and_the_manifest_leaves_an_open_round(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples("round-00000", 3)
    round_ = RoundStore(run).round(0)
    round_.add_samples(samples)
    judge(round_, samples)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            round_.seal()
    resumed = RoundStore(run).round(0)
    assert not resumed.sealed
    assert (len(resumed.samples()), len(resumed.scores()), len(resumed.verdicts())) == (3, 3, 3)
    resumed.seal(desirable=3)
    assert RoundStore(run).round(0).manifest["desirable"] == 3
    RoundStore(run).round(0).verify()


def test_pixels_that_are_not_kept_are_missed_by_name(run: Storage) -> None:
    round_, samples = sealed_round(run)
    round_.drop_pixels()
    round_.drop_pixels()
    again = RoundStore(run).round(0)
    again.verify()
    assert round_.storage.names("pixels") == []
    np.testing.assert_array_equal(again.latents_of(again.records()), np.stack([s.latents_CHW for s in samples]))
    with pytest.raises(UserError, match="keep_pixels"):
        again.pixels_of(again.records())


def test_a_round_of_a_newer_version_is_refused(run: Storage) -> None:
    round_, _ = sealed_round(run)
    round_.storage.write_json("manifest.json", round_.manifest | {"format": 3})
    with pytest.raises(UserError, match="newer version of kto-ray: its format is 3, this version reads up to 2"):
        _ = RoundStore(run).round(0).sealed


def test_latents_are_read_without_pixels_and_a_row_without_its_part(run: Storage) -> None:
    """By the bytes that are asked of storage."""
    rng = np.random.default_rng(0)
    samples = [
        replace(sample, latents_CHW=rng.normal(size=(4, 64, 64)).astype(np.float32))
        for sample in make_samples("round-00000", 16)
    ]
    round_ = RoundStore(run).round(0)
    round_.add_samples(samples)
    (part,) = {record.place.part for record in round_.records() if record.place}
    round_.storage.delete(f"pixels/{part}.parquet")
    records = RoundStore(run).round(0).records()
    with counted() as moved:
        found_BCHW = round_.latents_of([records[11], records[2]])
    np.testing.assert_array_equal(found_BCHW, np.stack([samples[11].latents_CHW, samples[2].latents_CHW]))
    assert moved.read < 1.3 * found_BCHW.nbytes + 2**16  # the file's footer
    assert found_BCHW.nbytes < 0.2 * sum(sample.latents_CHW.nbytes for sample in samples)


# -- what is trained on -----------------------------------------------------------------------------------------------


def test_trainable_are_the_samples_with_a_verdict(run: Storage) -> None:
    store = RoundStore(run)
    samples = make_samples("round-00000", 5)
    round_ = store.round(0)
    round_.add_samples(samples)
    judge(round_, samples[:1], True)
    judge(round_, samples[1:2], False)
    judge(round_, samples[2:3], None)
    round_.add_verdicts([failed(samples[3].id)])
    round_.seal()
    trainable, desirable = store.trainable(0, policy_version=0, max_policy_lag=0)
    assert [s.id for s in trainable] == [s.id for s in samples[:2]]
    assert desirable == [True, False]


@pytest.mark.parametrize(("lag", "found"), [(0, [1]), (1, [0, 1]), (2, [0, 1])])
def test_late_verdicts_are_found_within_the_lag_limit(run: Storage, lag: int, found: list[int]) -> None:
    store = RoundStore(run)
    old, new = make_samples("round-00000", 3, PolicyRef(0, "0" * 64)), make_samples("round-00001", 2, PolicyRef(1, "1"))
    first = store.round(0)
    first.add_samples(old)
    judge(first, old[:1])
    first.seal()
    second = store.round(1)
    second.add_samples(new)
    judge(second, [old[2]], False)
    judge(second, new)
    second.seal()
    trainable, desirable = store.trainable(1, policy_version=1, max_policy_lag=lag)
    expected = [(old[2].id, False)] * (0 in found) + [(s.id, True) for s in new]
    assert list(zip([s.id for s in trainable], desirable, strict=True)) == expected


def test_a_verdict_given_twice_trains_once(run: Storage) -> None:
    store = RoundStore(run)
    _, samples = sealed_round(run, 0)
    train(store, 0, 0)
    second, new = store.round(1), make_samples("round-00001", 2, PolicyRef(1, "1"))
    second.add_samples(new)
    judge(second, [samples[0], *new], False)  # a queue that delivers at least once gave an old answer again
    second.seal()
    assert train(store, 1, 1, max_policy_lag=1) == [s.id for s in new]
    ledger = store.ledger()
    assert (ledger.trained, ledger.trained_twice, ledger.labeled) == (5, 0, 5)
    assert ledger.balances


def test_a_late_verdict_settles_its_sample_and_a_failed_one_does_not_come_back(run: Storage) -> None:
    store = RoundStore(run)
    old, new = make_samples("round-00000", 3, PolicyRef(0, "0")), make_samples("round-00001", 1, PolicyRef(1, "1"))
    first = store.round(0)
    first.add_samples(old)
    first.add_verdicts([failed(old[0].id)])
    first.seal()
    assert store.ledger() == Ledger(generated=3, failed=1, pending=2)
    second = store.round(1)
    second.add_samples(new)
    judge(second, [*old, *new])  # the failed one again, too
    second.seal()
    assert train(store, 1, 1, max_policy_lag=1) == [s.id for s in (*old[1:], *new)]
    assert store.ledger() == Ledger(generated=4, labeled=3, failed=1, trained=3)


@pytest.mark.parametrize("replayed", [True, False])
def test_a_replayed_round_trains_on_whatever_policy_made_it(run: Storage, replayed: bool) -> None:
    store = RoundStore(run)
    samples = make_samples("round-00004", 2, PolicyRef(1, "1"))
    round_ = store.round(4)
    round_.add_samples(samples)
    judge(round_, samples)
    round_.seal(**({"replayed_from": "runs/earlier"} if replayed else {}))
    assert train(store, 4, policy_version=4) == [s.id for s in samples] * replayed


def test_a_round_without_verdicts_trains_on_nothing(run: Storage) -> None:
    store = RoundStore(run)
    store.round(0).seal()
    assert store.trainable(0, 0, 0) == ([], [])
    assert train(store, 0, 0) == []
    assert store.round(0).trained
    assert store.round(0).trained_ids() == []


def test_training_counts_once_its_report_is_written(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    round_, samples = sealed_round(run)
    draws = {samples[0].id: 2, samples[1].id: 0}
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            round_.record_training(draws, {})
    assert not round_.trained
    assert RoundStore(run).ledger().trained == 0
    round_.record_training(draws, {"figures": {"loss": 0.5}})
    assert RoundStore(run).round(0).trained_ids() == [samples[0].id]


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_every_kind(run: Storage) -> None:
    store = RoundStore(run)
    samples = make_samples("round-00000", 7)
    round_ = store.round(0)
    round_.add_samples(samples)
    judge(round_, samples[:3])
    judge(round_, samples[3:4], None)
    round_.add_verdicts([failed(s.id) for s in samples[4:6]])
    round_.add_scores([make_score(samples[6].id, None)])  # which its labeler has not said anything about yet
    round_.seal()
    train(store, 0, 0)
    expected = Ledger(generated=7, labeled=3, abstained=1, failed=2, pending=1, trained=3, trained_twice=0)
    assert store.ledger() == expected
    assert expected.balances
    assert asdict(expected)["pending"] == 1


def test_an_empty_run_balances(run: Storage) -> None:
    assert RoundStore(run).ledger() == Ledger()
    assert Ledger().balances
    assert RoundStore(run).rounds() == []


@pytest.mark.parametrize(
    "ledger",
    [
        Ledger(generated=3, labeled=2),
        Ledger(generated=1, labeled=2),
        Ledger(generated=2, labeled=2, trained=2, trained_twice=1),
        Ledger(generated=2, labeled=1, pending=1, trained=2),
    ],
)
def test_a_ledger_that_does_not_add_up_says_so(ledger: Ledger) -> None:
    assert not ledger.balances


def test_a_verdict_on_a_sample_that_was_never_made_does_not_balance(run: Storage) -> None:
    round_ = RoundStore(run).round(0)
    round_.add_verdicts([make_verdict("round-00000-0000000000000000")])
    assert not RoundStore(run).ledger().balances


PER_ROUND = 4
picks = st.lists(st.integers(0, PER_ROUND - 1), min_size=1, max_size=3)
answers = st.sampled_from(["yes", "no", "abstain", "failed", "scored", "not scored"])
VERDICTS = {
    "yes": make_verdict,
    "no": lambda sample_id: make_verdict(sample_id, False),
    "abstain": lambda sample_id: make_verdict(sample_id, None),
    "failed": failed,
}
operations = st.one_of(
    st.tuples(st.just("add"), picks),
    st.tuples(st.just("judge"), st.lists(st.tuples(st.integers(0, 3 * PER_ROUND), answers), min_size=1, max_size=3)),
    st.tuples(st.just("seal"), st.none()),
    st.tuples(st.just("train"), st.none()),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(operations, max_size=14), st.integers(0, 1))
def test_the_ledger_balances_whatever_happens(script: list[tuple[str, Any]], lag: int) -> None:
    """Rounds are made one after the other and reopened before every operation, as after a crash."""
    store = RoundStore(Storage(f"memory://{uuid.uuid4()}"))
    pool: list[list[Sample]] = []
    generated: list[str] = []
    answered: set[str] = set()
    current = trained = 0
    for kind, picked in script:
        round_ = store.round(current)
        while len(pool) <= current:
            pool.append(make_samples(store.stage(len(pool)), PER_ROUND, PolicyRef(max(0, len(pool) - lag), "d")))
        if kind == "add":
            added = [pool[current][i] for i in picked]
            round_.add_samples(added)
            generated = list(dict.fromkeys([*generated, *(sample.id for sample in added)]))
        elif kind == "judge" and generated:
            named = [(generated[i % len(generated)], answer) for i, answer in picked]
            round_.add_scores(
                [make_score(sample_id, None if answer == "not scored" else 0.7) for sample_id, answer in named]
            )
            round_.add_verdicts([VERDICTS[answer](sample_id) for sample_id, answer in named if answer in VERDICTS])
            answered |= {sample_id for sample_id, answer in named if answer in ("yes", "no")}
        elif kind == "seal":
            round_.seal()
            current += 1
        elif kind == "train" and trained < current:
            train(store, trained, trained, lag)
            trained += 1
        ledger = store.ledger()
        assert ledger.balances
        assert ledger.generated == len(generated)
        assert ledger.trained <= ledger.labeled <= len(answered)
    for round_ in store.rounds():
        if round_.sealed:
            round_.verify()
