"""Checkpoints that are damaged or gone: the newest good one is used, aloud, or the run ends with a sentence."""

import hashlib
import json
import logging
import uuid
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore
from kto_ray.rounds import RoundStore
from kto_ray.storage import Storage
from kto_ray.train.checkpoints import BEGINNING, SNAPSHOT, flaw_of, kept_checkpoints, use_good_ones
from kto_ray.train.coordinator import RoundTask
from kto_ray.train.worker import require_same_policy, trained_before
from tests.factories import write_checkpoints


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run that has trained three rounds and keeps two checkpoints."""
    run = Storage(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    for version in range(4):
        (run / "policies").write_json(f"{version:05}/policy.json", {"version": version, "digest": "d" * 64})
    write_checkpoints(run, [2, 3])
    return run


def damage(run: Storage, place: int, how: str) -> str:
    """Of the newest (-1) or an older checkpoint; gives its folder's name."""
    name = kept_checkpoints(run)[place].name
    file = f"checkpoints/{name}/state.pt"
    data = run.read(file)
    if how == "gone":
        run.move(f"checkpoints/{name}", "elsewhere")
    elif how == "cut":
        run.write(file, data[: len(data) // 2])
    elif how == "empty":
        run.write(file, b"")
    else:
        middle = len(data) // 2
        run.write(file, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    return name


def test_sound_checkpoints_are_left_alone(run: Storage, caplog: pytest.LogCaptureFixture) -> None:
    before = run.read(f"checkpoints/{SNAPSHOT}")
    use_good_ones(run)
    assert run.read(f"checkpoints/{SNAPSHOT}") == before
    assert caplog.text == ""


@pytest.mark.parametrize("how", ["gone", "cut", "empty", "one bit"])
def test_the_older_one_is_used_and_said(run: Storage, how: str, caplog: pytest.LogCaptureFixture) -> None:
    name = damage(run, -1, how)
    with caplog.at_level(logging.WARNING):
        use_good_ones(run)
    assert [checkpoint.version for checkpoint in kept_checkpoints(run)] == [2]
    snapshot = run.read_json(f"checkpoints/{SNAPSHOT}")
    assert snapshot["latest_checkpoint_result"]["metrics"] == {"version": 2}
    assert snapshot["checkpoint_report_indices"] == [0]
    assert f"{run}/checkpoints/{name}" in caplog.text
    assert "goes on from policy 2, and trains round 2 again" in caplog.text


def test_an_older_one_that_is_gone_is_no_longer_listed(run: Storage) -> None:
    damage(run, 0, "gone")
    use_good_ones(run)
    assert [checkpoint.version for checkpoint in kept_checkpoints(run)] == [3]


def test_where_none_is_left_the_run_ends_with_the_way_out(run: Storage) -> None:
    names = [damage(run, place, "cut") for place in (0, 1)]
    with pytest.raises(UserError, match=rf"{names[1]}: it is damaged.*{names[0]}.*kto-ray rewind {run} --to 3"):
        use_good_ones(run)
    run.move("checkpoints", "elsewhere")
    with pytest.raises(UserError, match=r"checkpoints has none.*kto-ray rewind"):
        use_good_ones(run)
    run.write_json(BEGINNING, {"to": 3})
    use_good_ones(run)


def test_a_list_that_cannot_be_read_is_named(run: Storage) -> None:
    run.write(f"checkpoints/{SNAPSHOT}", run.read(f"checkpoints/{SNAPSHOT}")[:50])
    with pytest.raises(UserError, match=rf"{SNAPSHOT} is damaged.*kto-ray rewind {run} --to 3"):
        use_good_ones(run)


def test_a_run_that_has_not_trained_needs_none(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    use_good_ones(run)
    PolicyStore(run).publish_base("b" * 64, {})
    use_good_ones(run)


def test_what_torch_writes_is_checked_by_its_checksums(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    write_checkpoints(run, [1])
    (kept,) = kept_checkpoints(run)
    file = tmp_path / "checkpoints" / kept.name / "state.pt"
    torch.save({"weights": torch.randn(1000)}, file)
    assert flaw_of(run, kept) is None
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "is not as it was written" in str(flaw_of(run, kept)) or "CRC" in str(flaw_of(run, kept))


def test_shards_are_checked_by_their_digests(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    write_checkpoints(run, [1])
    (kept,) = kept_checkpoints(run)
    folder = tmp_path / "checkpoints" / kept.name
    torch.save({"weights": torch.randn(10)}, folder / "state.pt")
    (folder / "__1_0.distcp").write_bytes(b"weights")
    (folder / "shards.json").write_text(json.dumps({"__1_0.distcp": hashlib.sha256(b"weights").hexdigest()}))
    assert flaw_of(run, kept) is None
    (folder / "__1_0.distcp").write_bytes(b"weighty")
    assert flaw_of(run, kept) == "it is damaged: __1_0.distcp is not as it was written"
    (folder / "__1_0.distcp").unlink()
    assert flaw_of(run, kept) == "it is gone"


def test_rounds_after_an_older_checkpoint_are_trained_again_as_they_were(tmp_path: Path) -> None:
    rounds = RoundStore(Storage(str(tmp_path)))
    for index, draws in enumerate(({"a": 2}, {})):  # the second was skipped
        rounds.round(index).record_training(draws, {"figures": {}})
    assert trained_before(rounds, 0) == RoundTask(0, train=True)
    assert trained_before(rounds, 1) == RoundTask(1, train=False)
    assert trained_before(rounds, 2) is None


class Weights:
    """What is published of a learner's policy."""

    def __init__(self, value: float) -> None:
        self.value, self.rank = value, 0
        self.sampling = self.policy = self

    def tensors(self) -> dict[str, Any]:
        return {"weights": torch.full((2,), self.value)}

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}


def test_a_policy_that_comes_out_otherwise_is_not_put_in_the_place_of_the_published_one(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    store = PolicyStore(run)
    store.publish(3, Weights(1).tensors(), Weights(1).metadata())
    require_same_policy(store, cast(Any, Weights(1)), 3, run)
    with pytest.raises(UserError, match=rf"policy 3, trained again .* kto-ray rewind {run} --to 2"):
        require_same_policy(store, cast(Any, Weights(2)), 3, run)
