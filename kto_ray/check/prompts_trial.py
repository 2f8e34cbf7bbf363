"""What a prompt set is tried with; `contract.py` asks for it.

A check returns a remark and raises when a promise of `PromptSource` is broken: `Broken`, in words that say what would
be right, or whatever the source itself raised. `python -m kto_ray.check.prompts_trial` is the other process that must
make the same.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

from kto_ray.check.finding import Broken
from kto_ray.config import PromptSet
from kto_ray.prompts import load_prompts, load_source
from kto_ray.records import Prompt

FIELD = "prompts.train"


class PromptsTrial:
    """A prompt set and what it gave.

    Args:
        wait_s: how long another process may take to make the same.
    """

    def __init__(self, of: PromptSet, wait_s: float) -> None:
        self.of, self.wait_s = of, wait_s
        self.prompts: list[Prompt] = []

    def find(self) -> object:
        return load_source(FIELD, self.of.source)

    def give(self) -> str:
        self.prompts = load_prompts(FIELD, self.of)
        different = {prompt.id: prompt for prompt in self.prompts}
        turns = "" if len(different) == len(self.prompts) else f", {len(self.prompts)} turns a pass"
        columns = Counter(name for prompt in different.values() for name in prompt.metadata)
        metadata = f"; metadata: {', '.join(columns)}" if columns else ""
        return f"{len(different)} prompts{turns}; the first is {self.prompts[0].text!r}{metadata}"

    def differ(self) -> str:
        texts = Counter(" ".join(prompt.text.casefold().split()) for prompt in {p.id: p for p in self.prompts}.values())
        if repeated := {text: count for text, count in texts.items() if count > 1}:
            text, count = max(repeated.items(), key=lambda pair: pair[1])
            return f"{len(repeated)} texts are there several times, {text!r} {count} times"
        return ""

    def give_again(self) -> str:
        again = load_prompts(FIELD, self.of)
        for number, (before, now) in enumerate(zip_longest(self.prompts, again), start=1):
            if before != now:
                raise Broken(
                    f"number {number} is first {before and before.text!r} and then {now and now.text!r}; let them "
                    "and their order follow from the arguments alone"
                )
        return ""

    def give_elsewhere(self) -> str:
        """In a process in which sets and dictionaries of texts have another order, and nothing is left from here."""
        told = subprocess.run(
            [sys.executable, "-m", __name__],
            input=self.of.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=self.wait_s,
            env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(map(str, (Path.cwd(), *sys.path)))},
            check=False,
        )
        if told.returncode:
            raise Broken(f"another process cannot make it: {told.stderr.strip().splitlines()[-1]}")
        if told.stdout.strip() != digest(self.prompts):
            raise Broken(
                "another process makes other prompts, or another order: a random seed, the time, the order of "
                "a set? Let them follow from the arguments alone"
            )
        return ""


def digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


FILE_CHECKS: dict[str, Callable[[PromptsTrial], str]] = {
    "gives prompts": PromptsTrial.give,
    "its texts differ": PromptsTrial.differ,
}
PROMPTS_CHECKS: dict[str, Callable[[PromptsTrial], str]] = FILE_CHECKS | {
    "gives the same when it is built again": PromptsTrial.give_again,
    "gives the same in another process": PromptsTrial.give_elsewhere,
}

if __name__ == "__main__":
    print(digest(load_prompts(FIELD, PromptSet.model_validate_json(sys.stdin.read()))))
