"""Scorers on real actors: side by side, dead, hung, broken, too many and too few; on a Ray of this machine alone."""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from kto_ray import samples as samples_module
from kto_ray.config import Cluster, Labeling
from kto_ray.draining import node_of
from kto_ray.errors import UserError
from kto_ray.parts import Kind, write_part
from kto_ray.records import Sample, SampleRecord, Score
from kto_ray.samples import Samples, put_pixels
from kto_ray.score.pool import Scorers, require_scored
from kto_ray.storage import Storage
from tests.factories import make_samples, make_score
from tests.plugins import CoinScorer

PATIENCE_S = 120  # for what must happen; nothing is read off the clock


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@contextlib.asynccontextmanager
async def running(**scorers: dict[str, Any]) -> AsyncIterator[Scorers]:
    """Scorers with these settings, on one actor each unless they say otherwise."""
    label = {name: {"max_actors": 1, "timeout_s": PATIENCE_S, **settings} for name, settings in scorers.items()}
    running = Scorers(Labeling.model_validate({"scorers": label}), Cluster())
    try:
        await running.start()
        yield running
    finally:
        running.close()


def fateful(folder: Path, fate: str = "", times: int = 0, **more: Any) -> dict[str, Any]:
    args: dict[str, Any] = {key: more.pop(key) for key in ("builds", "later") if key in more}
    args |= {"folder": str(folder), "fate": fate, "times": times}
    return {"scorer": "tests.plugins:FatefulScorer", "args": args, **more}


def sociable(folder: Path, company: int, **more: Any) -> dict[str, Any]:
    return {"scorer": "tests.plugins:SociableScorer", "args": {"folder": str(folder), "company": company}, **more}


def by_coin(samples: list[Sample], name: str, version: str) -> list[Score]:
    values = CoinScorer().score(np.stack([sample.pixels_HWC for sample in samples]), [s.prompt for s in samples])
    return [Score(sample.id, name, version, value) for sample, value in zip(samples, values, strict=True)]


def built(folder: Path) -> set[int]:
    return {int(file.name.removeprefix("build-")) for file in folder.glob("build-*")}


def alive(folder: Path) -> set[int]:
    return {pid for pid in built(folder) if psutil.pid_exists(pid)}


async def until(condition: Any) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S
        await asyncio.sleep(0.05)


# -- side by side -----------------------------------------------------------------------------------------------------


async def test_all_scorers_work_at_once_on_images_that_are_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples("round-00000", 3)
    stored: list[Any] = []
    put = ray.put

    def put_and_note(value: Any) -> Any:
        stored.append(value)
        return put(value)

    settings = sociable(tmp_path, company=4)
    near, far = {"env": sys.executable}, {"env": sys.executable, "held_out": True}
    names: dict[str, dict[str, Any]] = {"one": {}, "two": {"held_out": True}, "near": near, "far": far}
    async with running(**{name: settings | more for name, more in names.items()}) as scorers:
        monkeypatch.setattr(ray, "put", put_and_note)
        scores = await scorers.score(Samples.of(samples))
        busy = {name: pool.busy_seconds for name, pool in scorers.pools.items()}
        assert all(seconds > 0 for seconds in busy.values())
        assert scorers.busy_seconds == pytest.approx(sum(busy.values()))
    assert scores == [score for name in names for score in by_coin(samples, name, "coin@1")]
    ((data, shape),) = stored
    pixels_BHWC = np.frombuffer(data, np.uint8).reshape(shape)
    np.testing.assert_array_equal(pixels_BHWC, np.stack([sample.pixels_HWC for sample in samples]))


@ray.remote(num_cpus=0)
class Replica:
    """Holds pixels in the object store, as a generator does."""

    def put(self, samples: list[Sample]) -> tuple[int, list[Any]]:
        return os.getpid(), [put_pixels(samples)]


