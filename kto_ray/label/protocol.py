"""The `Labeler` and `Scorer` protocols, and how a plug-in is found by its dotted path.

The loop submits samples as they are generated and collects judgements as they come, of whatever round: a function that
answers in 10 ms and a person who answers in two days fit alike. `scorer_labeler.py` is the built-in labeler,
`scorers/` the built-in scorers.
"""

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
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
        """One finite float an image, in order; higher is better. May raise: a failure is stored as such."""


LABELERS: dict[str, str] = {"scorer": "kto_ray.label.scorer_labeler:ScorerLabeler"}
"""The built-in labelers by name."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A labeler's answer on one sample: its verdict, and the scores behind it.

    `verdict` is None when none could be found; then at least one score has no value, and says why.
    """

    sample_id: str
    scores: tuple[Score, ...]
    verdict: Verdict | None


class Labeler(Protocol):
    """Turns samples into verdicts, in its own time.

    All methods are called from the loop's one thread. Answers may come in any order, after any time, also in a later
    run of the process: a labeler that remembers over restarts must give an answer for every submitted sample once, and
    one that does not is given unanswered samples again (`submit` is idempotent by sample id).
    """

    name: str

    async def start(self) -> None:
        """Get ready; called once, before anything else."""

    async def submit(self, samples: Sequence[Sample]) -> None:
        """Take samples to judge, and return at once."""

    async def finish(self, stage: str) -> None:
        """No more samples of this round (`Sample.stage`) will come: verdicts that need all of it can be found."""

    async def collect(self) -> Sequence[Judgement]:
        """Wait for answers and give them, each once. Cancelling the call must lose none."""

    async def close(self) -> None:
        """Give back what `start` took."""


def load_plugin(kind: str, path: str, built_in: dict[str, str]) -> Any:
    """The class that a name of `built_in` or a dotted path `package.module:Name` stands for.

    Raises:
        UserError: unknown name (suggests the nearest), module that cannot be imported, or attribute that is not there.
    """
    import difflib

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
    if not inspect.isclass(plugin := getattr(module, attribute, None)):
        raise UserError(f"{kind}: module {module_name!r} has no class {attribute!r}")
    return plugin
