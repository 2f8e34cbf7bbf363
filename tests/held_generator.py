"""A generator that a test can hold up, see `holding.py`; of its own, since it needs torch and scorers do not."""

from pathlib import Path
from typing import Any

from kto_ray.generate import replica
from tests.holding import DRAW, hold


class Generator(replica.Generator):
    """Serve calls a deployment by its class's name, and so does who looks for its processes."""

    def _draw(self, *arguments: Any) -> Any:
        hold(Path(self.config.runs_folder), DRAW)
        return super()._draw(*arguments)
