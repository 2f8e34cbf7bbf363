"""How a policy gets to the replicas: read from storage once, and then once a node, however many replicas it has.

    storage --once--> the driver --Ray's object store--> node A --shared memory--> its replicas
                                                     --> node B ...

`client.py` offers the file with every request, `replica.py` takes it, and checks its digest as it would that of a file
of storage, which it goes to where Ray has lost the object.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError

from kto_ray.policies import PolicyStore
from kto_ray.records import PolicyRef

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

KEPT = 2
"""Policies whose files stay in the object store: with lag, one draws while another is evaluated."""


class Offering:
    """The driver's side. Use from one event loop."""

    def __init__(self, store: PolicyStore) -> None:
        self._store = store
        self._offered: OrderedDict[PolicyRef, list[Any]] = OrderedDict()
        self._lock = asyncio.Lock()

    async def __call__(self, policy: PolicyRef) -> list[Any]:
        """The reference to a policy's file. None for the base, and where the object store has no room.

        Raises:
            UserError, FileNotFoundError: see `PolicyStore.read`.
        """
        if policy.version == 0:
            return []
        async with self._lock:
            if policy not in self._offered:
                self._offered[policy] = await asyncio.to_thread(self._put, policy)
                while len(self._offered) > KEPT:
                    self._offered.popitem(last=False)
        return self._offered[policy]

    def _put(self, policy: PolicyRef) -> list[Any]:
        data = np.frombuffer(self._store.read(policy), np.uint8)
        try:
            return [ray.put(data)]
        except RayError as error:
            logger.warning(
                "policy %d: its %.0f MB do not get into Ray's object store (%s); every replica reads them from storage",
                *(policy.version, data.nbytes / 1e6, type(error).__name__),
            )
            return []


def pulled(store: PolicyStore, policy: PolicyRef, offered: Sequence[Any]) -> "dict[str, Tensor] | None":
    """A policy's weights, as `PolicyStore.load` gives them; of what is offered, if it is there."""
    for reference in offered:
        try:
            data: Any = ray.get(reference)
        except RayError as error:
            logger.warning("policy %d is read from storage: Ray has lost it (%s)", policy.version, error)
        else:
            return store.weights_of(policy, memoryview(data))
    return store.load(policy)
