"""The `Labeler` protocol.

The loop submits samples as they are drawn, hands on what scorers say of them as they say it, and collects verdicts as
they come, of whatever round: a function that answers in 10 ms and a person who answers in two days fit alike.
`threshold_labeler.py`, `people/labeler.py` and `feedback/labeler.py` are the built-in labelers; `check/` tries one's
own class.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kto_ray.records import Score, Verdict
from kto_ray.samples import Samples


class Labeler(Protocol):
    """Turns samples and their scores into verdicts, in its own time. Subclass it to inherit what you do not need.

    All methods are called from the loop's one thread. Answers may come in any order, after any time, also in a later
    run of the process: a labeler that remembers over restarts must give a verdict on every submitted sample once, and
    one that does not is given unjudged samples again (`submit` is idempotent by sample id).
    """

    name: str
    whole_rounds: bool = False
    """Whether a verdict depends on the other samples of its round. After a crash such a labeler is given all samples of
    the open round again, and others those without a verdict."""

    async def start(self, memory: Mapping[str, Any]) -> None:
        """Get ready; called once, before anything else. `memory` is what the last sealed round kept, or {}."""
        return  # a body, for those who inherit it

    async def submit(self, samples: Samples) -> None:
        """Take samples to judge, as soon as they are drawn, and return at once.

        They are a sequence of records; `await samples.pixels_BHWC()` fetches their pixels, uint8 of shape (B, H, W, 3).
        """

    async def scored(self, stage: str, scores: Sequence[Score]) -> None:
        """Take what the run's scorers, if it has any, say of samples that were submitted, and return at once.

        Called again and again while a round (`SampleRecord.stage`) is made, with scores in any order: those of held-out
        scorers and failed ones included. A scorer that is slow, or hangs, keeps no sample from being judged.
        """
        return  # a body, for those who inherit it

    async def finish(self, stage: str) -> None:
        """No more samples or scores of this round will come: verdicts that need all of it can be found."""
        return  # a body, for those who inherit it

    async def collect(self) -> Sequence[Verdict]:
        """Wait for verdicts and give them, each once. Cancelling the call must lose none."""
        raise NotImplementedError

    async def enough(self, stage: str) -> None:
        """Wait until this finished round may be sealed although verdicts are missing; by default, for ever."""
        await asyncio.Event().wait()

    async def seal(self, stage: str) -> Sequence[Verdict]:
        """Give the verdicts that this round is to be sealed with and that were not collected.

        Called once there is a verdict on every sample, or enough, or the deadline has come; verdicts that come later
        belong to a later round. A crash may come between this call and the seal: asked again, it gives the same.
        """
        return ()

    def status(self, stage: str) -> str:
        """What it waits for, in a few words for whoever watches the run."""
        return "verdicts"

    def figures(self, stage: str) -> Mapping[str, float]:
        """What to log of a round that is about to be sealed, for instance its threshold."""
        return {}

    def memory(self) -> Mapping[str, Any]:
        """JSON kept with the round that is about to be sealed; `start` of the process that continues is given it."""
        return {}

    async def close(self) -> None:
        """Give back what `start` took."""
        return  # a body, for those who inherit it
