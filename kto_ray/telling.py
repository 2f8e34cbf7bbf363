"""What a run says while it goes: its bars, and a sentence for each round and evaluation. `loop.py` prints them."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kto_ray.config import RunConfig
from kto_ray.evaluate.statistics import EvaluationSummary


def progress_bars(console: Console) -> Progress:
    """Bars that go away once they are full, on a terminal. They leave the process's streams alone, see `console.py`."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,  # elsewhere they would leave an empty line
    )


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