async def test_pixels_whose_replica_is_gone_are_taken_from_storage(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 3)
    folder = Storage(str(tmp_path / "round"))
    records = write_part(folder, samples)
    unforgiving = {"max_retries": 0}  # what is no fault of a scorer costs none of its tries
    coin = {"scorer": "tests.plugins:CoinScorer", **unforgiving}
    async with running(one=fateful(tmp_path, **unforgiving), two=coin) as scorers:
        replica = Replica.remote()
        pid, [reference] = await replica.put.remote(samples)
        there, gone = (Samples(records, folder, reference) for _ in range(2))
        assert await scorers.pools["one"].score(there) == by_coin(samples, "one", "fateful@1")
        assert not (tmp_path / "gone").exists()
        ray.kill(replica)
        await until(lambda: not psutil.pid_exists(pid))
        assert await scorers.score(gone) == by_coin(samples, "one", "fateful@1") + by_coin(samples, "two", "coin@1")
        np.testing.assert_array_equal(await gone.pixels_BHWC(), np.stack([sample.pixels_HWC for sample in samples]))
    assert len(built(tmp_path)) == 1, "no scorer was replaced for what it had no part in"


async def test_scores_that_are_known_are_not_asked_for_again(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    samples = make_samples("round-00000", 3)
    known = [
        Score(samples[0].id, "one", "fateful@1", 0.25),
        Score(samples[1].id, "one", "fateful@1", None, "RuntimeError: no"),  # a failure stays one
        *(Score(sample.id, "two", "fateful@1", 0.25) for sample in samples),
    ]
    async with running(one=fateful(folders[0]), two=fateful(folders[1])) as scorers:
        assert await scorers.score(Samples.of(samples), known) == by_coin(samples[2:], "one", "fateful@1")
        assert await scorers.score(Samples.of(samples[:2]), known) == []
    assert [file.read_text() for file in folders[0].glob("batch-*")] == [samples[2].prompt.id]
    assert not list(folders[1].glob("batch-*"))


async def test_scorers_that_lack_the_same_samples_share_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash."""
    samples = make_samples("round-00000", 4)
    folder, read, read_arrays = Storage(str(tmp_path)), list[str](), samples_module.read_arrays

    def noted(folder: Storage, kind: Kind, records: Sequence[SampleRecord]) -> Any:
        read.extend(record.id for record in records)
        return read_arrays(folder, kind, records)

    records = write_part(folder, samples)
    known = [Score(samples[0].id, name, "coin@1", 0.5) for name in ("one", "two")]
    coin = {"scorer": "tests.plugins:CoinScorer"}
    async with running(one=coin, two=coin) as scorers:
        monkeypatch.setattr(samples_module, "read_arrays", noted)
        scores = await scorers.score(Samples(records, folder), known)
    assert scores == by_coin(samples[1:], "one", "coin@1") + by_coin(samples[1:], "two", "coin@1")
    assert read == [sample.id for sample in samples[1:]]


async def test_a_version_stands_alone_under_the_scorer_s_own_name(tmp_path: Path) -> None:
    async with running(fateful=fateful(tmp_path), brightness={"scorer": "tests.plugins:brightness"}) as scorers:
        assert {name: pool.version for name, pool in scorers.pools.items()} == {"fateful": "1", "brightness": "1"}


async def test_no_scorers_have_no_scores() -> None:
    scorers = Scorers(Labeling(labeler="people:Queue", scorers={}), Cluster())
    await scorers.start()
    assert await scorers.score(Samples.of(make_samples("round-00000", 2))) == []
    scorers.close()


# -- what dies, hangs or breaks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fate", "said"), [("die", "actor died"), ("hang", "no answer within 5 s")])
async def test_a_batch_whose_actor_is_lost_goes_to_another(
    tmp_path: Path, fate: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples = make_samples("round-00000", 3)
    async with running(coin=fateful(tmp_path, fate, times=1, timeout_s=5)) as scorers:
        assert await scorers.score(Samples.of(samples)) == by_coin(samples, "coin", "fateful@1")
        assert len(built(tmp_path)) == 2
        await until(lambda: len(alive(tmp_path)) == 1)
    assert said in caplog.text
    assert "its 3 images go to another" in caplog.text
    await until(lambda: not alive(tmp_path))


@pytest.mark.parametrize(
    ("fate", "error"),
    [
        ("die", r"scorer actor died: .+ \(tried 2 times\)"),
        ("hang", r"no answer within 3 s \(tried 2 times\)"),
    ],
)
async def test_a_batch_that_loses_every_actor_has_failed(tmp_path: Path, fate: str, error: str) -> None:
    samples = make_samples("round-00000", 2)
    async with running(coin=fateful(tmp_path, fate, times=2, timeout_s=3, max_retries=1)) as scorers:
        scores = await scorers.score(Samples.of(samples))
        assert [score.value for score in scores] == [None, None]
        assert all(re.fullmatch(error, score.error or "") for score in scores)
        # The pool is whole again.
        assert await scorers.score(Samples.of(samples)) == by_coin(samples, "coin", "fateful@1")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"scorer": "tests.plugins:SociableScorer"}, "missing 2 required positional arguments: 'folder' and 'company'"),
        ({"scorer": "tests.plugins:FatefulScorer", "args": {"folder": "/nowhere"}}, "No such file .* '/nowhere/build-"),
        ({"scorer": "tests.plugins:NamelessScorer"}, "has no attribute 'name'"),
        ({"scorer": "shape"}, "did you mean 'shapes'"),
    ],
)
async def test_a_scorer_that_cannot_be_built_is_named_with_the_reason(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=rf"label\.scorers\.broken could not be built: .*{problem}"):
        async with running(broken=settings):
            pass


async def test_actors_that_cannot_be_built_anew_fail_their_batches(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 2)
    async with running(coin=fateful(tmp_path, "die", times=1, builds=1, max_retries=1)) as scorers:
        scores = await scorers.score(Samples.of(samples))
    assert [score.value for score in scores] == [None, None]
    assert all("RuntimeError: no more of these" in (score.error or "") for score in scores)


async def test_what_is_cancelled_leaves_no_actor_stuck(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 2)
    async with running(coin=fateful(tmp_path, "hang", times=1, timeout_s=30, max_retries=0)) as scorers:
        (stuck,) = built(tmp_path)
        scoring = asyncio.create_task(scorers.score(Samples.of(samples)))
        await until(lambda: list(tmp_path.glob("batch-*")))
        scoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scoring
        assert await scorers.score(Samples.of(samples)) == by_coin(samples, "coin", "fateful@1")
        await until(lambda: stuck not in alive(tmp_path))


async def test_closing_ends_every_actor_also_under_way(tmp_path: Path) -> None:
    async with running(coin=fateful(tmp_path, "hang", times=1)) as scorers:
        scoring = asyncio.create_task(scorers.score(Samples.of(make_samples("round-00000", 1))))
        await until(lambda: list(tmp_path.glob("batch-*")))
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    await until(lambda: not alive(tmp_path))


# -- how many ---------------------------------------------------------------------------------------------------------


async def test_a_pool_grows_while_batches_wait_and_shrinks_when_told(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 6)
    async with running(coin=sociable(tmp_path, company=3, max_actors=3)) as scorers:
        scored = await asyncio.gather(*(scorers.score(Samples.of(samples[start : start + 1])) for start in range(6)))
        assert [score for scores in scored for score in scores] == by_coin(samples, "coin", "1")
        here = {int(file.name.removeprefix("here-")) for file in tmp_path.glob("here-*")}
        assert len(here) == 3
        assert all(map(psutil.pid_exists, here))
        scorers.shrink()
        await until(lambda: sum(map(psutil.pid_exists, here)) == 1)
        assert await scorers.score(Samples.of(samples[:1])) == by_coin(samples[:1], "coin", "1")


async def test_nobody_waits_for_an_actor_that_is_not_built(tmp_path: Path) -> None:
    samples = make_samples("round-00000", 4)
    async with running(coin=fateful(tmp_path, builds=1, later="hang", max_actors=2)) as scorers:
        scorers.pools["coin"]._patience_s = 0
        scored = await asyncio.gather(*(scorers.score(Samples.of(samples[start : start + 1])) for start in range(4)))
        assert [score for scores in scored for score in scores] == by_coin(samples, "coin", "fateful@1")
        await until(lambda: len(built(tmp_path)) == 2)
        scorers.shrink()
        await until(lambda: len(alive(tmp_path)) == 1)
        assert await scorers.score(Samples.of(samples)) == by_coin(samples, "coin", "fateful@1")


async def test_what_is_over_sooner_than_an_actor_is_built_builds_none(tmp_path: Path) -> None:
    """Else every round of quick scorers would start processes, only to end them at its seal."""
    samples = make_samples("round-00000", 4)
    async with running(coin=fateful(tmp_path, max_actors=4)) as scorers:
        scorers.pools["coin"]._patience_s = PATIENCE_S
        await asyncio.gather(*(scorers.score(Samples.of(samples[start : start + 1])) for start in range(4)))
        assert len(built(tmp_path)) == 1


# -- how many failures are too many -----------------------------------------------------------------------------------


def test_voters_may_fail_on_as_many_images_as_the_configuration_says() -> None:
    label = Labeling.model_validate(
        {"scorers": {"shapes": {}, "other": {}, "watched": {"held_out": True}}, "max_failed_fraction": 0.25}
    )
    failures = [make_score("a", None), Score("a", "other", "1", None, "RuntimeError: no")]
    watched = [Score(f"{place}", "watched", "1", None, "RuntimeError: no") for place in range(8)]
    require_scored(label, "round-00003", [*watched, *failures, make_score("b", None)], 8)
    with pytest.raises(
        UserError, match=r"round-00003: 3 of 8 images .*label\.max_failed_fraction \(0\.25\).* shapes: RuntimeError: no"
    ):
        require_scored(label, "round-00003", [*watched, *failures, make_score("b", None), make_score("c", None)], 8)


# -- on a node that is drained ----------------------------------------------------------------------------------------


def here() -> dict[str, float | None]:
    """This node, as if it were taken away in a minute."""
    return {ray.get_runtime_context().get_node_id(): 60.0}


async def test_an_actor_whose_node_is_drained_works_until_another_one_is_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = make_samples("round-00000", 3)
    async with running(coin=fateful(tmp_path)) as scorers:
        (first,) = built(tmp_path)
        await scorers.pools["coin"].leave(here())
        assert first in alive(tmp_path)
        await until(lambda: first not in alive(tmp_path))
        (second,) = alive(tmp_path)
        scores = await scorers.score(Samples.of(samples))
        await scorers.pools["coin"].leave({"another": 60.0})
        assert alive(tmp_path) == {second}
    assert scores == by_coin(samples, "coin", "fateful@1")
    assert caplog.text.count("scorer coin: the node of an actor is taken away in 60 s; another one is built") == 1


async def test_what_dies_with_a_drained_node_is_no_failure(tmp_path: Path) -> None:
    """The other one is not there yet, and there is no try to lose."""
    samples = make_samples("round-00000", 3)
    async with running(coin=fateful(tmp_path, "hang", times=1, max_retries=0)) as scorers:
        scoring = asyncio.create_task(scorers.score(Samples.of(samples)))
        await until(lambda: list(tmp_path.glob("batch-*")))
        (first,) = built(tmp_path)
        await scorers.pools["coin"].leave(here())
        psutil.Process(first).kill()
        assert await scoring == by_coin(samples, "coin", "fateful@1")
        assert len(alive(tmp_path)) == 1


async def test_one_that_is_still_being_built_there_is_built_elsewhere(tmp_path: Path) -> None:
    async with running(coin=fateful(tmp_path, builds=1, later="hang", max_actors=2)) as scorers:
        pool = scorers.pools["coin"]
        pool._add_actor()
        await until(lambda: len(built(tmp_path)) == 2)
        (hanging,) = [actor for actor, offer in pool._actors.items() if not offer.done()]
        await until(lambda: node_of(hanging))
        await pool.leave(here())
        assert hanging not in pool._actors
        assert len(pool._actors) == 3  # the first, the one in its place, and the one in the place of what was not built
