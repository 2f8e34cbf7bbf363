"""Whether the run's folder is shared: looked for on a node of every kind, before anything is deployed on any.

    cluster.py --`require_seen_everywhere`--> a task on each kind of node --`Storage.require_seen`--> the driver's file

A kind is what a node offers: two that the autoscaler starts of one type are alike, and mount the same. Those that are
not there yet are asked when they come, by each replica and train worker before it loads its model.
"""

import logging
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kto_ray.errors import UserError
from kto_ray.lost import last_words
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

Kind = tuple[frozenset[tuple[str, Any]], frozenset[tuple[str, Any]]]
"""Resources and labels of a node, but for what no other node has."""
OF_ONE_NODE = ("memory", "object_store_memory", "node:")
"""How resources begin that no two nodes need to have alike."""
NOTICE_EVERY_S = 30.0


def kinds_of(nodes: list[dict[str, Any]]) -> dict[Kind, dict[str, Any]]:
    """A living node of each kind, of Ray's list of them."""
    found: dict[Kind, dict[str, Any]] = {}
    for node in nodes:
        resources = {item for item in node["Resources"].items() if not item[0].startswith(OF_ONE_NODE)}
        labels = {item for item in node["Labels"].items() if item[0] != "ray.io/node-id"}
        if node["Alive"]:
            found.setdefault((frozenset(resources), frozenset(labels)), node)
    return found


def require_seen_everywhere(run: Storage) -> None:
    """Look for what the driver wrote into the run's folder, from one node of each kind that the cluster has now.

    Raises:
        UserError: it is not seen from one, which the sentence names with the remedy.
    """
    cluster: Any = ray
    here = cluster.get_runtime_context().get_node_id()
    there = [node for node in kinds_of(cluster.nodes()).values() if node["NodeID"] != here]

    @ray.remote(num_cpus=0, max_retries=0)
    def look(run: Storage) -> None:
        run.require_seen()

    looking: list[Any] = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(run)
        for node in there
    ]
    while looking:
        done, looking = ray.wait(looking, timeout=NOTICE_EVERY_S)
        if not done:
            logger.warning("still looking for %s from %d of the cluster's nodes", run, len(looking))
        for answer in done:
            try:
                ray.get(answer)
            except RayError as error:
                if isinstance(error, UserError):
                    raise UserError(last_words(error)) from error
                # It has gone meanwhile, or is not well: whoever is to work there will see.
                logger.warning("a node could not be asked whether it sees %s: %s", run, last_words(error))
