"""Where a run's people are found: the database behind the queue, and the addresses of its pages."""

import ipaddress
from typing import Protocol

import sqlalchemy as sa

from kto_ray.config.people import Human
from kto_ray.errors import UserError
from kto_ray.naming import unique_name
from kto_ray.secrets import HIDDEN, fill
from kto_ray.storage import Storage


def database_url(human: Human, run: Storage) -> str:
    """`label.human.database`, or a SQLite file in the run's folder.

    Raises:
        UserError: the folder is not on this machine, where a SQLite file must be, or the password is not at hand.
    """
    if human.database is not None:
        field, given = "label.human.database", human.database.get_secret_value()
        url = fill(given, field)
        if HIDDEN in url:
            raise UserError(
                f"{field}: the password of {given} is not kept in the run's folder; name an environment variable in "
                "its place, as in postgresql+psycopg://user:$PASSWORD@host/name, when the run is started the next time"
            )
        return url
    if run.local is None:
        raise UserError(
            f"label.human.database: {run} is not a local folder, so that people's answers need a database of their "
            "own; give for instance postgresql+psycopg://user@host/name"
        )
    # Not pasted together: a folder's name may hold what has a meaning in a URL.
    return sa.URL.create("sqlite", database=str(run.local / "people.sqlite")).render_as_string()


def database_owner(human: Human, run: Storage) -> str:
    """Whose database it says that it is: a file in the run's folder is the run's, wherever the folder is moved."""
    return run.uri if human.database is not None else "the run in this folder"


def route_prefix(run: Storage) -> str:
    """Under which a run's page lies: several runs, also of one name, may share a cluster."""
    return f"/{unique_name(run)}"


class Listening(Protocol):
    """What of a page's settings is asked for here."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int | None: ...

    @property
    def public_url(self) -> str | None: ...


def origin(page: Listening) -> str:
    """What all addresses of a server begin with, without a slash at its end."""
    host = f"[{page.host}]" if ":" in page.host else page.host
    return (page.public_url or f"http://{host}:{page.port}").rstrip("/")


def base_url(page: Listening, run: Storage) -> str:
    """What the run's links begin with, without a slash at its end."""
    return origin(page) + route_prefix(run)


def open_to_others(page: Listening, field: str) -> str:
    """A warning; empty where only programs of the same machine reach the page. `field`: that says where it listens."""
    if is_loopback(page.host):
        return ""
    return (
        f"{field}: the page listens on {page.host}:{page.port}, where other machines reach it without encryption; put "
        "HTTPS in front of it (docs/labeling_api.md)"
    )


def is_loopback(host: str) -> bool:
    """Whether only programs of the same machine reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
