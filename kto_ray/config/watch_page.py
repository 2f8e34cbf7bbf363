"""What the configuration says of the page on which a run can be watched: `watch`. `kto_ray/watch/` goes by it."""

from typing import Annotated

from pydantic import Field

from kto_ray.identity import Free
from kto_ray.section import Count, Positive, Section


class WatchPage(Section):
    """The page on which a run can be watched while it goes on; without it, `kto-ray watch` shows the same."""

    port: Free[Annotated[int, Field(ge=1, le=65535)] | None] = None
    """Port that the page listens on, on the head of the cluster; None: there is no page. With `label.labeler: human`
    it must be `label.human.port`, and the operator's link opens both pages."""
    host: Free[str] = "127.0.0.1"
    """Address that the page listens on; another than loopback is for a machine behind a proxy with HTTPS."""
    public_url: Free[str | None] = None
    """What links begin with, for instance https://runs.example.org; None: http://host:port."""
    link_days: Free[Positive] = 30
    """After so many days a link no longer works."""
    requests_per_minute: Free[Count] = 6000
    """Of one link; more are told to wait. Each small picture is one."""
