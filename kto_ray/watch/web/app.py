"""The app: pages and pictures of some runs, behind the guard and the entrance of people's page."""

from collections.abc import Mapping

from fastapi import FastAPI

import kto_ray
from kto_ray.people.web.app import with_manners
from kto_ray.people.web.entrance import Entrance
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.thumbnails import Thumbnails
from kto_ray.watch.web import pages


def create_app(runs: Mapping[str, WatchedRun], entrance: Entrance) -> FastAPI:
    """Put it together. It may lie under any path: the server says so in ASGI's `root_path`.

    Args:
        runs: by the name in their addresses, see `pages.named`.
    """
    app = FastAPI(title="kto-ray watch", version=kto_ray.__version__, openapi_url=None, redirect_slashes=False)
    app.state.runs, app.state.entrance, app.state.thumbnails = runs, entrance, Thumbnails()
    app.include_router(pages.router)
    with_manners(app)
    return app
