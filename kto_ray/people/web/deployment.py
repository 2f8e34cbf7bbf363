"""The page on Ray Serve: one replica, which talks to the desk's actor.

`labeler.py` runs it; Serve's proxy is the only thing that listens on the network, where `serving.py` says.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from kto_ray.config.people import Human
from kto_ray.people.access import Signer
from kto_ray.people.desk import remote_desk
from kto_ray.people.web.app import create_app
from kto_ray.serving import QUIET


@serve.ingress()
class Page:
    """A replica; Serve asks it for its app."""

    def __init__(self, desk: Any, settings: Human, secret: str) -> None:
        self._desk, self._settings, self._secret = desk, settings, secret

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(remote_desk(self._desk), self._settings, Signer(self._secret))


def page_application(desk: Any, settings: Human, secret: str) -> Application:
    """For `serve.run`; the page lies under the route prefix that is given there.

    Args:
        desk: handle of the actor.
        secret: what links are signed with.
    """
    deployment: Any = serve.deployment(Page)
    application: Application = deployment.options(
        num_replicas=1,  # requests are counted in the replica's memory
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2,
        logging_config=QUIET,
    ).bind(desk, settings, secret)
    return application
