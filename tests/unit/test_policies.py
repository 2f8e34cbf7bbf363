"""Policies are immutable and proved by their digest; without marker there is no version."""

import hashlib
from pathlib import Path

import pytest
import torch

from kto_ray.errors import UserError
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.records import PolicyRef
from kto_ray.storage import Storage

METADATA = {"format": "pt", "rank": "4", "alpha": "8", "lora_adapter_metadata": "{}"}


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        return Storage(f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}")
    return Storage(str(tmp_path) if request.param == "local" else f"memory:/{tmp_path}")


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"b": torch.full((2, 3), value), "a": torch.arange(4.0)}


def test_what_was_published_is_loaded_bit_by_bit(run: Storage) -> None:
    store = PolicyStore(run)
    policy = store.publish(1, weights(), METADATA)
    loaded = PolicyStore(run).load(policy)
    assert loaded is not None
    assert loaded.keys() == weights().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


def test_the_digest_is_that_of_the_stored_file(run: Storage) -> None:
    policy = PolicyStore(run).publish(1, weights(), METADATA)
    assert hashlib.sha256(run.read("policies/00001/policy.safetensors")).hexdigest() == policy.digest
    assert PolicyStore(run).resolve(1) == policy


def test_the_file_is_read_by_any_safetensors_reader(tmp_path: Path) -> None:
    from safetensors import safe_open

    PolicyStore(Storage(str(tmp_path))).publish(1, weights(), METADATA)
    with safe_open(tmp_path / "policies/00001/policy.safetensors", framework="pt") as file:
        assert file.metadata() == METADATA
        assert torch.equal(file.get_tensor("b"), weights()["b"])


def test_the_same_weights_have_the_same_digest_every_time(tmp_path: Path) -> None:
    stores = [PolicyStore(Storage(str(tmp_path / str(number)))) for number in range(8)]
    shuffled = dict(reversed(METADATA.items()))
    digests = {store.publish(1, weights(), shuffled if i % 2 else METADATA).digest for i, store in enumerate(stores)}
    assert len(digests) == 1


def test_publishing_the_same_again_changes_nothing(run: Storage) -> None:
    store = PolicyStore(run)
    policy = store.publish(1, weights(), METADATA)
    before = run.read("policies/00001/policy.json"), run.read("policies/00001/policy.safetensors")
    for _ in range(8):
        assert PolicyStore(run).publish(1, weights(), METADATA) == policy
    assert (run.read("policies/00001/policy.json"), run.read("policies/00001/policy.safetensors")) == before


@pytest.mark.parametrize(("value", "metadata"), [(2.0, METADATA), (1.0, METADATA | {"rank": "5"})])
def test_a_version_cannot_become_another(run: Storage, value: float, metadata: dict[str, str]) -> None:
    store = PolicyStore(run)
    policy = store.publish(1, weights(), METADATA)
    with pytest.raises(DigestError, match=r"policy 1 .*immutable"):
        store.publish(1, weights(value), metadata)
    assert store.resolve(1) == policy
    assert store.load(policy) is not None


def test_without_marker_there_is_no_version(run: Storage) -> None:
    store = PolicyStore(run)
    store.storage.write("00001/policy.safetensors", b"half of a crash")
    assert store.versions() == []
    with pytest.raises(FileNotFoundError):
        store.resolve(1)


