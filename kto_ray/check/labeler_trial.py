"""What a labeler is tried with; `contract.py` has it tried on an event loop that it watches.

A check is a method that returns a remark (mostly "") and raises when a promise of `Labeler` is broken: `Broken`, in
words that say what would be right, or whatever the labeler itself raised.
"""

import asyncio
import inspect
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np

from kto_ray.check.finding import PICTURES, Broken, Size, number, picture
from kto_ray.label.protocol import Labeler
from kto_ray.labelers import labeler_class
from kto_ray.records import LABELS, PolicyRef, Prompt, Sample, SampleRequest, Score, Verdict
from kto_ray.samples import Samples

INTERRUPTIONS = 20
SPIN_S = 0.1  # a `collect` that gives nothing so soon would keep the loop busy
GRACE_S = 0.5  # how long to listen for a verdict that should not come
CANCEL_S = 5.0  # how long `collect` may go on after it was cancelled


class LabelerTrial:
    """A labeler and what it is tried with. It is built twice, as in a run that is continued.

    In its first life it answers undisturbed; in the second, `collect` is cancelled again and again.

    Args:
        scorers: names of the scorers whose scores come after the samples.
    """

    def __init__(
        self, path: str, arguments: Mapping[str, Any], scorers: Sequence[str], wait_s: float, size: Size
    ) -> None:
        self.path, self.arguments, self.scorers, self.wait_s, self.size = path, arguments, scorers, wait_s, size
        self.samples = trial_samples("round-00000", size)
        self.labeler: Labeler
        self.verdicts: list[Verdict] = []
        self.seconds = 0.0  # that all verdicts took
        self.at_the_seal = False  # whether some came only then
        self.remembered: Mapping[str, Any] = {}

    # -- first life

    async def build(self) -> str:
        self.labeler = labeler_class(self.path)(**self.arguments)
        name = getattr(self.labeler, "name", None)
        if not isinstance(name, str) or not name:
            raise Broken(f'its name is {name!r}; write name = "..." in the class')
        if missing := [method for method in METHODS if not callable(getattr(self.labeler, method, None))]:
            raise Broken(f"it has no {', '.join(missing)}; subclass kto_ray.label.protocol.Labeler to inherit them")
        return name

    async def start(self) -> str:
        await self.call("start", {})
        return ""

    async def submit(self) -> str:
        """Twice the same samples: they may come again after a crash."""
        await self.call("submit", self.samples)
        await self.call("submit", self.samples)
        await self.call("submit", self.samples.only(set()))
        return ""

    async def take_scores(self) -> str:
        """In two parts, and twice, as after a crash."""
        stage, scores = self.samples[0].stage, self.scores(self.samples)
        for some in (scores[::2], scores[1::2], scores):
            await self.call("scored", stage, some)
        await self.call("finish", stage)
        return ""

    async def answer(self) -> str:
        began = asyncio.get_running_loop().time()
        self.verdicts = await self.gather(self.samples, self.wait_s)
        self.seconds = asyncio.get_running_loop().time() - began
        sealed = await self.seal()
        self.at_the_seal = bool(sealed)
        self.verdicts += sealed
        if self.complete:
            self.verdicts += await self.collect(GRACE_S + self.seconds) or []  # should a verdict come twice
            return f"within {self.seconds:.1f} s"
        judged = len(ids(self.samples) & judged_ids(self.verdicts))
        many = f"{judged} of {len(self.samples)} samples have a verdict" if judged else "no answer"
        return f"{many} within {self.wait_s:g} s; that is allowed for people, but then less can be checked"

    async def legal(self) -> str:
        for verdict in self.verdicts:
            if verdict.sample_id not in ids(self.samples):
                raise Broken(f"it judges {verdict.sample_id!r}, which was not submitted")
            if verdict.label not in LABELS:
                raise Broken(f"a verdict's label is {verdict.label!r}; give one of {', '.join(LABELS)}")
            for field in ("labeler", "rule"):
                value = getattr(verdict, field)
                if not isinstance(value, str) or not value:
                    raise Broken(f"a verdict's {field} is {value!r}; say in words who judged and by what")
        counts = Counter(verdict.label for verdict in self.verdicts)
        return ", ".join(f"{counts[label]} {label}" for label in LABELS if counts[label])

    async def once(self) -> str:
        require_once(self.verdicts, "which were submitted twice; let submit skip ids that it has seen")
        return ""

    async def numbers(self) -> str:
        figures = self.call_plainly("figures", self.samples[0].stage)
        return ", ".join(f"{name} {number(f'the figure {name!r}', value):g}" for name, value in figures.items())

    async def remember(self) -> str:
        memory = self.call_plainly("memory")
        try:
            self.remembered = json.loads(json.dumps(memory, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise Broken(f"memory() is no JSON: {error}") from error
        if self.remembered != memory:
            raise Broken(f"memory() is {memory!r}, but start would be given {self.remembered!r}: JSON changes it")
        return ""

    async def close(self) -> str:
        await self.call("close")
        await self.call("close")
        return ""

    # -- second life

    async def restart(self) -> str:
        await self.build()
        await self.call("start", self.remembered)
        return ""

    async def wait(self) -> str:
        if await self.collect(SPIN_S) == []:
            raise Broken("collect() gives nothing at once, so that the loop would ask for ever; wait for a verdict")
        return ""

    async def interrupt(self) -> str:
        if not self.complete:
            return "not tried, as not all verdicts came in time"
        if self.at_the_seal:
            return "not tried, as verdicts come with the seal"
        samples = trial_samples("round-00001", self.size)
        await self.call("submit", samples)
        await self.call("scored", samples[0].stage, self.scores(samples))
        await self.call("finish", samples[0].stage)
        verdicts: list[Verdict] = []
        for turns in range(INTERRUPTIONS):
            verdicts += await self.collect(turns=turns) or []
        for _ in range(INTERRUPTIONS):
            verdicts += await self.collect(self.seconds / INTERRUPTIONS) or []
        judged = judged_ids(verdicts)
        verdicts += await self.gather(samples.only(ids(samples) - judged), self.wait_s)
        if lost := ids(samples) - judged_ids(verdicts):
            raise Broken(
                f"{len(lost)} of {len(samples)} verdicts are lost when collect() is cancelled; keep a verdict until "
                "after the last await, for instance in an asyncio.Queue whose get() is the only one"
            )
        require_once(verdicts, "while collect() was cancelled now and then")
        return ""

    # -- helpers

    @property
    def complete(self) -> bool:
        return ids(self.samples) <= judged_ids(self.verdicts)

    def scores(self, samples: Samples) -> list[Score]:
        """From 0 to 1, and one that failed, of every scorer."""
        last = samples[-1]
        return [
            Score(sample.id, scorer, "1", None, "RuntimeError: a trial")
            if sample is last
            else Score(sample.id, scorer, "1", place / (len(samples) - 2))
            for scorer in self.scorers
            for place, sample in enumerate(samples)
        ]

    async def call(self, method: str, *arguments: Any) -> None:
        """Call a method that must return soon."""
        task = asyncio.ensure_future(self.awaitable(method, *arguments))
        await asyncio.wait({task}, timeout=self.wait_s)
        if not task.done():
            task.cancel()
            raise Broken(f"{method}() does not return within {self.wait_s:g} s; let it only begin what takes long")
        task.result()

    def call_plainly(self, method: str, *arguments: Any) -> Mapping[str, Any]:
        answer = getattr(self.labeler, method)(*arguments)
        if inspect.iscoroutine(answer):
            answer.close()
            raise Broken(f"{method}() is async; write def {method}")
        if not isinstance(answer, Mapping):
            raise Broken(f"{method}() gives {answer!r}; give a mapping")
        return answer

    def awaitable(self, method: str, *arguments: Any) -> Awaitable[Any]:
        answer = getattr(self.labeler, method)(*arguments)
        if not inspect.isawaitable(answer):
            raise Broken(f"{method}() is not async; write async def {method}")
        return answer

    async def seal(self) -> list[Verdict]:
        """What the first round would be sealed with, which is the same when it is asked again."""
        stage = self.samples[0].stage
        answers = []
        for _ in range(2):
            task = asyncio.ensure_future(self.awaitable("seal", stage))
            await asyncio.wait({task}, timeout=self.wait_s)
            if not task.done():
                task.cancel()
                return []  # it waits for people, as it may
            answers.append(sorted(task.result(), key=lambda verdict: verdict.sample_id))
        if answers[0] != answers[1]:
            raise Broken("seal() does not give the same when it is asked again, as it is after a crash")
        return answers[0]

    async def collect(self, seconds: float = 0, turns: int = 0) -> list[Verdict] | None:
        """What one `collect` gives within so many seconds or turns of the loop; None: it had to be cancelled."""
        task = asyncio.ensure_future(self.awaitable("collect"))
        if seconds:
            await asyncio.wait({task}, timeout=seconds)
        for _ in range(turns):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=min(CANCEL_S, self.wait_s))
        if not task.done():
            raise Broken("collect() goes on after it was cancelled; let asyncio.CancelledError through")
        if task.cancelled():
            return None
        answer = task.result()
        if not isinstance(answer, Sequence) or not all(isinstance(verdict, Verdict) for verdict in answer):
            raise Broken(f"collect() gives {answer!r}; give a sequence of Verdict")
        return list(answer)

    async def gather(self, samples: Samples, seconds: float) -> list[Verdict]:
        """What `collect` gives until all samples have a verdict, or the time is over."""
        now = asyncio.get_running_loop().time
        deadline, verdicts = now() + seconds, list[Verdict]()
        while ids(samples) - judged_ids(verdicts) and (left := deadline - now()) > 0:
            verdicts += await self.collect(left) or []
        return verdicts


METHODS = ("start", "submit", "scored", "finish", "collect", "enough", "seal", "status", "figures", "memory", "close")
LABELER_CHECKS: dict[str, Callable[[LabelerTrial], Coroutine[Any, Any, str]]] = {
    "is built, with a name": LabelerTrial.build,
    "starts": LabelerTrial.start,
    "takes samples": LabelerTrial.submit,
    "takes scores": LabelerTrial.take_scores,
    "answers": LabelerTrial.answer,
    "its verdicts are legal": LabelerTrial.legal,
    "judges a sample once": LabelerTrial.once,
    "figures are numbers": LabelerTrial.numbers,
    "memory is JSON": LabelerTrial.remember,
    "closes, twice": LabelerTrial.close,
    "is built again and given its memory": LabelerTrial.restart,
    "waits while there is nothing": LabelerTrial.wait,
    "loses nothing when interrupted": LabelerTrial.interrupt,
    "closes again": LabelerTrial.close,
}
LABELER_ESSENTIAL = (
    *("is built, with a name", "starts", "takes samples", "takes scores", "answers"),
    "is built again and given its memory",
)


def trial_samples(stage: str, size: Size) -> Samples:
    """Two samples of each trial picture, with read-only pixels."""
    samples = []
    for place, (caption, shown) in enumerate(PICTURES * 2):
        index, prompt = divmod(place, len(PICTURES))
        request = SampleRequest.make(0, stage, Prompt(f"check-{prompt}", caption), index)
        pixels_HWC = picture(shown, size)
        latents_CHW = np.zeros((4, max(1, size[0] // 8), max(1, size[1] // 8)), np.float32)
        samples.append(
            Sample(
                *(request.id, stage, request.prompt, index, request.seed, PolicyRef(0, "0" * 64)),
                latents_CHW=latents_CHW,
                pixels_HWC=pixels_HWC,
            )
        )
    return Samples.of(samples)


def ids(samples: Samples) -> set[str]:
    return {sample.id for sample in samples}


def judged_ids(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.sample_id for verdict in verdicts}


def require_once(verdicts: Sequence[Verdict], when: str) -> None:
    """Raises Broken when a sample has several verdicts."""
    counts = Counter(verdict.sample_id for verdict in verdicts)
    if several := [sample_id for sample_id, count in counts.items() if count > 1]:
        raise Broken(f"several verdicts on {several[0]!r} and {len(several) - 1} other samples, {when}")
