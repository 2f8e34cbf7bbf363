"""A run folder that release 0.1.0 has written still opens: it is read, trained on, judged anew, replayed, completed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.progress import Progress

from kto_ray.config import Replay, load, to_yaml
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.texts import Texts
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.making import Making
from kto_ray.objectives import DiffusionKTO
from kto_ray.prompts import load_prompts
from kto_ray.records import PolicyRef, Sample, SampleRequest, table_to_verdicts
from kto_ray.relabel import Replayed, relabel, saved_config, sealed_rounds
from kto_ray.rounds import Round, RoundStore
from kto_ray.storage import Storage
from kto_ray.train.batches import LatentsInMemory, RoundBatches, RoundData
from kto_ray.train.coordinator import RoundTask
from kto_ray.train.worker import read_round
from tests.counting import counted
from tests.factories import same_sample
from tests.in_process import InProcess

WRITTEN = Path(__file__).parents[1] / "data" / "run-0.1.0"
"""`python jobs/online_kto.py --recipe shapes_demo` with two rounds of 16 images: its configuration and rounds."""

STRICT = "label.threshold=0.8"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    shutil.copytree(WRITTEN, tmp_path / "old")
    return Storage(str(tmp_path / "old"))


def arrays(index: int) -> dict[str, dict[str, Any]]:
    """Latents and pixels by sample id, as they lie in the files, read without this package."""
    parts = sorted((WRITTEN / f"rounds/{index:05}/samples").iterdir())
    tables = [pq.read_table(part, columns=["sample_id", "latents", "pixels"]) for part in parts]
    return {
        kind: {
            sample_id: array
            for table in tables
            for sample_id, array in zip(
                table["sample_id"].to_pylist(), table[kind].combine_chunks().to_numpy_ndarray(), strict=True
            )
        }
        for kind in ("latents", "pixels")
    }


def stored_labels(folder: Storage) -> dict[str, str]:
    """Labels by sample id of all verdicts in a folder."""
    tables = [folder.read_table(name) for name in folder.names(suffix=".parquet")]
    return {verdict.sample_id: verdict.label for table in tables for verdict in table_to_verdicts(table)}


def replay(run: Storage, name: str, **settings: Any) -> Storage:
    """All rounds of a run, sealed again in another one, in the form of today."""
    config = load("shapes_demo", [f"run={name}", f"runs_folder={Path(run.uri).parent}"])
    replayed, new = Replayed(Replay(run=str(run), **settings), config), Storage(str(Path(run.uri).parent / name))
    new.write("config.yaml", to_yaml(config).encode())
    for index in range(replayed.rounds):
        round_ = RoundStore(new).round(index)
        replayed.fill(index, round_)
        round_.seal(replayed_from=str(run))
    return new


def test_its_configuration_is_read(run: Storage) -> None:
    config = saved_config(run)
    assert config.run == "old"
    assert config.train.objective == DiffusionKTO(beta=75)


def test_its_rounds_are_as_they_were_sealed(run: Storage) -> None:
    rounds = sealed_rounds(run)
    assert [round_.trained for round_ in rounds] == [True, True]
    for round_ in rounds:
        round_.verify()
        assert len(round_.samples()) == len(round_.scores()) == len(round_.verdicts()) == 16
    ledger = RoundStore(run).ledger()
    assert (ledger.generated, ledger.trained, ledger.balances) == (32, 32, True)


# -- judged anew, and replayed ----------------------------------------------------------------------------------------


def test_judged_by_its_own_rule_it_gets_the_labels_that_it_has(run: Storage) -> None:
    assert [round_.changed for round_ in relabel(run, "own", [])] == [0, 0]
    for index in range(2):
        labels = stored_labels(run / f"rounds/{index:05}/verdicts")
        assert len(labels) == 16
        assert stored_labels(run / f"labels/own/{index:05}") == labels


def test_judged_by_another_rule_it_gets_the_same_labels_in_either_form(run: Storage) -> None:
    new = replay(run, "new")
    assert [round_.manifest.get("format", 1) for round_ in (*sealed_rounds(run), *sealed_rounds(new))] == [1, 1, 2, 2]
    old_form, new_form = relabel(run, "strict", [STRICT]), relabel(new, "strict", [STRICT])
    assert old_form == new_form
    assert all(round_.changed > 0 for round_ in old_form)
    for index in range(2):
        folder = f"labels/strict/{index:05}"
        assert stored_labels(new / folder) == stored_labels(run / folder)


def test_it_is_judged_anew_and_replayed(run: Storage) -> None:
    relabeled = relabel(run, "half", ["label.threshold=round_quantile"])
    assert [round_.labels["desirable"] for round_ in relabeled] == [8, 8]
    new = replay(run, "new", labels="half")
    for index, round_ in enumerate(sealed_rounds(new)):
        labels = {verdict.sample_id: verdict.label for verdict in round_.verdicts()}
        assert labels == stored_labels(run / f"labels/half/{index:05}")


def test_replayed_it_has_the_same_samples_scores_and_verdicts(run: Storage) -> None:
    new = replay(run, "new")
    for index, (old_round, new_round) in enumerate(zip(sealed_rounds(run), sealed_rounds(new), strict=True)):
        new_round.verify()
        old, copied, written = old_round.samples(), new_round.samples(), arrays(index)
        assert len(copied) == 16
        for one, other in zip(old, copied, strict=True):
            assert same_sample(one, other)
            assert other.latents_CHW.tobytes() == written["latents"][other.id].tobytes()
            assert other.pixels_HWC.tobytes() == written["pixels"][other.id].tobytes()
        assert new_round.scores() == old_round.scores()
        assert new_round.verdicts() == old_round.verdicts()


# -- trained on -------------------------------------------------------------------------------------------------------


def test_training_gets_the_latents_and_batches_that_it_was_trained_on(run: Storage) -> None:
    config, store = saved_config(run), RoundStore(run)
    text = Conditioning({"text": torch.zeros(1, 1)})
    noise = SimpleNamespace(level_draw="uniform")
    family = cast(
        Any,
        SimpleNamespace(
            encode_prompts=lambda prompts: Conditioning.cat([text] * len(prompts)),
            nothing=lambda: text,
            noise=noise,
            noise_dtype=None,
        ),
    )

    def batches(data: RoundData) -> RoundBatches:
        return RoundBatches(data, config.train, family, Texts(lambda: family), config.seed, torch.device("cpu"))

    for index in range(2):
        ids, data = read_round(store, RoundTask(index), index, config)
        assert data is not None
        samples, written = store.round(index).samples(), arrays(index)["latents"]
        assert ids == [sample.id for sample in samples]
        data.latents.prepare(np.arange(len(ids)))
        latents_NCHW = data.latents.take(np.arange(len(ids)))
        for sample, latents_CHW in zip(samples, latents_NCHW, strict=True):
            assert latents_CHW.tobytes() == sample.latents_CHW.tobytes() == written[sample.id].tobytes()

        labels = stored_labels(run / f"rounds/{index:05}/verdicts")
        given, stored = [], batches(data)
        expected = batches(
            RoundData(
                round_index=index,
                latents=LatentsInMemory(np.stack([written[sample_id] for sample_id in sorted(written)])),
                prompts=[sample.prompt.text for sample in samples],
                desirable_N=np.array([labels[sample.id] == "desirable" for sample in samples]),
            )
        )
        for batch, same in zip(stored, expected, strict=True):
            for name in ("clean_BCHW", "noise_BCHW", "level_B", "desirable_B"):
                assert torch.equal(getattr(batch, name), getattr(same, name)), name
            given.append(batch)
        assert len(given) == 10
        table: pa.Table = (run / f"rounds/{index:05}").read_table("training.parquet")
        drawn = dict(zip(table["sample_id"].to_pylist(), table["draws"].to_pylist(), strict=True))
        assert dict(zip(ids, stored.draws_N.tolist(), strict=True)) == drawn


# -- half-made, and completed -----------------------------------------------------------------------------------------


def interrupt(run: Storage, *kinds: str) -> Round:
    """Takes the seal of the second round away, and the first part of each of these kinds, as if it was never made."""
    folder = run / "rounds/00001"
    for name in ("manifest.json", "training.json", "training.parquet"):
        folder.delete(name)
    for kind in kinds:
        folder.delete(f"{kind}/{folder.names(kind)[0]}")
    return RoundStore(run).round(1)


def first_ids(kind: str) -> list[str]:
    """Of the samples in the part that `interrupt` takes away."""
    part = min((WRITTEN / f"rounds/00001/{kind}").iterdir())
    return sorted(pq.read_table(part, columns=["sample_id"])["sample_id"].to_pylist())


class Again(InProcess):
    """Draws and scores what was drawn and scored before."""

    def __init__(self, before: Round) -> None:
        self.before = {sample.id: sample for sample in before.samples()}
        values = {score.sample_id: score.value for score in before.scores()}
        super().__init__({"shapes": lambda record: values[record.id]})

    def _draw(self, request: SampleRequest, policy: PolicyRef) -> Sample:
        return self.before[request.id]


@pytest.mark.parametrize("lost", [("verdicts",), ("scores", "verdicts"), ("samples", "scores", "verdicts")])
async def test_a_half_made_round_is_completed_and_sealed(run: Storage, lost: tuple[str, ...]) -> None:
    before, config = RoundStore(Storage(str(WRITTEN))).round(1), saved_config(run)
    round_ = interrupt(run, *lost)
    undrawn, unscored = (first_ids(kind) if kind in lost else [] for kind in ("samples", "scores"))
    workers, store = Again(before), RoundStore(run)
    labeler, prompts = ThresholdLabeler(config.label), load_prompts("prompts.train", config.prompts.train)
    making = Making(config, prompts, store, cast(Any, workers), cast(Any, workers), labeler, Progress(disable=True))
    await labeler.start(making.memory())
    await making.make(1, round_, before.records()[0].policy)

    assert sorted(workers.drawn) == undrawn
    assert sorted(workers.scored) == [(sample_id, "shapes") for sample_id in unscored]
    completed = store.round(1)
    assert_complete(completed, before)
    assert completed.scores() == before.scores()
    assert completed.verdicts() == before.verdicts()
    figures = [name for name, value in before.manifest.items() if isinstance(value, int | float)]
    for name in figures:
        if not name.startswith(("seconds/", "busy/")):
            assert completed.manifest[name] == pytest.approx(before.manifest[name]), name
    ledger = store.ledger()
    assert (ledger.generated, ledger.labeled, ledger.balances) == (32, 32, True)


def assert_complete(round_: Round, before: Round) -> None:
    """Sealed in the form of today, with the same samples, each once."""
    round_.verify()
    assert round_.manifest["format"] == 2
    assert round_.storage.read_table("samples.parquet")["sample_id"].to_pylist() == [
        record.id for record in before.records()
    ]
    for one, other in zip(round_.samples(), before.samples(), strict=True):
        assert same_sample(one, other)
    assert all(record.place and record.place.latents_digest for record in round_.records())


class KilledError(Exception):
    pass


def test_a_crash_while_it_is_brought_into_the_new_form_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it wrote or deleted last."""
    before = RoundStore(Storage(str(WRITTEN))).round(1)
    changes = crashes = 0
    while crashes == changes:
        shutil.copytree(WRITTEN, tmp_path / str(changes))
        run = Storage(str(tmp_path / str(changes)))
        with monkeypatch.context() as patch:
            round_ = interrupt(run, "verdicts")
            left = iter(range(changes))
            for name in ("write", "delete"):
                patch.setattr(Storage, name, only_while(left, getattr(Storage, name)))
            try:
                round_.open()
            except KilledError:
                crashes += 1
        again = RoundStore(run).round(1)
        again.open()
        assert again.sample_ids == before.sample_ids
        assert again.scores() == before.scores()
        again.add_verdicts(before.verdicts())
        again.seal()
        assert_complete(RoundStore(run).round(1), before)
        changes += 1
    assert crashes >= 2  # before the first file, and after it


def only_while(left: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, as often as there is something left; then the process is gone."""

    def change(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KilledError
        return method(*arguments)

    return change


def test_it_is_brought_into_the_new_form_once(run: Storage) -> None:
    interrupt(run, "verdicts").open()
    with counted() as moved:
        RoundStore(run).round(1).open()
    assert moved.files_written == 0
