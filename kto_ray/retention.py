"""What a run needs no more leaves its folder, beside the rounds and never in their way.

    loop.py --published--> a thread --> policies.py: weights of all but the last `keep_policies` go

Who still needs a policy, and why the last two are enough: generators draw with the newest, or the one before while
they run ahead; evaluations and train workers that start again ask for the newest; a rewinding, and a checkpoint that
stands in for a damaged one, for one as old as the checkpoints that are kept, of which there are no more
(`config/run.py` sees to that).
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.policies import PolicyStore

logger = logging.getLogger(__name__)


class Retention:
    """Removes, one thing after the other, in a thread of its own. What cannot be removed stays, and is said."""

    def __init__(self, config: RunConfig, policies: PolicyStore) -> None:
        self._keep, self._policies = config.keep_policies, policies
        self._newest = 0
        self._first = 1  # versions before it have been let go
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retention")

    def published(self, version: int) -> None:
        """Let go of what nobody needs once this policy is published. Does not wait for it."""
        if self._keep != "all":
            self._newest = version
            self._thread.submit(self._drop_policies, self._keep)

    def _drop_policies(self, keep: int) -> None:
        first = self._newest - keep + 1
        if first <= self._first:
            return  # as for the rounds that a continued run only walks past
        try:
            self._policies.drop_before(first)
        except Exception as error:
            unexpected = not isinstance(error, UserError)
            logger.warning("policies before %d could not be removed: %s", first, error, exc_info=unexpected)
        else:
            self._first = first

    async def close(self) -> None:
        """Wait until what is let go is gone."""
        await asyncio.to_thread(self._thread.shutdown)
