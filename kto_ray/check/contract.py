"""`kto-ray check`: tries a scorer, labeler or prompts of one's own against the protocol, and says in words what failed.

`check_prompts` reads prompts and tries a source of one's own, by `prompts_trial.py`, here and in another process.
`check_scorer` builds the scorer in an actor of its own, as the loop does, and asks for the checks of `scorer_trial.py`
one after the other, so that a crash or a hang is a finding, too. `check_labeler` does those of `labeler_trial.py` on an
event loop in a thread of its own: a labeler that blocks its loop could not be watched from within. `show` prints what
they found.
"""

import asyncio
import concurrent.futures
import contextlib
import pickle
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kto_ray.check.finding import Broken, Finding, Size, find, shorten
from kto_ray.check.labeler_trial import CANCEL_S, LABELER_CHECKS, LABELER_ESSENTIAL, LabelerTrial
from kto_ray.check.prompts_trial import FILE_CHECKS, PROMPTS_CHECKS, PromptsTrial
from kto_ray.check.scorer_trial import SCORER_CHECKS, ScorerTrial
from kto_ray.config import PromptSet
from kto_ray.labelers import labeler_class
from kto_ray.prompts import is_own
from kto_ray.score.scorers import load_scorer


def check_scorer(
    path: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    size: Size = (64, 64),
    tolerance: float = 1e-4,
    wait_s: float = 600,
    num_gpus: float = 0,
    env: str | None = None,
) -> list[Finding]:
    """Try a scorer in an actor of the cluster that this process is connected to, or else of one of its own.

    Args:
        path: a built-in name, or the dotted path of a class or function.
        arguments: what it is built with.
        size: (height, width) of the images; a scorer may refuse others.
        tolerance: how far two scores of one image may lie apart, relative to the largest score of the batch.
        wait_s: a check that takes longer counts as hung.
        num_gpus: that its actor asks for.
        env: environment that it runs in; see `ScorerSettings.env`.

    Raises:
        UserError: the environment is not built.
    """
    arguments = dict(arguments or {})
    findings = _specification(path, arguments, lambda: load_scorer(path))
    if findings[-1].last:
        return findings
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    from kto_ray.cluster import connected
    from kto_ray.config import Cluster
    from kto_ray.score.environments.finding import interpreter

    runtime_env: dict[str, Any] = {"py_executable": str(interpreter(env))} if env else {}
    with contextlib.nullcontext() if ray.is_initialized() else connected(Cluster()):
        remote: Any = ray.remote(num_cpus=0, num_gpus=num_gpus, runtime_env=runtime_env)(ScorerTrial)
        actor = remote.remote(path, arguments, size, tolerance)

        def ask(name: str) -> Finding:
            try:
                return Finding(*ray.get(actor.check.remote(name), timeout=wait_s))
            except GetTimeoutError:
                gpus = f" (it asked for {num_gpus:g} GPUs)" if num_gpus else ""
                return Finding(name, False, f"no answer within {wait_s:g} s{gpus}", last=True)
            except RayError as error:
                return Finding(name, False, f"its process died or did not start: {shorten(error)}", last=True)

        try:
            return findings + ask_all(ask)
        finally:
            ray.kill(actor)


def ask_all(ask: Callable[[str], Finding]) -> list[Finding]:
    """Ask for every check of a scorer in turn, up to one after which nothing can be tried."""
    findings: list[Finding] = []
    for name in SCORER_CHECKS:
        findings.append(ask(name))
        if findings[-1].last:
            break
    return findings


def check_labeler(
    path: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    scorers: Sequence[str] = ("check",),
    wait_s: float = 30,
    size: Size = (64, 64),
) -> list[Finding]:
    """Try a labeler in this process, on an event loop of its own.

    Args:
        path: the dotted path of a class.
        arguments: what it is built with.
        scorers: names of the scorers whose (made up) scores come with the samples.
        wait_s: how long to wait for verdicts, which people may not give in time, and for what must not take long.
        size: (height, width) of the images.
    """
    arguments = dict(arguments or {})
    findings = _specification(path, arguments, lambda: labeler_class(path))
    if findings[-1].last:
        return findings
    trial = LabelerTrial(path, arguments, scorers, wait_s, size)
    with _event_loop() as loop:
        for name, check in LABELER_CHECKS.items():
            findings.append(_watch(loop, name, check(trial), wait_s))
            if findings[-1].last:
                break
    return findings


def check_prompts(of: PromptSet, *, wait_s: float = 600) -> list[Finding]:
    """Try a prompt set: files, or a source of one's own.

    Args:
        wait_s: another process that takes longer to make the same counts as hung.
    """
    trial = PromptsTrial(of, wait_s)
    findings: list[Finding] = []
    if is_own(of.source):
        findings = _specification(of.source, of.args, trial.find)
        if findings[-1].last:
            return findings
    for name, check in (PROMPTS_CHECKS if is_own(of.source) else FILE_CHECKS).items():
        findings.append(find(name, partial(check, trial), essential=name == "gives prompts"))
        if findings[-1].last:
            break
    return findings


def show(findings: Iterable[Finding], console: Console) -> bool:
    """Print findings, a line each and a sum; whether all passed."""
    table, findings = Table.grid(padding=(0, 2)), list(findings)
    for finding in findings:
        state = Text("ok", "green") if finding.passed else Text("FAILED", "bold red")
        table.add_row(state, Text(finding.name, no_wrap=True), Text(finding.words))
    console.print(table)
    failed = sum(not finding.passed for finding in findings)
    summary = f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed"
    console.print(summary, style="bold red" if failed else "bold green", highlight=False)
    return not failed


def _specification(path: str, arguments: Mapping[str, Any], load: Callable[[], object]) -> list[Finding]:
    """Whether there is such a class, and it can be named to another process."""

    def is_found() -> str:
        load()
        return ""

    def pickles() -> str:
        if pickle.loads(pickle.dumps((path, arguments))) != (path, arguments):
            raise Broken("the arguments change when they are pickled; use numbers, strings, lists and mappings")
        return ""

    found = find("is found", is_found, essential=True)
    return [found] if found.last else [found, find("its arguments pickle", pickles, essential=True)]


@contextlib.contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread that does not keep the process alive, whatever blocks it."""
    started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = concurrent.futures.Future()

    async def serve() -> None:
        stop = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    loop, stop = started.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(CANCEL_S)


def _watch(loop: asyncio.AbstractEventLoop, name: str, check: Coroutine[Any, Any, str], patience_s: float) -> Finding:
    """Do one check on the loop, and see to it that the loop goes on turning."""
    future = asyncio.run_coroutine_threadsafe(check, loop)
    while not future.done():
        turned = threading.Event()
        loop.call_soon_threadsafe(turned.set)
        if not turned.wait(patience_s):
            words = f"it blocks the loop's one thread for {patience_s:g} s and more; await, or use asyncio.to_thread"
            return Finding(name, False, words, last=True)
        concurrent.futures.wait([future], timeout=0.2)
    return find(name, future.result, essential=name in LABELER_ESSENTIAL)
