"""Nodes that are taken away, and when: what Ray was told of a spot machine, of a node pool that is rolled.

    whoever takes a node away --`ray drain-node`--> Ray --`drained`--> score/pool.py, which moves its actors

Serve starts a replica elsewhere before it ends one on such a node, and Ray Train restarts its workers elsewhere; what
this package does about it is in `generate/client.py` and `train/moving.py`. None of it counts as a failure.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray._private.state import state
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

POLL_S = 1.0


def draining_nodes() -> dict[str, float | None]:
    """Ids of the nodes that are taken away, each with the seconds that are left; None: nobody said when.

    Says so where Ray cannot tell, and gives none: whoever asks will ask again.
    """
    source: Any = state
    try:
        deadlines_ms: Mapping[str, int] = source.get_draining_nodes()  # 0 where there is none
    except RayError:
        logger.exception("whether nodes are taken away is not known for the moment")
        return {}
    return {node: ms / 1000 - time.time() if ms else None for node, ms in deadlines_ms.items()}


async def drained() -> AsyncIterator[dict[str, float | None]]:
    """Gives `draining_nodes` about once a second, while there are any."""
    while True:
        if nodes := await asyncio.to_thread(draining_nodes):
            yield nodes
        await asyncio.sleep(POLL_S)


def node_of(actor: Any) -> str | None:
    """Id of the node on which an actor is, or is being built; None: it waits for one. Asks Ray, not the actor."""
    source: Any = state
    return source.actor_table(actor._actor_id.hex()).get("Address", {}).get("NodeID") or None


def seconds_left(left_s: float | None) -> str:
    """In words."""
    return "soon" if left_s is None else f"in {max(0.0, left_s):.0f} s"
