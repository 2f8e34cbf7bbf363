"""`cluster.yaml` is what Ray's own validation accepts."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def test_ray_accepts_the_cluster_and_fills_its_defaults() -> None:
    config = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    assert config["provider"]["type"] == "aws"
    assert config["available_node_types"]["gpu"]["max_workers"] == 8
    assert config["head_node_type"] == "head"
