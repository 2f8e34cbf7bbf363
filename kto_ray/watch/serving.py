"""`kto-ray watch` as a server of its own: one process, no Ray, a link that ends with it."""

import socket
from collections.abc import Callable, Sequence

import uvicorn

from kto_ray.config import WatchPage
from kto_ray.errors import UserError
from kto_ray.people.access import Signer
from kto_ray.people.address import open_to_others, origin
from kto_ray.people.web.entrance import Entrance
from kto_ray.watch.door import new_door
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.web.app import create_app
from kto_ray.watch.web.pages import named


class Server:
    """Listens from its making on; answers while `run` runs, which returns after `stop` or a signal.

    Args:
        settings: how the pages are served; without a port, on any that is free.

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
        self.settings = settings.model_copy(update={"port": self._socket.getsockname()[1]})
        self.link, secret = new_door(origin(self.settings), settings.link_days)
        # Browsers send cookies to all ports of a machine.
        entrance = Entrance(Signer(secret), settings, {"operator": f"kto_ray_watch_{self.settings.port}"})
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
    if warning := open_to_others(server.settings, "--host"):
        say(warning)
    say("Ctrl-C ends it; runs go on")
    server.run()
