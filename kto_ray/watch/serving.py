"""`kto-ray watch` as a server of its own: one process, no Ray, a link that ends with it.

The badge is signed with a secret that nobody else has and that is kept nowhere: whoever has the link may look, until
the process ends. It is asked for on loopback, too, where other people of the same machine and pages of other sites in
the same browser can call.
"""

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import uvicorn

from kto_ray.errors import UserError
from kto_ray.people.access import Signer, link
from kto_ray.people.address import is_loopback
from kto_ray.people.people import Badge
from kto_ray.people.web.entrance import Entrance
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.web.app import create_app
from kto_ray.watch.web.pages import named


@dataclass(frozen=True)
class WatchPage:
    """How the page is served.

    Args:
        port: None is any that is free.
        public_url: what the link begins with; None: http://host:port.
        link_days: after so many the link no longer works.
        requests_per_minute: more are told to wait. Each small picture is one.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    public_url: str | None = None
    link_days: float = 30
    requests_per_minute: int = 6000


class Server:
    """Listens from its making on; answers while `run` runs, which returns after `stop` or a signal.

    Raises:
        UserError: it cannot listen there.
    """

    def __init__(self, runs: Sequence[WatchedRun], settings: WatchPage) -> None:
        host, self._socket = settings.host, socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, settings.port or 0))
        except OSError as error:
            self._socket.close()
            raise UserError(
                f"--port: cannot listen on {host}:{settings.port}: {error.strerror or error}; give another --port"
            ) from error
        port = self._socket.getsockname()[1]
        base = settings.public_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"
        signer = Signer(secrets.token_hex(32))
        badge = Badge(secrets.token_urlsafe(16), time.time() + settings.link_days * 24 * 3600)
        self.link = link(base.rstrip("/"), signer.token(badge))
        # Browsers send cookies to all ports of a machine.
        entrance = Entrance(signer, settings, {"operator": f"kto_ray_watch_{port}"})
        app = create_app(named(runs), entrance)
        self._server = uvicorn.Server(
            uvicorn.Config(app, ws="none", lifespan="off", log_level="warning", access_log=False)
        )

    def run(self) -> None:
        with self._socket:
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True


def watch(runs: Sequence[WatchedRun], settings: WatchPage, say: Callable[[str], None]) -> None:
    """Serve until somebody presses Ctrl-C. Raises UserError."""
    server = Server(runs, settings)
    say(f"watch: {server.link}")
    if not is_loopback(settings.host):
        say(
            f"--host: the page listens on {settings.host}, where other machines reach it without encryption; put HTTPS "
            "in front of it (docs/labeling_api.md)"
        )
    say("Ctrl-C ends it; runs go on")
    server.run()
