"""What a run says while it goes: its live view, and a sentence for each round and evaluation. `loop.py` prints them."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from kto_ray.config import RunConfig
from kto_ray.evaluate.charts import duration
from kto_ray.evaluate.statistics import EvaluationSummary
from kto_ray.stage import DRAWING, Role

PACE_ROUNDS = 5
"""The time that is left is told from so many rounds at most."""


class SpeedColumn(ProgressColumn):
    """Images, scores or verdicts a second, as far as that is known."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")


class LiveView(Progress):
    """What a terminal shows while a run goes: a line that says where it stands, and a bar for what is under way.

    Elsewhere there is nothing of it. The process's streams are left alone, see `console.py`.

    Args:
        rounds: of the whole run.
        roles: tells who is on stage.
        clock: seconds.
    """

    def __init__(
        self,
        console: Console,
        rounds: int,
        roles: Callable[[], frozenset[Role]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds, self._roles, self._clock = rounds, roles, clock
        self._version: int | None = None
        self._walked: deque[tuple[float, int]] = deque(maxlen=PACE_ROUNDS + 1)  # when, and how many were trained then
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            SpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,  # elsewhere they would leave an empty line
            get_time=clock,
        )

    def walked(self, version: int) -> None:
        """The run stands at this policy."""
        self._version = version
        self._walked.append((self._clock(), version))

    @property
    def left_s(self) -> float | None:
        """Seconds that the other rounds take, at the pace of the last few; None: none was trained yet."""
        if len(self._walked) < 2:
            return None
        (began, first), (ended, last) = self._walked[0], self._walked[-1]
        pace = (ended - began) / (last - first)
        return max(0.0, pace * (self._rounds - last) - (self._clock() - ended))

    def headline(self) -> str:
        """Where the run stands, how long it takes still, and who waits for whom."""
        if self._version is None:
            return "at its beginning"
        left = f", about {duration(self.left_s)} left" if self.left_s is not None else ""
        return f"policy {self._version} of {self._rounds}{left}; {who_waits(self._roles())}"

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.headline(), style="dim")
        yield self.make_tasks_table(self.tasks)


def who_waits(roles: frozenset[Role]) -> str:
    """Who is at work, and who waits for them."""
    at_work = {
        "making": "generators draw and scorers score",
        "judging": "verdicts are given",
        "training": "train workers learn",
        "evaluating": "held-out images are drawn and scored",
    }
    working = " while ".join(words for role, words in at_work.items() if role in roles)
    waiting = []
    if "training" not in roles and roles & {"making", "judging"}:
        waiting.append("train workers wait for the round")
    if not roles & DRAWING and "training" in roles:
        waiting.append("generators wait for the policy")
    return ", ".join([working, *waiting]) if working else "all wait for the next turn"


def round_sentence(facts: Mapping[str, Any]) -> str:
    """One trained round: its verdicts, how long it took, and how healthy its training was."""
    share = f"{facts['pass_rate']:.1%} pass, " if "pass_rate" in facts else ""
    mixed = f"{facts['mixed/images']:.0f} labelled images mixed in, " if "mixed/images" in facts else ""
    return (
        f"round {facts['round']}: {facts['desirable']} yes, {facts['undesirable']} no, "
        f"{facts['abstained'] + facts['failed'] + facts['pending']} without verdict, {share}{mixed}"
        f"generated in {facts.get('seconds/generate', 0):.0f} s, trained in {facts['seconds/train']:.0f} s"
        f"{_health(facts)}"
    )


def interval_sentence(facts: Mapping[str, Any]) -> str:
    """One interval of a run on labelled images: what was drawn of them, how long it took, and how healthy it was."""
    return (
        f"interval {facts['round']}: drew {facts['desirable']} yes, {facts['undesirable']} no, of {facts['images']} "
        f"images, trained in {facts['seconds/train']:.0f} s{_health(facts)}"
    )


def _health(facts: Mapping[str, Any]) -> str:
    margin = facts.get("objective/margin")
    return f", |beta (g - z)| {margin:.2f}, accuracy {facts['objective/accuracy']:.0%}" if margin is not None else ""


def nothing_trained(index: int, config: RunConfig, draws: Mapping[str, int]) -> str:
    """A round of which nothing is trained on: what it has is too old, or not what the objective needs.

    Args:
        draws: how often each sample was drawn, of those that are young enough.
    """
    if not draws:
        return (
            f"round {index}: nothing was trained on: all of its verdicts are on images of policies older than "
            f"max_policy_lag ({config.max_policy_lag}) allows"
        )
    lacking = {
        "verdicts": "no prompt has both a desirable and an undesirable image, so that there are no pairs; more "
        "generate.images_per_prompt, or a label.threshold nearer to the middle, make some",
        "scores": "no prompt has two images whose scores differ, so that there are no pairs; more "
        "generate.images_per_prompt makes some",
        None: "it has no desirable image",
    }[config.train.objective.needs.pairs]
    return f"round {index}: nothing was trained on by {config.train.objective.kind}: {lacking}"


def evaluation_sentence(version: int, summary: EvaluationSummary, fresh: bool) -> str:
    """One policy on the held-out prompts; `fresh`: with seeds by which nothing was decided."""
    win = f", win rate vs base {summary.win_rate.value:.0%}" if summary.win_rate else ""
    passes, mean = summary.pass_rate.value, summary.mean_score.value
    # Where nobody votes, or no bar can be found, there are still the scores themselves.
    scores = ", ".join(f"mean {name} {interval.value:.4g}" for name, interval in summary.scores.items())
    found = f"{passes:.1%} pass, mean score {mean:.3f}{win}" if summary.pass_rate.used else scores or "none judged"
    seeds = " with fresh seeds" if fresh else ""
    return f"  policy {version}: of {summary.images} held-out images{seeds} {found}"
