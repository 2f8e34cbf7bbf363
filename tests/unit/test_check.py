"""The contract checks: what keeps its promises passes, and every broken promise is found where it is broken."""

import asyncio
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from kto_ray.check.contract import ask_all, check_labeler, check_prompts, check_scorer, show
from kto_ray.check.finding import Finding
from kto_ray.check.labeler_trial import LABELER_CHECKS
from kto_ray.check.prompts_trial import PROMPTS_CHECKS
from kto_ray.check.scorer_trial import SCORER_CHECKS, ScorerTrial
from kto_ray.cli import main
from kto_ray.config import PromptSet
from kto_ray.errors import UserError
from kto_ray.label.protocol import Labeler
from kto_ray.labelers import labeler_class
from kto_ray.records import Label, Prompt, SampleRecord, Score, Verdict
from kto_ray.samples import Samples
from kto_ray.score.protocol import BatchFailed, check_batch

Images = npt.NDArray[np.uint8]


def scorer_findings(scorer: type | str, size: tuple[int, int] = (64, 64), **arguments: Any) -> dict[str, Finding]:
    """Findings of all checks that need no actor, by name."""
    path = scorer if isinstance(scorer, str) else f"{__name__}:{scorer.__name__}"
    trial = ScorerTrial(path, arguments, size)
    return {finding.name: finding for finding in ask_all(lambda name: Finding(*trial.check(name)))}


def failed(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if not finding.passed]


# -- scorers that keep their promises ---------------------------------------------------------------------------------


class Redder:
    """Mean of red minus mean of green."""

    name = "redder"
    version = "1"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Sequence[Any]:
        check_batch(images_BHWC, prompts)
        return [self.one(image, prompt.text) for image, prompt in zip(images_BHWC, prompts, strict=True)]

    def one(self, image_HWC: Images, text: str) -> Any:
        return self.scale * (float(image_HWC[..., 0].mean()) - float(image_HWC[..., 1].mean()))


