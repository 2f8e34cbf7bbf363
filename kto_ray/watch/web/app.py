"""The app: pages and pictures of some runs, behind the guard and the entrance of people's page."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import kto_ray
from kto_ray.errors import UserError
from kto_ray.people.people import Refused
from kto_ray.people.web.app import STATUS
from kto_ray.people.web.entrance import Entrance
from kto_ray.people.web.guard import Guard
from kto_ray.people.web.pages import shut_door
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
    app.add_middleware(Guard)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    return app


def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return shut_door(request, STATUS[error.why], error.message)


def _on_user_error(request: Request, error: Exception) -> Response:
    """What is asked for is not there (any more), or the run's storage does not answer."""
    return shut_door(request, HTTPStatus.NOT_FOUND, str(error.args[0]))


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = shut_door(request, error.status_code, str(error.detail).lower())
    response.headers.update(error.headers or {})
    return response


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [f"{problem['loc'][-1]}: {problem['msg'].lower()}" for problem in error.errors()]
    return shut_door(request, HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(problems))
