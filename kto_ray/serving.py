"""Ray Serve as the loop needs it: for the generators without any listener, for a run's pages with one.

The loop starts it once; `generate/client.py`, `people/labeler.py` and `watch/own_page.py` deploy on it. What they
deployed they end with `end_applications`, or else the caretaker does, once their driver is gone.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, ActorDiedError
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationDetails, ApplicationStatus, LoggingConfig, ServeInstanceDetails, ServeStatus

from kto_ray.config import Address
from kto_ray.errors import UserError
from kto_ray.lost import last_words
from kto_ray.naming import Application, Role, unique_name
from kto_ray.storage import Storage

POLL_S = 0.2
START_TRIES = 50
CONFIGURING = threading.Lock()
"""Held where Serve makes a deployment's configuration, which it does to say what is there, too: for a moment that
changes how the whole process pickles a module, so that of two threads one would fail (Ray 2.60)."""
REPLICAS = "serve"
"""The namespace in which Serve's replicas are actors, named SERVE_REPLICA::application#deployment#id."""
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def start_serve(address: Address | None, alone: bool = False) -> None:
    """Start Serve on the cluster, or use the one that is there.

    Args:
        address: that pages are served on, of the head; None: nothing listens on the network, the loop talks to
            replicas by handle.
        alone: no other run is on the cluster, so that a Serve which earlier ones left may be ended.

    Raises:
        UserError: the port is taken, or the cluster's Serve does not listen there.
    """
    if address is None:
        _start(proxy_location=ProxyLocation.Disabled)
        return
    if alone and not _listens(address) and not deployed():
        serve.shutdown()  # type: ignore[no-untyped-call]  # an earlier run's, that listens elsewhere or not at all
    if not _is_running():
        _require_free(address)
    _start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=address.host, port=address.port))
    if not _listens(address):
        listens = _client().http_config
        found = f"{listens.host}:{listens.port}" if _status().proxies else "no address"
        raise UserError(
            f"{address.section}.port: this cluster's Serve listens on {found} already, and only one address is "
            f"possible, not {address} too; set {address.section}.host and .port to that, or end Serve with: serve "
            "shutdown"
        )


def _start(**options: Any) -> None:
    """`serve.start`, which fails for all but one of the drivers that start it at the same moment.

    It also fails when its controller replaces the proxy that it waits for, as it does on a machine that is busy.
    """
    for _ in range(START_TRIES):
        with contextlib.suppress(ActorAlreadyExistsError, ActorDiedError):
            serve.start(**options, logging_config=QUIET)
            return
        time.sleep(POLL_S)  # until the other's controller can be found
    serve.start(**options, logging_config=QUIET)


def _listens(address: Address) -> bool:
    """Whether the cluster has a Serve that listens where the page is to be."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    listens = client and client.http_config
    return bool(client and _status().proxies) and (listens.host, listens.port) == (address.host, address.port)


def application_name(run: Storage, role: Role) -> str:
    """Of an application that this driver deploys for a run."""
    return str(Application(unique_name(run), role, ray.get_runtime_context().get_job_id()))


async def deploy(
    what: str,
    application: Callable[[], serve.Application],
    name: str,
    route_prefix: str | None = None,
    scaled_by_us: bool = False,
) -> Any:
    """Deploy an application and wait until its first replicas run; gives its handle.

    Cancelled, it does not leave before Serve knows of the application, so that whoever ends it then ends it for good.

    Args:
        what: is deployed, for the error.
        application: makes it, in another thread.
        scaled_by_us: how many replicas there are is said by `scale`.

    Raises:
        UserError: its replicas could not be built; has their own last words.
    """
    deploying = asyncio.ensure_future(asyncio.to_thread(_run, application, name, route_prefix, scaled_by_us))
    try:
        handle = await asyncio.shield(deploying)
    except asyncio.CancelledError:
        await asyncio.gather(deploying, return_exceptions=True)
        raise
    while True:
        found = (await asyncio.to_thread(_status)).applications.get(name)
        if found is None:
            raise UserError(f"{what}: somebody ended {name} on this cluster while it was being deployed")
        if found.status == ApplicationStatus.RUNNING:
            break
        if found.status == ApplicationStatus.DEPLOY_FAILED:
            words = [deployment.message for deployment in found.deployments.values() if deployment.message]
            raise UserError(f"{what} could not be built: {last_words((words or [found.message])[0])}")
        await asyncio.sleep(POLL_S)
    if route_prefix is not None:
        await asyncio.to_thread(_client().wait_for_proxies_serving, wait_for_applications_running=True)
    return handle


def _run(application: Callable[[], serve.Application], name: str, route_prefix: str | None, scaled_by_us: bool) -> Any:
    """Have Serve know of it; gives its handle."""
    with CONFIGURING:
        target = serve.RunTarget(application(), name, route_prefix, external_scaler_enabled=scaled_by_us)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    return handle


def _status() -> ServeStatus:
    with CONFIGURING:
        return serve.status()


async def scale(application: str, deployment: str, replicas: int) -> None:
    """Have so many replicas of a deployment that is `scaled_by_us`; returns before they are there.

    Serve's own way there is its REST interface, which wants a dashboard; that asks the controller, as this does.
    """
    await _client()._controller.update_deployment_replicas.remote(DeploymentID(deployment, application), replicas)


async def running(application: str, deployment: str) -> int:
    """How many replicas of a deployment run; 0 where it is not there."""
    found = (await asyncio.to_thread(_status)).applications.get(application)
    return found.deployments[deployment].replica_states.get(ReplicaState.RUNNING, 0) if found else 0


def deployed() -> dict[str, ApplicationDetails]:
    """All applications that Serve has on this cluster, by name."""
    client = _get_global_client(raise_if_no_controller_running=False)
    with CONFIGURING:
        return ServeInstanceDetails(**client.get_serve_details()).applications if client else {}


def end_applications(names: Sequence[str], patience_s: float = 60) -> None:
    """End those applications that are there, one after the other, without waiting for what their replicas are at.

    Raises:
        TimeoutError: one is still there after so long.
    """
    for name in names:
        if name in _status().applications:
            serve.delete(name, _blocking=False)
            _status()  # the controller answers one call after the other: now it starts no more replicas
            _kill_replicas(name)
    began = time.monotonic()
    while left := [name for name in names if name in _status().applications]:
        if time.monotonic() - began > patience_s:
            raise TimeoutError(f"Serve did not end {', '.join(left)} within {patience_s:g} s")
        time.sleep(POLL_S)
        for name in left:  # those that were being started
            _kill_replicas(name)


def _kill_replicas(application: str) -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == REPLICAS and actor["name"].startswith(f"SERVE_REPLICA::{application}#"):
            with contextlib.suppress(ValueError):  # it is gone meanwhile
                ray.kill(ray.get_actor(actor["name"], REPLICAS))


def _is_running() -> bool:
    return bool(_status().applications) or bool(_status().proxies)


def _client() -> Any:
    client = _get_global_client()
    assert client is not None, "serve.start() was called"
    return client


def _require_free(address: Address) -> None:
    """Raises UserError when something else listens, as far as that can be seen from here."""
    cluster: Any = ray
    head = next((node for node in cluster.nodes() if "node:__internal_head__" in node["Resources"]), None)
    if head is None or head["NodeID"] != ray.get_runtime_context().get_node_id():
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise UserError(
                f"{address.section}.port: cannot listen on {address}: {error.strerror}; "
                f"give another {address.section}.port"
            ) from error
