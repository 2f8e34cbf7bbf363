"""The `Labeler` and `Scorer` protocols, and how a plug-in is found by its dotted path.

The loop scores samples as they are generated, submits them with their scores, and collects verdicts as they come, of
whatever round: a function that answers in 10 ms and a person who answers in two days fit alike. `threshold_labeler.py`
and `people/labeler.py` are the built-in labelers, `scorers/` has the built-in scorers; `kto-ray check` (`contract.py`)
tries one's own class.
"""

import asyncio
import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kto_ray.errors import UserError
from kto_ray.records import Prompt, Sample, Score, Verdict


class Scorer(Protocol):
    """Says how good images are. Built inside the actor that runs it, from keyword arguments of the configuration."""

    name: str
    version: str

    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> Sequence[float]:
        """One finite float an image, in order; higher is better. May raise: a failure is stored as such.

        Args:
            images_BHWC: uint8 RGB of shape (B, H, W, 3), as they were drawn; read-only. B may be 0.
            prompts: B prompts.
        """


class BatchFailed(Exception):  # noqa: N818  it says what happened to the batch
    """Raised by a scorer when nothing about single images is wrong, for instance a server that does not answer.

    The whole batch fails at once; other exceptions have its images tried one by one, so that one bad image costs one
    score.
    """


def check_batch(images_BHWC: npt.NDArray[Any], prompts: Sequence[Prompt]) -> None:
    """Raises ValueError when images are not uint8 RGB of shape (B, H, W, 3), or prompts are not as many."""
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[3] != 3:
        raise ValueError(
            f"images must be uint8 of shape (B, height, width, 3), not {images_BHWC.dtype} of shape {images_BHWC.shape}"
        )
    if len(images_BHWC) != len(prompts):
        raise ValueError(f"{len(images_BHWC)} images with {len(prompts)} prompts: there must be one for each")


LABELERS: dict[str, str] = {
    "threshold": "kto_ray.label.threshold_labeler:ThresholdLabeler",
    "human": "kto_ray.people.labeler:HumanLabeler",
}
"""The built-in labelers by name."""


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

    async def submit(self, samples: Sequence[Sample], scores: Sequence[Score] = ()) -> None:
        """Take samples to judge, and return at once.

        `scores` are what the run's scorers, if it has any, say of these samples: held-out scorers and failed scores
        included.
        """

    async def finish(self, stage: str) -> None:
        """No more samples of this round (`Sample.stage`) will come: verdicts that need all of it can be found."""
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


def load_plugin(kind: str, path: str, built_in: Mapping[str, str], functions: bool = False) -> Any:
    """The class (with `functions`, or function) that a name of `built_in` or `package.module:Name` stands for.

    Raises:
        UserError: unknown name (suggests the nearest), module that cannot be imported, or attribute that is not there.
    """
    dotted = built_in.get(path, path)
    module_name, separator, attribute = dotted.partition(":")
    if not separator:
        close = difflib.get_close_matches(path, built_in, n=1)
        suggestion = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{kind}: unknown name {path!r}{suggestion}; built in: {', '.join(sorted(built_in))}; "
            "or give your own class as 'package.module:Name'"
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(f"{kind}: cannot import {module_name!r} of {path!r}: {error}") from error
    plugin = getattr(module, attribute, None)
    if not inspect.isclass(plugin) and not (functions and callable(plugin)):
        raise UserError(
            f"{kind}: module {module_name!r} has no class {'or function ' if functions else ''}{attribute!r}"
        )
    return plugin
