"""The pages on Ray Serve: one replica, which reads the run's folder. `own_page.py` deploys it."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from kto_ray.config import WatchPage
from kto_ray.people.access import Signer
from kto_ray.people.web.entrance import Entrance
from kto_ray.serving import QUIET
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.web.app import create_app
from kto_ray.watch.web.pages import named


@serve.ingress()
class WatchReplica:
    """Serve asks it for its app."""

    def __init__(self, uri: str, settings: WatchPage, secret: str) -> None:
        self._uri, self._settings, self._secret = uri, settings, secret

    def __serve_build_asgi_app__(self) -> FastAPI:
        # The cookie's path is the run's own, so that one name does for all.
        entrance = Entrance(Signer(self._secret), self._settings, {"operator": "kto_ray_watch"})
        return create_app(named([WatchedRun(self._uri)]), entrance)


def watch_application(uri: str, settings: WatchPage, secret: str, node: str) -> Application:
    """For `serve.run`; the pages lie under the route prefix that is given there.

    Args:
        uri: of the run's folder.
        secret: what the link is signed with.
        node: id of the one that it is to run on.
    """
    deployment: Any = serve.deployment(WatchReplica)
    application: Application = deployment.options(
        num_replicas=1,  # requests are counted, and small pictures kept, in the replica's memory
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": node}},
        graceful_shutdown_timeout_s=2,
        logging_config=QUIET,
    ).bind(uri, settings, secret)
    return application
