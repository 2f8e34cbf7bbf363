"""What people see: the way in, the page on which images are judged, the operator's overview, and why a door is shut.

The pages are rendered here and kept alive by the scripts in `static/`, which call `api.py`.
"""

import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi import Path as PathField
from fastapi.responses import HTMLResponse, RedirectResponse

from kto_ray.people.desk import Desk
from kto_ray.people.people import Refused, Role
from kto_ray.people.web import wire
from kto_ray.people.web.api import IMMUTABLE, PNG
from kto_ray.people.web.entrance import Entrance, OperatorsBadge, TheDesk, TheEntrance

HERE = Path(__file__).parent
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STATIC = {file.name: (file.read_bytes(), TYPES[file.suffix]) for file in sorted((HERE / "static").iterdir())}
"""Read once: no request ever reaches the file system."""
MISSING = "–"  # noqa: RUF001  a dash stands for no figure

router = APIRouter(include_in_schema=False)


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def ago(at: float | None) -> str:
    """How long something is over, for people."""
    if at is None:
        return "never"
    seconds = max(0, int(time.time() - at))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return "just now" if seconds < 10 else f"{seconds // 10 * 10} s ago"


templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.globals |= {
    "MISSING": MISSING,
    "states": {"drawing": "images are being drawn", "open": "being judged", "sealed": "complete"},
}
templates.filters |= {"percent": percent, "ago": ago}


def page(request: Request, template: str, status: int = HTTPStatus.OK, **values: Any) -> HTMLResponse:
    """Render a template; `to_root` leads from this page to the run's address, wherever a proxy has put it."""
    root_path = request.scope.get("root_path", "")
    path = request.scope["path"].removeprefix(root_path)
    to_root = "../" * (path.count("/") - 1) or "./"
    html = templates.get_template(template).render(to_root=to_root, run=root_path.strip("/"), **values)
    return HTMLResponse(html, status)


def shut_door(request: Request, status: int, message: str) -> HTMLResponse:
    """A page that shows nothing but why there is nothing to see."""
    titles = {401: "A link is needed", 403: "Not for you", 404: "Nothing here", 429: "Too fast"}
    title, advice = titles.get(status, "That did not work"), ""
    if status == HTTPStatus.UNAUTHORIZED:
        advice = "Whoever runs this can send you one that works."
    return page(request, "message.html.j2", status, title=title, message=message, advice=advice)


@router.get("/enter/{token}")
async def enter(request: Request, token: str, entrance: TheEntrance, desk: TheDesk) -> Response:
    badge = entrance.admit(request, token)
    _, role = await desk.role(badge.id)
    if role == "application":
        raise Refused("application", "this is the application's token; programs send it as Authorization: Bearer TOKEN")
    if role == "labeler":
        await desk.turn(badge.id, 0)  # refuses who is excluded
    response = RedirectResponse("../" if role == "labeler" else "../overview", HTTPStatus.SEE_OTHER)
    entrance.let_in(request, response, role, token, badge)
    return response


async def visitor(request: Request, entrance: Entrance, desk: Desk, role: Role) -> dict[str, Any]:
    """What a page needs to know of who looks at it. Raises Refused, who has another role included."""
    other: Role = "operator" if role == "labeler" else "labeler"
    badge = entrance.caller(request, (role, other), None, None)
    name, found = await desk.role(badge.id)
    if found != role:
        raise Refused("operator", f"this page is for {role}s, and your link is one for {found}s")
    return {"badge": badge.id, "name": name, "form_token": entrance.signer.form_token(badge)}


@router.get("/")
async def judge(request: Request, entrance: TheEntrance, desk: TheDesk) -> Response:
    who = await visitor(request, entrance, desk, "labeler")
    await desk.turn(who["badge"], 0)  # refuses who is excluded
    return page(request, "judge.html.j2", lease_s=request.app.state.lease_s, **who)


@router.get("/overview")
async def overview(request: Request, entrance: TheEntrance, desk: TheDesk) -> Response:
    who = await visitor(request, entrance, desk, "operator")
    return page(request, "overview.html.j2", data=await desk.overview(who["badge"]), **who)


@router.get("/overview/{item}.png")
async def thumbnail(item: Annotated[wire.Item, PathField()], me: OperatorsBadge, desk: TheDesk) -> Response:
    """Beside `api/images`, which goes by the labeler's cookie where a browser has both."""
    return Response(await desk.image(me, item), media_type=PNG, headers=IMMUTABLE)


def add_static(router: APIRouter, files: Mapping[str, tuple[bytes, str]]) -> None:
    """Serve these files, of which the contents and types are given by name."""

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        content, media_type = files[name]
        return Response(content, media_type=media_type)


add_static(router, STATIC)
