"""Who is calling: badges out of cookies and headers, and what is refused before the desk is asked.

`api.py` and `pages.py` take `LabelersBadge`, `OperatorsBadge` or `AnyBadge`: the id of a badge whose signature and date
are right. Whether it was revoked since, and whether it opens this door, the desk says at every call.
"""

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Literal, Protocol, cast
from urllib.parse import quote, urlsplit

from fastapi import Depends, HTTPException, Request, Response, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from kto_ray.people.access import Signer
from kto_ray.people.address import is_loopback
from kto_ray.people.desk import Desk
from kto_ray.people.people import Badge, Refused, Role

COOKIES: dict[Role, str] = {"labeler": "kto_ray_labeler", "operator": "kto_ray_operator"}
"""One for each role: whoever runs it all may label, too, in the same browser."""
FAILURES_PER_MINUTE = 20
"""So many tokens that do not work may come from one address."""

bearer_header = HTTPBearer(auto_error=False, description="The part of a link after `/enter/`.")
form_header = APIKeyHeader(
    name="X-Form-Token",
    auto_error=False,
    description="Only for the run's own page, which sends its badge in a cookie; not needed with a bearer token.",
)


class Denied(HTTPException):
    """Refused before the desk was asked; `why` is a word for programs, as with `Refused`."""

    def __init__(self, status: int, why: Literal["form", "site", "rate"], message: str, wait_s: float = 0) -> None:
        super().__init__(status, message, {"Retry-After": str(max(1, round(wait_s)))} if wait_s else None)
        self.why = why


class Manners(Protocol):
    """What of a page's settings is asked for here."""

    @property
    def public_url(self) -> str | None: ...

    @property
    def requests_per_minute(self) -> int: ...


class Entrance:
    """Reads badges, and counts who asks too often.

    Args:
        cookies: the names of those that carry badges; a page of another kind, or port, must not take them for its own.
    """

    def __init__(self, signer: Signer, settings: Manners, cookies: Mapping[Role, str] = COOKIES) -> None:
        self.signer, self.settings, self.cookies = signer, settings, cookies
        self._public = urlsplit(settings.public_url or "")
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._requests = RateLimitItemPerMinute(settings.requests_per_minute)
        self._failures = RateLimitItemPerMinute(FAILURES_PER_MINUTE)

    def admit(self, request: Request, token: str) -> Badge:
        """The badge of a token. Raises Refused; Denied, when too many came."""
        try:
            badge = self.signer.badge(token)
        except Refused:
            self._count(self._failures, f"address {_address(request)}")
            raise
        self._count(self._requests, f"badge {badge.id}")
        return badge

    def _count(self, limit: RateLimitItem, whose: str) -> None:
        if not self._limiter.hit(limit, whose):
            wait_s = self._limiter.get_window_stats(limit, whose).reset_time - time.time()
            raise Denied(HTTPStatus.TOO_MANY_REQUESTS, "rate", "too many requests; wait a little", max(1, wait_s))

    def caller(self, request: Request, roles: tuple[Role, ...], bearer: str | None, form: str | None) -> Badge:
        """Whose request it is: by bearer token, or by the cookie of the first of these roles that has one.

        With a cookie, what changes something must show that it was our page that sent it.
        """
        if bearer is not None:
            return self.admit(request, bearer)
        names = [self.cookies[role] for role in roles if role in self.cookies]
        tokens = [request.cookies[name] for name in names if name in request.cookies]
        if not tokens:
            raise Refused("badge", "a link is needed to come in here; ask the operator for one")
        badge = self.admit(request, tokens[0])
        if request.method not in ("GET", "HEAD") and not self.signer.is_form_of(badge, form or ""):
            raise Denied(HTTPStatus.FORBIDDEN, "form", "the header X-Form-Token is missing or wrong; reload the page")
        return badge

    def let_in(self, request: Request, response: Response, role: Role, token: str, badge: Badge) -> None:
        """Have the browser send the token from now on, to this run's pages only."""
        response.set_cookie(
            self.cookies[role],
            token,
            max_age=max(0, int(badge.expires_at - time.time())),
            # Quoted, for a browser compares it with the path as it is sent.
            path=quote(self._public.path.rstrip("/"), safe="/%") + quote(request.scope.get("root_path", "")) or "/",
            secure=self._public.scheme == "https",
            httponly=True,
            samesite="lax",  # strict would lose it on the redirect that follows a link in a mail
        )


def _address(request: Request) -> str:
    """Of the client. A proxy on this machine is believed when it says whom it calls for."""
    direct = request.client.host if request.client else ""
    forwarded = request.headers.get("X-Forwarded-For", "").rsplit(",", 1)[-1].strip()
    return forwarded if forwarded and is_loopback(direct) else direct


def the_desk(request: Request) -> Desk:
    return cast(Desk, request.app.state.desk)


def the_entrance(request: Request) -> Entrance:
    return cast(Entrance, request.app.state.entrance)


TheDesk = Annotated[Desk, Depends(the_desk)]
TheEntrance = Annotated[Entrance, Depends(the_entrance)]


class _Caller:
    """The dependency that gives a caller's badge; see `Entrance.caller`."""

    def __init__(self, *roles: Role) -> None:
        self.roles = roles

    def __call__(
        self,
        request: Request,
        entrance: TheEntrance,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(bearer_header)],
        form: Annotated[str | None, Security(form_header)],
    ) -> str:
        return entrance.caller(request, self.roles, bearer.credentials if bearer else None, form).id


LabelersBadge = Annotated[str, Depends(_Caller("labeler", "operator"))]
ApplicationsBadge = Annotated[str, Depends(_Caller())]  # no browser's: it has no cookie
OperatorsBadge = Annotated[str, Depends(_Caller("operator", "labeler"))]
AnyBadge = LabelersBadge


def same_site(request: Request) -> None:
    """Refuse what another site's page makes a browser send; other programs say nothing of sites."""
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise Denied(HTTPStatus.FORBIDDEN, "site", "pages of other sites may not call this")
