"""Ray's fake nodes, so that many of them live on a machine that is busy; the autoscaler's own process imports this."""

from typing import Any
from unittest import mock

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

from tests.ports import free_ports

PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")


class Provider(FakeMultiNodeProvider):  # type: ignore[misc]
    """A node's raylet gives up when its agents have not said in 30 s at which ports they listen, unless it is told.

    Nor has each node a process that forwards its logs: all share one folder, of which the head's forwards them.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        def parameters(**given: Any) -> RayParams:
            return RayParams(**given | dict(zip(PORTS, free_ports(len(PORTS)), strict=True)), include_log_monitor=False)

        with mock.patch("ray._private.parameter.RayParams", parameters):
            super()._create_node_with_resources_and_labels(*arguments)
