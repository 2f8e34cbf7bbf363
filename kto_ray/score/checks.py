"""Whether the scorers that a configuration asks for are there; `preflight.py` asks here. Builds none of them."""

from collections.abc import Mapping

from kto_ray.config import ScorerPoolSettings
from kto_ray.errors import UserError
from kto_ray.score.environments.finding import interpreter
from kto_ray.score.scorers import load_scorer


def check(scorers: Mapping[str, ScorerPoolSettings], field: str = "label.scorers") -> None:
    """Raises UserError: a scorer that cannot be imported, or an environment that cannot be used."""
    for name, settings in scorers.items():
        load_scorer(settings.scorer or name, f"{field}.{name}")
        try:
            if settings.env:
                interpreter(settings.env)
        except UserError as error:
            raise UserError(f"{field}.{name}.env: {error}") from error
