"""Which nodes are asked whether they see the run's folder; that they are is in `integration/test_node_loss.py`."""

from typing import Any

from kto_ray.sharing import kinds_of


def node(name: str, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    """As Ray describes it."""
    resources |= {f"node:10.0.0.{name}": 1.0, "memory": float(name) * 1e9, "object_store_memory": float(name) * 1e8}
    return {
        "NodeID": name,
        "Alive": alive,
        "Resources": resources,
        "Labels": {"ray.io/node-id": name, "ray.io/node-group": "workers"} | (labels or {}),
    }


def test_one_node_of_each_kind_is_asked() -> None:
    nodes = [
        node("1", CPU=8),
        node("2", CPU=8, alive=False, GPU=1),
        node("3", CPU=8, GPU=1),
        node("4", CPU=8, GPU=1),
        node("5", CPU=8, GPU=2),
        node("6", CPU=8, GPU=1, labels={"ray.io/accelerator-type": "A10G"}),
    ]
    assert [found["NodeID"] for found in kinds_of(nodes).values()] == ["1", "3", "5", "6"]
