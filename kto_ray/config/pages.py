"""What the configuration says of the pages that a run serves: `watch`, and where people's page and these are found."""

from dataclasses import dataclass

from kto_ray.identity import Free
from kto_ray.section import Count, Port, Positive, Section


@dataclass(frozen=True)
class Address:
    """Where a run's pages are listened for.

    Args:
        section: of the configuration, that says so.
    """

    section: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class WatchPage(Section):
    """Pages on which the run is watched, served by the run itself; `kto-ray watch` shows the same without it."""

    port: Free[Port | None] = None
    """Port that the pages listen on; with people's page that one's, on which they have a path of their own. None: the
    run serves none."""
    host: Free[str] = "127.0.0.1"
    """Address that the pages listen on; another than loopback is for a machine behind a proxy with HTTPS."""
    public_url: Free[str | None] = None
    """What the link begins with, for instance https://runs.example.org; None: http://host:port."""
    link_days: Free[Positive] = 30
    """After so many days the link no longer works; it ends with the job in any case."""
    requests_per_minute: Free[Count] = 6000
    """Of all who have the link; more are told to wait. Each small picture is one."""
