"""The app: routes, the guard around them, and what refusals look like to programs and to people.

It works on a `Desk`, in this process (tests) or behind an actor's handle (`deployment.py`).
"""

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import kto_ray
from kto_ray.config.people import Human
from kto_ray.errors import UserError
from kto_ray.people.access import Signer
from kto_ray.people.desk import Desk
from kto_ray.people.people import Refused
from kto_ray.people.web import api, pages
from kto_ray.people.web.entrance import Entrance
from kto_ray.people.web.guard import Guard

STATUS = {
    **dict.fromkeys(("badge", "expired", "revoked"), HTTPStatus.UNAUTHORIZED),
    **dict.fromkeys(("excluded", "operator", "application"), HTTPStatus.FORBIDDEN),
    "item": HTTPStatus.NOT_FOUND,
    "verdict": HTTPStatus.UNPROCESSABLE_ENTITY,
    **dict.fromkeys(("lease", "taken", "answered", "sealed", "undo"), HTTPStatus.CONFLICT),
}
"""By `Refused.why`."""

DESCRIPTION = """People judge images through this. Every call carries a badge: `Authorization: Bearer TOKEN`, where
TOKEN is the part of a link after `/enter/`. What is refused comes as JSON with `why` (for programs) and `message`."""


def create_app(desk: Desk, settings: Human, signer: Signer) -> FastAPI:
    """Put it together. It may lie under any path: the server says so in ASGI's `root_path`."""
    app = FastAPI(
        title="kto-ray labeling",
        description=DESCRIPTION,
        version=kto_ray.__version__,
        openapi_url=None,  # the usual pages load scripts from elsewhere; `api.openapi` gives the description
        redirect_slashes=False,
    )
    app.state.desk, app.state.entrance, app.state.lease_s = desk, Entrance(signer, settings), settings.lease_s
    app.include_router(api.router)
    app.include_router(pages.router)
    with_manners(app)
    return app


def with_manners(app: FastAPI) -> None:
    """The guard, and how it is said what is refused: in JSON to who calls `api/`, on a page to all others."""
    app.add_middleware(Guard)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)


def _refuse(request: Request, status: int, why: str, message: str, headers: dict[str, str] | None = None) -> Response:
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    if path.startswith("/api/"):
        return JSONResponse({"why": why, "message": message}, status, headers)
    response = pages.shut_door(request, status, message)
    response.headers.update(headers or {})
    return response


def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _refuse(request, STATUS[error.why], error.why, error.message)


def _on_user_error(request: Request, error: Exception) -> Response:
    """Nobody of this name: the one that a desk raises here. Behind an actor's handle its cause carries the message."""
    return _refuse(request, HTTPStatus.NOT_FOUND, "name", str(error.args[0]))


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    headers = dict(error.headers or {})
    return _refuse(request, error.status_code, getattr(error, "why", phrase), str(error.detail).lower(), headers)


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if any(problem["loc"][0] == "path" for problem in problems):
        return _refuse(request, HTTPStatus.NOT_FOUND, "item", "there is no such image")
    message = "; ".join(f"{_field(problem['loc'])}: {problem['msg'].lower()}" for problem in problems)
    return _refuse(request, HTTPStatus.UNPROCESSABLE_ENTITY, "request", message)


def _field(location: tuple[int | str, ...]) -> str:
    """A field as a user writes it: without "body", which is the whole of it."""
    return ".".join(str(part) for part in location[1:]) or "the body"
