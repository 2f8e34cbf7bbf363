"""Around the whole app: what every response says to browsers, how much a request may carry, and what faults look like.

Plain ASGI, so that it holds for error pages, images and static files alike.
"""

import json
import logging
from http import HTTPStatus
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MOST_BYTES = 16 * 1024
"""Of a request's body, ..."""
MOST_BYTES_OF = {"/api/votes": 1024 * 1024}
"""... and of those that carry many things at once."""

SAME = "'self'"
POLICY = {
    "default-src": "'none'",
    "img-src": SAME,
    "style-src": SAME,
    "script-src": SAME,
    "connect-src": SAME,
    "form-action": "'none'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address of a page may be a link that opens it
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """See the module."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            most = MOST_BYTES_OF.get(path, MOST_BYTES)
            body = await _read(receive, most)
            if body is None:
                await _refuse(send_guarded, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "size", f"send {most} bytes at most")
            elif scope["path"] == scope.get("root_path"):  # relative addresses need the slash at the end
                await _redirect(send_guarded, f"./{quote(scope['path'].rsplit('/', 1)[-1])}/")
            else:
                await self.app(scope, _replay(body, receive), send_guarded)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"].partition("/enter/")[0])
            if not started:
                message = "something went wrong on the server; try again"
                await _refuse(send_guarded, HTTPStatus.INTERNAL_SERVER_ERROR, "fault", message)


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body, whatever Content-Length says; None: it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body", False):  # all of it, or the client has left
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _refuse(send: Send, status: HTTPStatus, why: str, message: str) -> None:
    content = json.dumps({"why": why, "message": message}).encode()
    await _respond(send, status, content, {"content-type": "application/json"})


async def _redirect(send: Send, location: str) -> None:
    await _respond(send, HTTPStatus.TEMPORARY_REDIRECT, b"", {"location": location})


async def _respond(send: Send, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": int(status), "headers": raw})
    await send({"type": "http.response.body", "body": content})