def test_the_marker_comes_last(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            PolicyStore(run).publish(1, weights(), METADATA)
    assert PolicyStore(run).versions() == []
    policy = PolicyStore(run).publish(1, weights(3.0), METADATA)  # the retry may differ: nobody has seen the first
    assert PolicyStore(run).versions() == [1]
    assert PolicyStore(run).load(policy) is not None


def test_a_flipped_byte_is_found(run: Storage) -> None:
    store = PolicyStore(run)
    policy = store.publish(1, weights(), METADATA)
    data = bytearray(run.read("policies/00001/policy.safetensors"))
    data[-1] ^= 1
    run.write("policies/00001/policy.safetensors", bytes(data))
    with pytest.raises(DigestError, match=r"policy 1 .*asked for"):
        store.load(policy)


def test_another_digest_is_not_served(run: Storage) -> None:
    store = PolicyStore(run)
    store.publish(1, weights(), METADATA)
    with pytest.raises(DigestError, match="f" * 64):
        store.load(PolicyRef(1, "f" * 64))


def test_weights_that_are_not_there_are_file_not_found(run: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        PolicyStore(run).load(PolicyRef(5, "f" * 64))


COMPONENTS = {"unet": "1" * 64, "vae": "2" * 64}


def test_the_base_is_version_0_without_weights(run: Storage) -> None:
    store = PolicyStore(run)
    base = store.publish_base("0" * 64, COMPONENTS)
    assert base == store.resolve(0) == PolicyRef(0, "0" * 64)
    assert store.load(base) is None
    assert store.publish_base("0" * 64, COMPONENTS) == base


def test_the_reference_stands_still(run: Storage) -> None:
    PolicyStore(run).publish_base("0" * 64, COMPONENTS)
    with pytest.raises(DigestError, match="base model has changed"):
        PolicyStore(run).publish_base("1" * 64, COMPONENTS)
    assert PolicyStore(run).resolve(0).digest == "0" * 64


def test_a_component_that_changed_is_named(run: Storage) -> None:
    PolicyStore(run).publish_base("0" * 64, COMPONENTS)
    for others in ({**COMPONENTS, "vae": "3" * 64}, {"unet": "1" * 64}):
        with pytest.raises(DigestError, match="base model has changed since the run began: vae is not"):
            PolicyStore(run).publish_base("0" * 64, others)
    assert PolicyStore(run).base_components() == COMPONENTS


def test_a_run_that_knows_the_denoiser_only_learns_the_other_components(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    run.write_json("policies/00000/policy.json", {"version": 0, "digest": "0" * 64})
    store = PolicyStore(run)
    assert store.base_components() is None
    with pytest.raises(DigestError, match="denoiser is not"):
        store.publish_base("1" * 64, COMPONENTS)
    assert "kept from here on" not in caplog.text
    for _ in range(2):
        assert store.publish_base("0" * 64, COMPONENTS) == PolicyRef(0, "0" * 64)
    assert caplog.text.count("what the model's other components are now is kept from here on") == 1
    assert store.base_components() == COMPONENTS
    with pytest.raises(DigestError, match="vae is not"):
        store.require_base("0" * 64, {**COMPONENTS, "vae": "3" * 64})


def test_versions_ascend_past_ten(run: Storage) -> None:
    store = PolicyStore(run)
    store.publish_base("0" * 64, COMPONENTS)
    for version in (11, 2, 1, 10):
        store.publish(version, weights(version), METADATA)
    assert store.versions() == [0, 1, 2, 10, 11]


# -- weights that go --------------------------------------------------------------------------------------------------


def published(run: Storage, count: int) -> PolicyStore:
    """The base, and so many policies after it."""
    store = PolicyStore(run)
    store.publish_base("0" * 64, COMPONENTS)
    for version in range(1, count + 1):
        store.publish(version, weights(version), METADATA)
    return store


def kept(store: PolicyStore) -> list[int]:
    return [version for version in store.versions() if store.has_weights(version)]


def test_weights_before_a_version_go_and_digests_stay(run: Storage) -> None:
    store = published(run, 5)
    before = {version: store.resolve(version) for version in store.versions()}
    store.drop_before(4)
    assert kept(store) == [0, 4, 5]
    assert {version: store.resolve(version) for version in store.versions()} == before
    assert store.newest() == 5
    assert store.load(before[0]) is None
    assert store.load(before[4]) is not None
    assert run.names("policies/00003") == ["policy.json"]
    store.drop_before(4)
    store.drop_before(0)
    assert kept(store) == [0, 4, 5]


def test_weights_that_went_are_said_to_have_gone(run: Storage) -> None:
    store = published(run, 2)
    store.drop_before(2)
    with pytest.raises(UserError, match=r"policy 1 of .*policies has no weights any more: keep_policies"):
        store.load(store.resolve(1))
    with pytest.raises(FileNotFoundError):
        store.load(PolicyRef(3, "f" * 64))


def test_nothing_else_can_become_a_version_whose_weights_went(run: Storage) -> None:
    store = published(run, 3)
    store.drop_before(3)
    # As by a worker that trains from an older checkpoint again.
    assert store.publish(1, weights(1), METADATA) == store.resolve(1)
    assert not store.has_weights(1)
    with pytest.raises(DigestError, match=r"policy 1 .*immutable"):
        store.publish(1, weights(7), METADATA)


@pytest.mark.parametrize("crash", [1, 2, 3])
def test_a_crash_among_removals_is_made_up_for_by_the_next(
    run: Storage, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    store, left, delete = published(run, 5), [crash], Storage.delete

    def dying(storage: Storage, name: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        delete(storage, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", dying)
        with pytest.raises(KeyboardInterrupt):
            store.drop_before(4)
    assert kept(store) == [0, *range(crash, 6)]  # the oldest go first
    PolicyStore(run).drop_before(5)
    assert kept(store) == [0, 5]


def test_few_looks_find_what_is_left_to_remove(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store, looks, exists = published(run, 9), list[str](), Storage.exists
    store.drop_before(8)

    def looking(storage: Storage, name: str) -> bool:
        looks.append(name)
        return exists(storage, name)

    monkeypatch.setattr(Storage, "exists", looking)
    store.drop_before(9)
    assert looks == ["00008/policy.safetensors", "00007/policy.safetensors"]


def test_who_lost_the_run_removes_nothing(tmp_path: Path) -> None:
    class Lost:
        def require(self) -> None:
            raise UserError("run: was taken over")

        def require_seen(self) -> None: ...

    store = published(Storage(str(tmp_path)), 3)
    with pytest.raises(UserError, match="taken over"):
        PolicyStore(Storage(str(tmp_path), Lost())).drop_before(3)
    assert kept(store) == [0, 1, 2, 3]


def test_the_newest_is_the_last_with_a_marker(run: Storage) -> None:
    assert PolicyStore(run).newest() == 0
    store = published(run, 2)
    store.storage.write("00003/policy.safetensors", b"half of a crash")
    assert store.newest() == 2
