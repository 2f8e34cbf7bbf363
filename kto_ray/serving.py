"""Ray Serve as the loop needs it: for the generators without any listener, for people's page with one.

The loop starts it once; `generate/client.py` and `label/human/labeler.py` deploy on it.
"""

import socket
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from kto_ray.config.people import Human
from kto_ray.errors import UserError

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def start_serve(human: Human | None) -> None:
    """Start Serve on the cluster, or use the one that is there.

    Args:
        human: who is served a page, on `host` and `port` of the head; None: nothing listens on the network, the loop
            talks to replicas by handle.

    Raises:
        UserError: the port is taken, or the cluster's Serve does not listen there.
    """
    if human is None:
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=QUIET)
        return
    where = f"{human.host}:{human.port}"
    if not _is_running():
        _require_free(human)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=human.host, port=human.port),
        logging_config=QUIET,
    )
    listens = _http_options()
    if not serve.status().proxies or (listens.host, listens.port) != (human.host, human.port):
        found = f"{listens.host}:{listens.port}" if serve.status().proxies else "no address"
        raise UserError(
            f"label.human.port: this cluster's Serve listens on {found} already, and only one address is possible, not "
            f"{where} too; set label.human.host and .port to that, or end Serve with: serve shutdown"
        )


def _is_running() -> bool:
    return bool(serve.status().applications) or bool(serve.status().proxies)


def _http_options() -> Any:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "serve.start() was called"
    return client.http_config


def _require_free(human: Human) -> None:
    """Raises UserError when something else listens, as far as that can be seen from here."""
    cluster: Any = ray
    head = next((node for node in cluster.nodes() if "node:__internal_head__" in node["Resources"]), None)
    if head is None or head["NodeID"] != ray.get_runtime_context().get_node_id():
        return
    family = socket.AF_INET6 if ":" in human.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((human.host, human.port))
        except OSError as error:
            raise UserError(
                f"label.human.port: cannot listen on {human.host}:{human.port}: {error.strerror}; "
                "give another label.human.port"
            ) from error
