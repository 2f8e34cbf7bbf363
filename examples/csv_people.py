"""People who work elsewhere: verdicts pulled from a CSV file that grows; docs/plugins.md walks through it."""

import asyncio
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kto_ray.label.protocol import Labeler
from kto_ray.records import Verdict
from kto_ray.samples import Samples


class GrowingCsv(Labeler):
    """Writes images and `to_judge.csv` (sample id, prompt) to a folder, and reads `verdicts.csv` (sample id, verdict)
    there, to which anybody may add lines at any time. `label.deadline_s` says how long a round waits for them."""

    name = "growing_csv"

    def __init__(self, folder: str, poll_s: float = 1) -> None:
        self.folder, self.poll_s = Path(folder), poll_s
        self.folder.mkdir(parents=True, exist_ok=True)
        self.taken = 0  # lines of verdicts.csv that were given to the loop

    async def start(self, memory: Mapping[str, Any]) -> None:
        self.taken = memory.get("taken", 0)

    async def submit(self, samples: Samples) -> None:
        for sample, pixels_HWC in zip(samples, await samples.pixels_BHWC(), strict=True):
            if not (picture := self.folder / f"{sample.id}.png").exists():
                Image.fromarray(pixels_HWC).save(picture)
                with (self.folder / "to_judge.csv").open("a", newline="") as file:
                    csv.writer(file).writerow([sample.id, sample.prompt.text])

    async def collect(self) -> Sequence[Verdict]:
        while not (new := self.lines()[self.taken :]):
            await asyncio.sleep(self.poll_s)
        self.taken += len(new)
        return [Verdict(sample_id, label, self.name, "as in verdicts.csv") for sample_id, label in new]

    def lines(self) -> list[Any]:
        file = self.folder / "verdicts.csv"
        whole, _, _ = file.read_text().rpartition("\n") if file.exists() else ("", "", "")  # the last may be half there
        return list(csv.reader(whole.splitlines()))

    def memory(self) -> Mapping[str, Any]:
        return {"taken": self.taken}
