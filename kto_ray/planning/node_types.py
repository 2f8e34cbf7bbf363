"""What a cluster can have: its kinds of nodes, read from the file that it is begun with."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_ray.config import yaml12
from kto_ray.errors import UserError
from kto_ray.text import read_text

WRITTEN = re.compile(r"(?P<count>\d+)x(?P<cpus>\d+)CPU(,(?P<gpus>\d+)GPU)?")


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: what each has for actors, and how many there may be."""

    name: str
    cpus: int
    gpus: int
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.name} ({self.cpus} CPU{f', {self.gpus} GPU' if self.gpus else ''}; at most {self.most})"


@dataclass(frozen=True)
class Fleet:
    """All nodes that a cluster can have.

    Args:
        most: nodes at a time, of all kinds, the head included.
    """

    types: Sequence[NodeType]
    most: int


def read_cluster(path: Path) -> Fleet:
    """Of Ray's cluster file, or of KubeRay's RayCluster or RayJob.

    Raises:
        UserError: it is none of these, or does not say what its nodes have.
    """
    text = read_text(path, f"--cluster {path}")
    try:
        tree = yaml12.load(text, path.name)
    except yaml12.YAMLError as error:
        raise UserError(f"--cluster {path} is not valid YAML: {error}") from error
    if isinstance(tree, dict) and tree.get("kind") in ("RayCluster", "RayJob"):
        return _of_kuberay(path, tree)
    if isinstance(tree, dict) and "provider" in tree:
        return _of_ray(path, tree)
    raise UserError(
        f"--cluster {path}: neither a cluster file of Ray (it has no `provider`) nor KubeRay's (`kind` is neither "
        "RayCluster nor RayJob)"
    )


def read_nodes(written: Sequence[str]) -> Fleet:
    """Of nodes that are there, as "2x32CPU,4GPU". Raises UserError."""
    types = []
    for text in written:
        found = WRITTEN.fullmatch(text)
        if found is None:
            raise UserError(f"--nodes {text!r}: write how many, and what each has, for instance 2x32CPU,4GPU")
        count = int(found["count"])
        types.append(NodeType(text, int(found["cpus"]), int(found["gpus"] or 0), count, count))
    return Fleet(types, sum(node_type.most for node_type in types))


def _of_ray(path: Path, tree: Mapping[str, Any]) -> Fleet:
    provider = tree["provider"] if isinstance(tree["provider"], dict) else {}
    if provider.get("type") == "local":
        count = len(provider.get("worker_ips") or ())
        resources = (tree.get("metadata") or {}).get("worker_resources")
        if not resources:
            raise UserError(
                f"--cluster {path}: Ray itself finds out what machines of one's own have; write it as metadata: "
                "{worker_resources: {CPU: ..., GPU: ...}}"
            )
        return Fleet([_node_type(path, "worker", resources, count, count)], count)
    kinds, most = tree.get("available_node_types"), tree.get("max_workers")
    if not isinstance(kinds, dict) or not kinds:
        raise UserError(f"--cluster {path}: available_node_types says which nodes there are, and is missing")
    head, types = tree.get("head_node_type"), []
    for name, kind in kinds.items():
        if not kind.get("resources"):
            raise UserError(
                f"--cluster {path}: available_node_types.{name}.resources is empty, which only the cloud can fill; "
                "write what a node of this kind has, for instance {CPU: 8, GPU: 1}"
            )
        least = 1 if name == head else kind.get("min_workers", 0)
        asked = kind.get("max_workers", most)
        if name != head and asked is None:
            raise UserError(
                f"--cluster {path}: neither max_workers nor available_node_types.{name}.max_workers is there"
            )
        types.append(_node_type(path, str(name), kind["resources"], least, 1 if name == head else asked))
    workers = most if most is not None else sum(node_type.most for node_type in types if node_type.name != head)
    return Fleet(types, workers + 1)


def _of_kuberay(path: Path, tree: Mapping[str, Any]) -> Fleet:
    """As Ray's autoscaler reads it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    try:
        spec = tree["spec"]["rayClusterSpec"] if tree["kind"] == "RayJob" else tree["spec"]
        metadata = {"name": "cluster", "namespace": "default"}
        read: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"--cluster {path}: not what Ray reads of a {tree['kind']}: {what}") from error
    types = []
    for name, kind in read["available_node_types"].items():
        least, most = (1, 1) if name == read["head_node_type"] else (kind["min_workers"], kind["max_workers"])
        types.append(_node_type(path, name, kind["resources"], least, most))
    return Fleet(types, read["max_workers"] + 1)


def _node_type(path: Path, name: str, resources: Mapping[str, Any], least: int, most: int) -> NodeType:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if not isinstance(cpus, int) or not isinstance(gpus, int):
        raise UserError(f"--cluster {path}: {name} has {dict(resources)}; CPU and GPU are whole numbers")
    return NodeType(name, cpus, gpus, least, most)
