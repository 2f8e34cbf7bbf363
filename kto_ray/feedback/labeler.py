"""An application as a `Labeler`: publishes the images of a round, and counts what its users say of them.

    loop.py -> FeedbackLabeler -> Publisher -> folder or bucket -> the application shows images
                   |                                                     | its users vote
                   +-> Desk (people's queue) <- a table that is looked at, or POST api/votes

The queue, its database, the seal, late votes, scorers for the rest and the operator's page are those of `HumanLabeler`;
only the door is another one. What cannot be read now is said, and read later.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence

from rich.console import Console

from kto_ray.concurrency import cancelled, together
from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.feedback.checks import table_of_votes
from kto_ray.feedback.publishing import Publisher, name_of, publishing_folder
from kto_ray.feedback.understanding import NewVotes
from kto_ray.people.access import Signer
from kto_ray.people.intake import target_of
from kto_ray.people.labeler import HumanLabeler
from kto_ray.people.terms import NewItem
from kto_ray.people.votes import APPLICATION, Outcome, Outcomes
from kto_ray.records import Verdict
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

LOST: dict[Outcome, str] = {
    "unknown_image": "are on images that this run did not publish",
    "too_late": "came after their image's round was sealed with a verdict",
    "excluded": "are of people who were excluded",
    "odd": "cannot be understood",
}
"""What is said of votes that come to nothing."""


class FeedbackLabeler(HumanLabeler):
    """See the module.

    Args:
        run: the run's folder.
        console: where it is said how votes are sent.
    """

    name = "feedback"

    def __init__(self, config: RunConfig, run: Storage, console: Console) -> None:
        super().__init__(config, run, console)
        self.feedback = config.label.feedback
        self.publisher = Publisher(publishing_folder(self.feedback.folder, run), self.feedback.format)
        self.table = table_of_votes(self.feedback)
        self._outcomes = Outcomes()  # since the last seal
        self._trouble = ""
        self._turn = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def _invite(self, base: str, signer: Signer) -> None:
        token = signer.token(await self.desk.badge_of(APPLICATION, "application"))
        self._say(f"images are published to: {self.publisher.folder}")
        if self.table:
            found = (await asyncio.to_thread(self.table.check)).of
            columns = ", ".join(f"{what}={column}" for what, column in found.items())
            self._say(f"votes are looked for in: {self.table.where}" + (f" ({columns})" if columns else ""))
        self._say(f"votes are taken at: {base}/api/votes (Authorization: Bearer {token})")

    async def _show(self, stage: str, new: Sequence[NewItem]) -> None:
        names = await self.desk.announce({item.sample_id: name_of(item) for item in new})
        if left := [item for item in new if item.sample_id in names]:
            await asyncio.to_thread(self.publisher.publish, stage, left, names)
            await self.desk.is_out(list(names.values()))

    async def enough(self, stage: str) -> None:
        async with together() as group:
            looking = group.create_task(self._keep_looking())
            await super().enough(stage)
            looking.cancel()

    async def seal(self, stage: str) -> Sequence[Verdict]:
        await self._look()  # what is there now belongs to this round
        verdicts = await super().seal(stage)
        counts = self._outcomes.counts
        self._figures[stage] |= {f"feedback/{outcome}": number for outcome, number in sorted(counts.items())}
        self._outcomes = Outcomes()
        return verdicts

    async def _keep_looking(self) -> None:
        while True:
            self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)  # what was read has to be counted
            await asyncio.sleep(self.feedback.poll_s)

    async def _look(self) -> None:
        """Count what is new. A table that cannot be read now is said to be so, and looked at again."""
        async with self._turn:
            self._count(await self.desk.sent())
            new = self.table.read(await self.desk.position()) if self.table else iter(())
            while (some := await self._next(new)) is not None:
                self._count(await self.desk.take(some.votes, some.position))
                self._count(some.odd)

    async def _next(self, new: Iterator[NewVotes]) -> NewVotes | None:
        """Some votes; None: there are no more, or they cannot be read now."""
        try:
            some = await asyncio.to_thread(next, new, None)
        except UserError as error:
            if str(error) != self._trouble:
                logger.warning("%s; looking again every %g s", error, self.feedback.poll_s)
            self._trouble = str(error)
            return None
        if some is None:
            if self._trouble:
                logger.warning("votes can be read again")
            self._trouble = ""
        return some

    def _count(self, outcomes: Outcomes) -> None:
        """Say, once a round, which votes come to nothing."""
        for outcome, what in LOST.items():
            if outcomes.counts[outcome] and not self._outcomes.counts[outcome]:
                examples = ", ".join(outcomes.examples[outcome])
                logger.warning("votes %s, for instance: %s (feedback/%s counts them)", what, examples, outcome)
        self._outcomes.update(outcomes)

    def status(self, stage: str) -> str:
        round_ = self._rounds.get(stage)
        standing = round_.standing if round_ else None
        if standing is None:
            return "the application's votes"
        target = target_of(self.human, standing.asked, finished=True)
        lost = sum(self._outcomes.counts[outcome] for outcome in LOST)
        return (
            f"the application's votes: {standing.judged} of {standing.asked} images answered by {standing.answers} "
            f"votes, {target} needed"
            + (f"; votes that came to nothing: {lost}" if lost else "")
            + (f"; {self._trouble}" if self._trouble else "")
        )

    async def close(self) -> None:
        if self._looking:
            await cancelled([self._looking])
        await super().close()
