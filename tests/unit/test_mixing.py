"""Labelled images in the training of an online run: how many, which, and what stays as it was."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kto_ray.config import RunConfig, implied, load
from kto_ray.errors import UserError
from kto_ray.prepared import PreparedSet, is_labelled
from kto_ray.train.batches import LatentsInMemory, RoundData
from kto_ray.train.mixing import Mixed
from tests.factories import make_set

OWN = 24
ROUND = [n % 3 == 0 for n in range(OWN)]


def config_of(*overrides: str, share: float = 0.25) -> RunConfig:
    small = ["train.global_batch=8", "train.micro_batch=8", f"generate.images_per_round={OWN}", "train.epochs=2"]
    mix = f"data={{mix: {{source: liked.csv, share: {share}}}, stream: {{shuffle: 16}}}}"
    return load("shapes_demo", [*small, mix, *overrides])


def a_round(index: int = 0, desirable: list[bool] = ROUND) -> tuple[list[str], RoundData]:
    """Whose latents are 1000 and their number."""
    latents = np.stack([np.full((4, 2, 2), 1000 + n, np.float32) for n in range(len(desirable))])
    prompts = [f"own {n // 2}" for n in range(len(desirable))]
    ids = [f"round-{index:05}-{n:03}" for n in range(len(desirable))]
    return ids, RoundData(index, LatentsInMemory(latents), prompts, np.array(desirable))


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedSet:
    return make_set(tmp_path / "set", [n % 2 == 0 for n in range(40)], prompts=[f"set {n // 4}" for n in range(40)])


def test_each_step_has_its_share_and_each_sample_what_belongs_to_it(prepared: PreparedSet) -> None:
    ids, data = Mixed(prepared, config_of()).mix(*a_round())
    assert data.plan_SG is not None
    assert data.plan_SG.shape == (6, 8)
    assert ((data.plan_SG >= OWN).sum(axis=1) == 2).all()
    data.latents.prepare(data.plan_SG)
    for picks_G in data.plan_SG:
        for place, latents_CHW in zip(picks_G.tolist(), data.latents.take(picks_G), strict=True):
            number = int(latents_CHW[0, 0, 0])
            mixed = place >= OWN
            assert is_labelled(ids[place]) == mixed
            assert number == (prepared.table["sample_id"].to_pylist().index(ids[place]) if mixed else 1000 + place)
            assert data.desirable_N[place] == (number % 2 == 0 if mixed else ROUND[place])
            assert data.prompts[place] == (f"set {number // 4}" if mixed else f"own {place // 2}")


def test_those_of_the_set_come_in_passes_over_the_rounds(prepared: PreparedSet) -> None:
    """Sixty places of 40 images, by gamma 0.8 of either class: none comes again before all of its class came."""
    mixed, drawn = Mixed(prepared, config_of()), Counter[str]()
    for index in range(5):
        ids, data = mixed.mix(*a_round(index))
        assert data.plan_SG is not None
        drawn.update(ids[place] for place in data.plan_SG.ravel().tolist() if place >= OWN)
        again = Mixed(prepared, config_of()).mix(*a_round(index))[1]
        assert np.array_equal(data.plan_SG, again.plan_SG)  # type: ignore[arg-type]
    numbers = {name: n for n, name in enumerate(prepared.table["sample_id"].to_pylist())}
    for yes in (True, False):
        counts = [drawn[name] for name, n in numbers.items() if (n % 2 == 0) == yes]
        assert max(counts) - min(counts) <= 1
    assert drawn.total() == 60


def test_a_round_of_few_or_of_late_verdicts_has_its_share_too(prepared: PreparedSet) -> None:
    mixed = Mixed(prepared, config_of())
    for count in (8, 40):
        _, data = mixed.mix(*a_round(0, [n % 2 == 0 for n in range(count)]))
        assert data.plan_SG is not None
        assert data.plan_SG.shape == (count // 4, 8)
        assert ((data.plan_SG >= count).sum(axis=1) == 2).all()


def test_pairs_are_mixed_in_whole(prepared: PreparedSet) -> None:
    _, data = Mixed(prepared, config_of("train.objective=dpo", "generate.images_per_prompt=2")).mix(
        *a_round(0, [n % 2 == 0 for n in range(OWN)])
    )
    assert data.plan_SG is not None
    for better, worse in data.plan_SG.reshape(-1, 2).tolist():
        assert data.desirable_N[better]
        assert not data.desirable_N[worse]
        assert data.prompts[better] == data.prompts[worse]
    assert ((data.plan_SG >= OWN).sum(axis=1) == 2).all()


def test_where_the_round_teaches_nothing_nothing_is_mixed_in(prepared: PreparedSet) -> None:
    ids, data = a_round(0, [False] * OWN)
    config = config_of("train.objective=sft")
    assert Mixed(prepared, config).mix(ids, data) == (ids, data)


def test_ranks_have_some_of_both(prepared: PreparedSet) -> None:
    _, data = Mixed(prepared, config_of(share=0.5)).mix(*a_round())
    assert data.plan_SG is not None
    halves = (data.plan_SG >= OWN).reshape(-1, 2, 4).sum(axis=2)
    assert len(set(halves[:, 0].tolist())) > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mix.share=0.01"], "data.mix.share .0.01. of train.global_batch .8. is 0 samples"),
        (["data.mix.share=0.99"], "is 8 samples of a step"),
        (["data.sources=other.csv"], "give sources, to learn from labelled images alone, or mix"),
        (["data.prepare.resize=buckets"], "have the size of those that are drawn: give crop"),
        (["data.held_out_share=0.1"], "data.held_out_share is for runs on labelled images alone"),
        (["train.own_noise=0.5"], "the noise .* is not known"),
        (["train.objective={kind: nft}"], "drawn by none of this run's"),
        (["train.objective={kind: dpo, pairs: scores}", "generate.images_per_prompt=2"], "use pairs: verdicts"),
    ],
)
def test_what_cannot_be_mixed_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(*overrides)


def test_it_is_an_online_run_that_says_what_is_mixed_in() -> None:
    config = config_of()
    assert not config.offline
    assert implied(config)["mixed in"] == "2 labelled images of the 8 samples of a step"
    assert "images" in implied(config)


def test_a_set_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    liked: dict[str, Any] = {"desirable": [True] * 8}
    with pytest.raises(ValueError, match="needs both"):
        Mixed(make_set(tmp_path, **liked), config_of())
