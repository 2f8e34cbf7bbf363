"""What a run needs no more leaves its folder, beside the rounds and never in their way.

    loop.py --published--> a thread --> policies.py: weights of all but the last `keep_policies` go
            --sealed----->              rounds.py: parts that its tables have, too, and pixels, see `keep_pixels`
            --evaluated-->              pixels of evaluations, but for the base's and the newest

Who still needs a policy, and why the last two are enough: generators draw with the newest, or the one before while
they run ahead; evaluations and train workers that start again ask for the newest; a rewinding, and a checkpoint that
stands in for a damaged one, for one as old as the checkpoints that are kept, of which there are no more
(`config/run.py` sees to that). Nobody needs the pixels of a sealed round: people's are in their database.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kto_ray.cluster import noisily
from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.policies import PolicyStore
from kto_ray.rounds import RoundStore

logger = logging.getLogger(__name__)


class Retention:
    """Removes, one thing after the other, in a thread of its own. What cannot be removed stays, and is said."""

    def __init__(self, config: RunConfig, policies: PolicyStore) -> None:
        self._keep, self._keep_pixels, self._policies = config.keep_policies, config.keep_pixels, policies
        self._cluster = config.cluster
        self._first_policy = 1  # versions before it have been let go
        self._first_round = 0  # with pixels
        self._tidied: int | None = None  # the last round of which all parts but the tables' have been let go
        self._first_evaluation: dict[str, int] = {}  # with pixels, besides the base's, by stage
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retention")

    def published(self, version: int) -> None:
        """Let go of what nobody needs once this policy is published. Does not wait for it."""
        if self._keep != "all":
            self._later(f"policies before {version - self._keep + 1}", self._drop_policies, version - self._keep + 1)

    def sealed(self, rounds: RoundStore, index: int) -> None:
        """The same once this round is sealed."""
        # A crash may have come between the seal of one before and this.
        first = 0 if self._tidied is None else self._tidied + 1
        self._tidied = index
        for number in range(max(first, index - 2), index + 1):
            self._later(f"parts of round {number}", rounds.round(number).tidy)
        if self._keep_pixels != "all":
            self._later("pixels", self._drop_pixels, rounds, index - self._keep_pixels + 1)

    def evaluated(self, evaluation: Evaluation, version: int) -> None:
        """The same once this policy is evaluated."""
        self._later("parts of an evaluation", evaluation.round(version).tidy)
        if self._keep_pixels != "all":
            self._later("pixels", self._drop_evaluated, evaluation, version)

    def _later(self, what: str, remove: Callable[..., None], *arguments: Any) -> None:
        def remove_it() -> None:
            try:
                remove(*arguments)
            except Exception as error:
                unexpected = not isinstance(error, UserError)
                logger.warning("%s could not be removed: %s", what, error, exc_info=unexpected)

        self._thread.submit(remove_it)

    def _drop_policies(self, first: int) -> None:
        if first > self._first_policy:  # a continued run only walks past some
            self._policies.drop_before(first)
            self._first_policy = first

    def _drop_pixels(self, rounds: RoundStore, first: int) -> None:
        for index in range(self._first_round, first):
            rounds.round(index).drop_pixels()
            self._first_round = index + 1

    def _drop_evaluated(self, evaluation: Evaluation, newest: int) -> None:
        for version in range(self._first_evaluation.get(evaluation.stage, 1), newest):
            evaluation.round(version).drop_pixels()
            self._first_evaluation[evaluation.stage] = version + 1

    async def close(self) -> None:
        """Wait until what is let go is gone."""
        async with noisily("what the run needs no more to be removed", self._cluster):
            await asyncio.to_thread(self._thread.shutdown)
