"""A policy's file, read from storage once for all replicas."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ObjectLostError, ObjectStoreFullError

from kto_ray.generate import pulling
from kto_ray.generate.pulling import Offering, pulled
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.storage import Storage


class Shelf:
    """Ray's object store: what is put gets a number."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.lost = False

    def put(self, thing: Any) -> int:
        if self.lost:
            raise ObjectStoreFullError("full")
        self.objects.append(thing)
        return len(self.objects) - 1

    def get(self, reference: int) -> Any:
        if self.lost:
            raise ObjectLostError("aa", None, "")
        return self.objects[reference]


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    made = Shelf()
    monkeypatch.setattr(pulling, "ray", made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> PolicyStore:
    return PolicyStore(Storage(str(tmp_path)))


@pytest.mark.usefixtures("shelf")
async def test_storage_is_read_once_and_replicas_take_what_is_offered(store: PolicyStore) -> None:
    base = store.publish_base("b" * 64, {})
    policies = [store.publish(version, {"w": torch.full((3,), float(version))}, {}) for version in (1, 2, 3)]
    offering = Offering(store)
    offered = await asyncio.gather(*(offering(policies[0]) for _ in range(5)))
    assert offered == [[0]] * 5
    store.drop_before(2)  # nobody needs the file any more
    weights = pulled(store, policies[0], offered[0])
    assert weights is not None
    assert torch.equal(weights["w"], torch.ones(3))
    assert await offering(base) == []
    assert pulled(store, base, []) is None
    assert [await offering(policy) for policy in policies[1:]] == [[1], [2]]
    assert list(offering._offered) == policies[1:]  # older ones go


async def test_what_is_offered_has_to_prove_its_digest(shelf: Shelf, store: PolicyStore) -> None:
    policy = store.publish(1, {"w": torch.ones(3)}, {})
    offered = await Offering(store)(policy)
    shelf.objects[0] = np.array([*shelf.objects[0][:-1], 7], np.uint8)
    with pytest.raises(DigestError, match=r"policy 1 .* has digest"):
        pulled(store, policy, offered)


async def test_where_ray_has_lost_it_or_has_no_room_storage_has_it(
    shelf: Shelf, store: PolicyStore, caplog: pytest.LogCaptureFixture
) -> None:
    policy = store.publish(1, {"w": torch.ones(3)}, {})
    offered = await Offering(store)(policy)
    shelf.lost = True
    assert pulled(store, policy, offered) is not None
    assert "policy 1 is read from storage: Ray has lost it" in caplog.text
    assert await Offering(store)(policy) == []
    assert "do not get into Ray's object store" in caplog.text