class NumpyScores(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        return np.array(super().score(images_BHWC, prompts), np.float32)


class Integers(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return np.int64(super().one(image_HWC, text))


class NearlyTheSame(Redder):
    """As far from itself as floats are on an accelerator."""

    calls = 0

    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        self.calls += 1
        return [score * (1 + 1e-6 * self.calls) for score in super().score(images_BHWC, prompts)]


@pytest.mark.parametrize("scorer", [Redder, NumpyScores, Integers, NearlyTheSame])
def test_a_good_scorer_passes_every_check(scorer: type) -> None:
    findings = scorer_findings(scorer, scale=2)
    assert failed(findings) == []
    assert list(findings) == list(SCORER_CHECKS)
    remarks = [name for name, finding in findings.items() if finding.words]
    assert remarks == ["has a name and a version", "scores a batch"]


def test_the_scores_are_shown() -> None:
    findings = scorer_findings(Redder)
    assert findings["has a name and a version"].words == "redder@1"
    assert len(findings["scores a batch"].words.split(", ")) == 4
    assert scorer_findings(Redder, scale=0)["scores follow their images"].words.startswith("all images score 0")


def test_the_embedded_worlds_scorer_may_refuse_other_sizes_and_texts() -> None:
    findings = scorer_findings("shapes")
    assert failed(findings) == []
    assert "512x512 is refused" in findings["takes other sizes, or says why not"].words
    assert "an empty prompt is refused" in findings["survives odd prompts"].words


class Careless(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        return [float(image.astype(np.float32).std()) for image in images_BHWC]


def test_scoring_what_the_loop_never_hands_over_is_remarked_upon() -> None:
    findings = scorer_findings(Careless)
    assert failed(findings) == []
    assert findings["sees what is no batch"].words.startswith(
        "scores floats, channels first, four channels, no channels, fewer prompts than images;"
    )


class OneSize(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        if images_BHWC.shape[1:3] != (32, 48):
            raise ValueError("32x48 only, please")
        return super().score(images_BHWC, prompts)


def test_a_scorer_of_one_size_is_tried_with_it() -> None:
    assert failed(scorer_findings(OneSize, size=(32, 48))) == []
    findings = scorer_findings(OneSize)
    assert list(findings)[-1] == "scores a batch"
    assert "64x64: 32x48 only, please" in findings["scores a batch"].words
    assert "--size" in findings["scores a batch"].words


# -- scorers that do not ----------------------------------------------------------------------------------------------


class NoVersion(Redder):
    version = ""


class Generous(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        return [*super().score(images_BHWC, prompts), 1.0]


class Undefined(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return float("nan")


class Columns(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return np.array([super().one(image_HWC, text)])


class Texts(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return "0.5"


class Nothing(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return None


class Sorted(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        return sorted(super().score(images_BHWC, prompts))


class Moody(Redder):
    calls = 0

    def one(self, image_HWC: Images, text: str) -> Any:
        self.calls += 1
        return super().one(image_HWC, text) + self.calls


class Comparing(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        scores = np.array(super().score(images_BHWC, prompts))
        return scores - scores.mean() if len(scores) else scores


class NeedsOne(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        return super().score(images_BHWC, prompts) if images_BHWC.shape[0] else [float(images_BHWC[0].mean())]


class InPlace(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        images_BHWC //= 2
        return super().score(images_BHWC, prompts)


class InPlaceIfItMay(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        scores = super().score(images_BHWC, prompts)
        if images_BHWC.flags.writeable:
            images_BHWC[:] = 0
        return scores


class Contrast(Redder):
    """Divides by what an image of one colour has none of."""

    def one(self, image_HWC: Images, text: str) -> Any:
        return 1 / (int(image_HWC.max()) - int(image_HWC.min()))


class NanOnBlack(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return super().one(image_HWC, text) if image_HWC.any() else float("nan")


class NeverRecovers(Redder):
    broken = False

    def one(self, image_HWC: Images, text: str) -> Any:
        self.broken |= not image_HWC.any()
        return 0.0 if self.broken else super().one(image_HWC, text)


class FirstWord(Redder):
    def one(self, image_HWC: Images, text: str) -> Any:
        return super().one(image_HWC, text) + len(text.split()[0])


class SaysNoSize(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        if images_BHWC.shape[1] > 100:
            raise ValueError("too large")
        return super().score(images_BHWC, prompts)


class NoServer(Redder):
    def score(self, images_BHWC: Images, prompts: Sequence[Prompt]) -> Any:
        raise BatchFailed("the server does not answer")


@pytest.mark.parametrize(
    ("scorer", "check", "words"),
    [
        (NoVersion, "has a name and a version", "its version is ''"),
        (Generous, "scores a batch", "5 scores for 4 images"),
        (Undefined, "scores a batch", "a score is nan"),
        (Columns, "scores a batch", "ndarray"),
        (Texts, "scores a batch", "'0.5' (str)"),
        (Nothing, "scores a batch", "NoneType"),
        (Sorted, "scores follow their images", "in a batch that is turned round"),
        (Moody, "scores the same again", "when asked again"),
        (Comparing, "scores the same alone", "alone"),
        (NeedsOne, "takes an empty batch", "IndexError"),
        (InPlace, "scores a batch", "work on a copy"),
        (InPlaceIfItMay, "leaves its input alone", "work on a copy"),
        (Contrast, "survives odd images", "a black image: raised ZeroDivisionError"),
        (NanOnBlack, "survives odd images", "a black image: a score is nan"),
        (NeverRecovers, "survives odd images", "after a black image"),
        (FirstWord, "survives odd prompts", "an empty prompt: raised IndexError"),
        (SaysNoSize, "takes other sizes, or says why not", "does not say which size it takes"),
        (NoServer, "scores a batch", "the server does not answer"),
    ],
)
def test_a_broken_promise_of_a_scorer_is_found(scorer: type, check: str, words: str) -> None:
    findings = scorer_findings(scorer)
    assert not findings[check].passed
    assert words in findings[check].words


def test_one_broken_promise_does_not_hide_the_others() -> None:
    assert failed(scorer_findings(NoVersion)) == ["has a name and a version"]
    assert list(scorer_findings(NoVersion)) == list(SCORER_CHECKS)
    assert failed(scorer_findings(Contrast)) == ["survives odd images"]


def test_words_say_where_it_was_raised_and_stay_short() -> None:
    words = scorer_findings(NeedsOne)["takes an empty batch"].words
    assert "(test_check.py line " in words
    assert max(len(finding.words) for finding in scorer_findings("shapes").values()) < 2000


@pytest.mark.parametrize(
    ("path", "arguments", "check", "words"),
    [
        ("redder", {}, "is found", "package.module:Name"),
        ("no_such_module:Redder", {}, "is found", "cannot import 'no_such_module'"),
        (f"{__name__}:Reddest", {}, "is found", "'Reddest'"),
        (f"{__name__}:Redder", {"scale": lambda: 1}, "its arguments pickle", "lambda"),
    ],
)
def test_what_is_not_there_or_cannot_travel_is_found_before_a_process_is_started(
    path: str, arguments: dict[str, Any], check: str, words: str
) -> None:
    last = check_scorer(path, arguments)[-1]
    assert (last.name, last.passed) == (check, False)
    assert words in last.words


def test_arguments_that_do_not_fit_are_named() -> None:
    findings = scorer_findings(Redder, colour="red")
    assert failed(findings) == list(findings) == ["is built in a process of its own"]
    assert "'colour'" in findings["is built in a process of its own"].words


# -- labelers that keep their promises --------------------------------------------------------------------------------


def labeler_findings(labeler: type, wait_s: float = 10, **arguments: Any) -> dict[str, Finding]:
    findings = check_labeler(f"{__name__}:{labeler.__name__}", arguments, wait_s=wait_s)
    return {finding.name: finding for finding in findings}


class Patient(Labeler):
    """Yes to reddish images, some time after they were submitted; counts them over restarts."""

    name = "patient"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.seen: set[str] = set()
        self.red: dict[str, float] = {}
        self.verdicts: asyncio.Queue[list[Verdict]] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []
        self.count = 0

    async def start(self, memory: Mapping[str, Any]) -> None:
        self.count = memory.get("count", 0)

    async def submit(self, samples: Samples) -> None:
        await self.look(samples)
        for sample in samples:
            if sample.id not in self.seen:
                self.seen.add(sample.id)
                self.count += 1
                self.tasks.append(asyncio.create_task(self.judge(sample)))

    async def look(self, samples: Samples) -> None:
        reds = (await samples.pixels_BHWC())[..., 0].mean(axis=(1, 2))
        self.red |= {sample.id: float(red) for sample, red in zip(samples, reds, strict=True)}

    async def judge(self, sample: SampleRecord) -> None:
        await asyncio.sleep(self.seconds)
        self.verdicts.put_nowait([self.verdict(sample)])

    def verdict(self, sample: SampleRecord) -> Verdict:
        return Verdict(sample.id, "desirable" if self.red[sample.id] > 100 else "undesirable", self.name, "red > 100")

    async def collect(self) -> Sequence[Verdict]:
        return await self.verdicts.get()

    def figures(self, stage: str) -> Mapping[str, float]:
        return {"count": self.count}

    def memory(self) -> Mapping[str, Any]:
        return {"count": self.count}

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()


class WholeRound(Patient):
    """Judges when the round is complete, as a threshold by rank must."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, SampleRecord] = {}

    async def submit(self, samples: Samples) -> None:
        await self.look(samples)
        self.waiting |= {sample.id: sample for sample in samples}

    async def finish(self, stage: str) -> None:
        self.verdicts.put_nowait([self.verdict(sample) for sample in self.waiting.values()])


class AtTheSeal(WholeRound):
    """Gives nothing before the round is sealed, as people may change their minds."""

    async def finish(self, stage: str) -> None:
        return

    async def seal(self, stage: str) -> Sequence[Verdict]:
        return [self.verdict(sample) for sample in self.waiting.values() if sample.stage == stage]


class ByScore(Labeler):
    """Needs the scores of one scorer, and says so of those that failed."""

    name = "by_score"

    def __init__(self, scorer: str) -> None:
        self.scorer = scorer
        self.missing: set[str] = set()
        self.verdicts: dict[str, Verdict] = {}
        self.new = asyncio.Event()

    async def submit(self, samples: Samples) -> None:
        self.missing |= {sample.id for sample in samples} - self.verdicts.keys()

    async def scored(self, stage: str, scores: Sequence[Score]) -> None:
        for score in scores:
            if score.scorer == self.scorer and score.sample_id in self.missing:
                value = score.value
                label: Label = "failed" if value is None else "desirable" if value > 0.5 else "undesirable"
                self.verdicts[score.sample_id] = Verdict(score.sample_id, label, self.name, f"{value} > 0.5")
                self.missing.remove(score.sample_id)
        self.new.set()

    async def finish(self, stage: str) -> None:
        if self.missing:
            raise RuntimeError(f"no scores of {self.scorer}")

    async def collect(self) -> Sequence[Verdict]:
        while True:
            await self.new.wait()
            self.new.clear()
            verdicts = [verdict for verdict in self.verdicts.values() if verdict.rule]
            for verdict in verdicts:
                self.verdicts[verdict.sample_id] = replace(verdict, rule="")
            if verdicts:
                return verdicts


@pytest.mark.parametrize(("labeler", "arguments"), [(Patient, {}), (Patient, {"seconds": 0.2}), (WholeRound, {})])
def test_a_good_labeler_passes_every_check(labeler: type, arguments: dict[str, Any]) -> None:
    findings = labeler_findings(labeler, **arguments)
    assert failed(findings) == []
    assert list(findings)[2:] == list(LABELER_CHECKS)
    assert findings["answers"].words.startswith("within ")
    assert findings["its verdicts are legal"].words == "6 desirable, 2 undesirable"
    assert findings["loses nothing when interrupted"].words == ""


def test_a_labeler_may_give_its_verdicts_with_the_seal() -> None:
    findings = labeler_findings(AtTheSeal, wait_s=1)
    assert failed(findings) == []
    assert findings["its verdicts are legal"].words == "6 desirable, 2 undesirable"
    assert findings["loses nothing when interrupted"].words == "not tried, as verdicts come with the seal"


class People(Patient):
    """Answers tomorrow."""

    async def judge(self, sample: SampleRecord) -> None:
        await asyncio.sleep(86_400)


class SomePeople(Patient):
    async def judge(self, sample: SampleRecord) -> None:
        await asyncio.sleep(0 if sample.index else 86_400)
        await super().judge(sample)


@pytest.mark.parametrize(
    ("labeler", "words"), [(People, "no answer within 0.3 s"), (SomePeople, "4 of 8 samples have a verdict")]
)
def test_people_may_take_their_time(labeler: type, words: str) -> None:
    findings = labeler_findings(labeler, wait_s=0.3)
    assert failed(findings) == []
    assert words in findings["answers"].words
    assert "allowed for people" in findings["answers"].words
    assert findings["loses nothing when interrupted"].words.startswith("not tried")


def test_a_labeler_is_given_the_scores_that_it_needs() -> None:
    path, arguments = f"{__name__}:ByScore", {"scorer": "taste"}
    findings = {f.name: f for f in check_labeler(path, arguments, scorers=["other", "taste"], wait_s=5)}
    assert failed(findings) == []
    assert findings["its verdicts are legal"].words == "3 desirable, 4 undesirable, 1 failed"
    assert failed({f.name: f for f in check_labeler(path, arguments, wait_s=5)}) == ["takes scores"]


# -- labelers that do not ---------------------------------------------------------------------------------------------


class Nameless(Patient):
    name = ""


class NotALabeler:
    name = "half"

    async def submit(self, samples: Samples) -> None:
        pass


class PlainStart(Patient):
    def start(self, memory: Mapping[str, Any]) -> None:  # type: ignore[override]
        self.count = 0


class WaitsInSubmit(Patient):
    async def submit(self, samples: Samples) -> None:
        await asyncio.sleep(86_400)


class Blocks(Patient):
    async def collect(self) -> Sequence[Verdict]:
        time.sleep(1)
        return []


class NoCollect(Labeler):
    name = "no_collect"


class Garbage(Patient):
    async def collect(self) -> Any:
        return "yes"


class Invents(Patient):
    async def judge(self, sample: SampleRecord) -> None:
        await super().judge(sample)
        self.verdicts.put_nowait([replace(self.verdict(sample), sample_id="another")])


class Maybe(Patient):
    def verdict(self, sample: SampleRecord) -> Verdict:
        return replace(super().verdict(sample), label="maybe")  # type: ignore[arg-type]


class NoReason(Patient):
    def verdict(self, sample: SampleRecord) -> Verdict:
        return replace(super().verdict(sample), rule="")


class Twice(Patient):
    async def submit(self, samples: Samples) -> None:
        self.seen.clear()
        await super().submit(samples)


class TwiceLater(Patient):
    """Notices only while an answer is on its way that it has the sample already."""

    async def judge(self, sample: SampleRecord) -> None:
        await super().judge(sample)
        self.seen.discard(sample.id)
        if sample.index == 0:
            await asyncio.sleep(0.1)
            await super().judge(sample)


class NanFigure(Patient):
    def figures(self, stage: str) -> Mapping[str, float]:
        return {"threshold": float("nan")}


class AsyncFigures(Patient):
    async def figures(self, stage: str) -> Mapping[str, float]:  # type: ignore[override]
        return {}


class ArrayMemory(Patient):
    def memory(self) -> Mapping[str, Any]:
        return {"history": np.zeros(3)}


class NumberedMemory(Patient):
    def memory(self) -> Mapping[str, Any]:
        return {3: "rounds"}  # type: ignore[dict-item]


class ClosesOnce(Patient):
    async def close(self) -> None:
        await super().close()
        del self.tasks


class Forgetful(Patient):
    """Does not understand its own memory."""

    async def start(self, memory: Mapping[str, Any]) -> None:
        self.count = memory["total"] if memory else 0


class Spins(Patient):
    async def collect(self) -> Sequence[Verdict]:
        return [] if self.verdicts.empty() else self.verdicts.get_nowait()


class Fickle(Patient):
    """Changes its mind about what a round is sealed with."""

    async def seal(self, stage: str) -> Sequence[Verdict]:
        self.count += 1
        return [Verdict("a", "abstain", self.name, f"at the {self.count}. thought")]


class Loses(Patient):
    """Lets go of an answer before its last await."""

    async def collect(self) -> Sequence[Verdict]:
        answer = await super().collect()
        await asyncio.sleep(0.01)
        return answer


class ScoresInCollect(Patient):
    """Takes work off its list before it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: asyncio.Queue[SampleRecord] = asyncio.Queue()

    async def judge(self, sample: SampleRecord) -> None:
        self.waiting.put_nowait(sample)

    async def collect(self) -> Sequence[Verdict]:
        sample = await self.waiting.get()
        return [await asyncio.to_thread(self.verdict, sample)]


class Stubborn(Patient):
    async def collect(self) -> Sequence[Verdict]:
        try:
            return await super().collect()
        except asyncio.CancelledError:
            return await super().collect()


@pytest.mark.parametrize(
    ("labeler", "check", "words"),
    [
        (Nameless, "is built, with a name", "its name is ''"),
        (
            NotALabeler,
            "is built, with a name",
            "it has no start, scored, finish, collect, enough, seal, ",
        ),
        (PlainStart, "starts", "write async def start"),
        (NoCollect, "answers", "NotImplementedError"),
        (Garbage, "answers", "collect() gives 'yes'"),
        (Invents, "its verdicts are legal", "'another', which was not submitted"),
        (Maybe, "its verdicts are legal", "desirable, undesirable, abstain, failed"),
        (NoReason, "its verdicts are legal", "a verdict's rule is ''"),
        (Twice, "judges a sample once", "several verdicts on "),
        (TwiceLater, "judges a sample once", "several verdicts on "),
        (NanFigure, "figures are numbers", "the figure 'threshold' is nan"),
        (AsyncFigures, "figures are numbers", "write def figures"),
        (ArrayMemory, "memory is JSON", "ndarray"),
        (NumberedMemory, "memory is JSON", "{'3': 'rounds'}"),
        (ClosesOnce, "closes, twice", "AttributeError"),
        (Forgetful, "is built again and given its memory", "KeyError"),
        (Spins, "waits while there is nothing", "wait for a verdict"),
        (Fickle, "answers", "seal() does not give the same when it is asked again"),
        (Loses, "loses nothing when interrupted", "are lost when collect() is cancelled"),
        (ScoresInCollect, "loses nothing when interrupted", "are lost when collect() is cancelled"),
    ],
)
def test_a_broken_promise_of_a_labeler_is_found(labeler: type, check: str, words: str) -> None:
    findings = labeler_findings(labeler, wait_s=2)
    assert not findings[check].passed
    assert words in findings[check].words


@pytest.mark.parametrize(
    ("labeler", "check", "words"),
    [
        (WaitsInSubmit, "takes samples", "submit() does not return within 0.3 s"),
        (Blocks, "answers", "it blocks the loop's one thread"),
        (Stubborn, "answers", "let asyncio.CancelledError through"),
    ],
)
def test_a_labeler_that_hangs_is_found(labeler: type, check: str, words: str) -> None:
    findings = labeler_findings(labeler, wait_s=0.3)
    assert not findings[check].passed
    assert words in findings[check].words


class WithScores(Patient):
    """As labelers were when samples came once they were scored."""

    async def submit(self, samples: Samples, scores: Sequence[Score] = ()) -> None:
        await super().submit(samples)


def test_a_labeler_that_waits_for_samples_with_their_scores_is_refused() -> None:
    last = check_labeler(f"{__name__}:WithScores")[-1]
    assert (last.name, last.passed) == ("is found", False)
    assert "WithScores: submit(self, samples: " in last.words
    assert "write submit(self, samples), and take scores in scored(self, stage, scores)" in last.words
    with pytest.raises(UserError, match=r"label\.labeler: .* takes scores, too"):
        labeler_class(f"{__name__}:WithScores")


def test_a_labeler_that_is_not_there_is_named() -> None:
    last = check_labeler(f"{__name__}:Nobody")[-1]
    assert (last.name, last.passed) == ("is found", False)
    assert "'Nobody'" in last.words


# -- prompts ----------------------------------------------------------------------------------------------------------


class Steady:
    """Gives the same whenever it is asked."""

    def __init__(self, animals: Sequence[str] = ("cat", "dog")) -> None:
        self.animals = animals

    def __iter__(self) -> Iterator[str | dict[str, str]]:
        yield {"prompt": "a cow", "style": "oil"}
        yield from (f"a {animal}" for animal in self.animals)


class Unsteady(Steady):
    """Sets of texts have another order in another process."""

    def __iter__(self) -> Iterator[str | dict[str, str]]:
        return iter({f"a {animal} {number}" for animal in self.animals for number in range(20)})


class Drained(Steady):
    """An iterator that all of its instances share."""

    left = iter(["a cat", "a dog"])

    def __iter__(self) -> Iterator[str | dict[str, str]]:
        return iter([next(self.left)])


class Raises(Steady):
    def __iter__(self) -> Iterator[str | dict[str, str]]:
        raise KeyError("animals")


def prompts_findings(source: type, **args: Any) -> dict[str, Finding]:
    of = PromptSet(source=f"{__name__}:{source.__name__}", args=args)
    return {finding.name: finding for finding in check_prompts(of, wait_s=60)}


def test_good_prompts_pass_every_check() -> None:
    findings = prompts_findings(Steady, animals=["cat", "Cow"])
    assert failed(findings) == []
    assert list(findings) == ["is found", "its arguments pickle", *PROMPTS_CHECKS]
    assert findings["gives prompts"].words == "3 prompts; the first is 'a cow'; metadata: style"
    assert findings["its texts differ"].words == "1 texts are there several times, 'a cow' 2 times"


@pytest.mark.parametrize(
    ("source", "check", "words"),
    [
        (Unsteady, "gives the same in another process", "the order of a set?"),
        (Drained, "gives the same when it is built again", "number 1 is first 'a cat' and then 'a dog'"),
        (Raises, "gives prompts", "raised KeyError: 'animals' (test_check.py line"),
    ],
)
def test_a_broken_promise_of_prompts_is_found(source: type, check: str, words: str) -> None:
    findings = prompts_findings(source)
    assert failed(findings)[0] == check
    assert words in findings[check].words


def test_prompts_that_are_not_there_are_named() -> None:
    last = check_prompts(PromptSet(source=f"{__name__}:Nobody"))[-1]
    assert (last.name, last.passed, last.last) == ("is found", False, True)


def test_files_are_read_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("de,prompt\neine Katze,a cat\neine Katze,a dog\n")

    def checked(*words: str) -> Result:
        return CliRunner().invoke(main, ["check", "prompts", str(file), *words], env={"COLUMNS": "400"})

    outcome = checked("text=de")
    assert outcome.exit_code == 0, outcome.output
    assert "2 prompts; the first is 'eine Katze'; metadata: prompt" in outcome.output
    assert "1 texts are there several times, 'eine katze' 2 times" in outcome.output
    outcome = checked("text=fr")
    assert outcome.exit_code == 1
    assert "has no column 'fr'; it has 'de', 'prompt'" in outcome.output
    outcome = checked("txt=fr")
    assert outcome.exit_code == 2
    assert "unknown field 'prompts.train.txt', did you mean 'text'?" in outcome.output


# -- words ------------------------------------------------------------------------------------------------------------


def test_findings_are_printed_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=100)
    findings = [Finding("scores a batch", True, "0.5"), Finding("pickles", False, "[bold]no[/bold]")]
    assert not show(findings, console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ok" in output
    assert "FAILED  pickles         [bold]no[/bold]" in output
    assert "1 of 2 checks failed" in output
    assert show(findings[:1], console)
