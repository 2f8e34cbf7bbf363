"""The pages of a run that goes on, served by the run itself: `watch.port`, on Ray Serve beside people's page.

    loop.py, offline/loop.py -> OwnPage -> web/deployment.py: a replica -> the run's folder

Without a port nothing is deployed, and nothing of the pages is imported.
"""

from functools import partial
from typing import Any

import ray
from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.people.address import base_url, open_to_others, route_prefix
from kto_ray.serving import application_name, deploy, end_applications
from kto_ray.storage import Storage
from kto_ray.watch.door import new_door

PATH = "/watch"
"""Below where the run's pages lie; Serve gives a request to the application with the longest prefix."""


class OwnPage:
    """See the module.

    Args:
        run: the run's folder, opened.
        console: where the link is printed.
    """

    def __init__(self, config: RunConfig, run: Storage, console: Console) -> None:
        self.config, self.settings, self.run, self.console = config, config.watch, run, console
        self._name = ""  # of its application, once that is started

    async def start(self) -> None:
        """Serve the pages, and print the link; nothing without `watch.port`."""
        if self.settings.port is None:
            return
        from kto_ray.watch.web.deployment import watch_application

        link, secret = new_door(base_url(self.settings, self.run) + PATH, self.settings.link_days)
        self._name = application_name(self.run, "watch")
        # On this node, where the folder that is written is known to be seen.
        node = ray.get_runtime_context().get_node_id()
        page = partial(watch_application, self.run.uri, self.settings, secret, node)
        await deploy("watch: the pages", page, self._name, route_prefix(self.run) + PATH)
        self._say(f"watch the run: {link}")
        warning = open_to_others(self.settings, "watch.host")
        if warning and self.config.listens and self.config.listens.section == "watch":  # else it is said of people's
            self._say(warning, style="yellow")

    def _say(self, text: str, **how: Any) -> None:
        self.console.print(text, markup=False, highlight=False, **how)

    def close(self) -> None:
        if self._name:
            end_applications([self._name])
