"""Batches of a prepared set that need not fit in memory: which images every step takes, and how they get there.

A run on a prepared set goes in intervals of `data.stream.steps` optimizer steps, each of which is to the workers what a
round is online: a checkpoint ends it. What an interval draws is a pure function of the set, the seed and the interval's
number: every rank computes the same, takes its slice, and so does one that is started again, on any number of ranks.

    Strand           the images of one size and class, in shuffled passes without end
    Stream           what each interval draws: sizes by how many images have them, classes by gamma, images from strands
    StreamInterval   one interval's samples; its batches come segment by segment, the next read while one is trained on

Shape suffixes: S steps; G global batch; N samples of the interval; C, H, W latent channels, height, width.
"""

import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kto_ray.config import Train
from kto_ray.config.preparing import StreamSettings
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.texts import Texts
from kto_ray.prepared import PreparedSet
from kto_ray.records import SampleRecord, derive_seed
from kto_ray.train.batches import Batch, RoundBatches, RoundData, instead
from kto_ray.train.finite import NotFiniteError

Rows = npt.NDArray[np.int64]
SEGMENT_BYTES = 2**25
"""Of the latents of a segment, at most, unless a step has more; two segments are in memory."""
MOST_OF_A_SEGMENT = 4096
"""Samples: their prompts are in memory, too."""


class Strand:
    """Rows in passes: each comes once before any comes again.

    A pass takes the shards in a random order and mixes the rows of as many successive shards as hold `shuffle` rows, so
    that rows which are drawn one after the other lie in few files.

    Args:
        rows: of the set.
        shard_N: the number of each row's shard, by its number in the set.
        seed: what else tells it from other strands.
    """

    def __init__(self, rows: Rows, shard_N: Rows, shuffle: int, seed: tuple[object, ...]) -> None:
        self.rows, self.shuffle, self.seed = rows, shuffle, seed
        order = np.argsort(shard_N[rows], kind="stable")
        starts = np.flatnonzero(np.diff(shard_N[rows][order], prepend=-1))
        self._shards = np.split(rows[order], starts[1:])
        self._last: tuple[int, Rows] = (-1, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, start: int, count: int) -> Rows:
        """So many rows from a place of the endless sequence on."""
        taken = [self.rows[:0]]
        while count:
            number, place = divmod(start, len(self.rows))
            here = self._pass(number)[place : place + count]
            taken.append(here)
            start, count = start + len(here), count - len(here)
        return np.concatenate(taken)

    def _pass(self, number: int) -> Rows:
        if self._last[0] != number:
            rng = np.random.default_rng(derive_seed("strand", *self.seed, number))
            window: list[Rows] = []
            mixed = []
            for place in rng.permutation(len(self._shards)):
                window.append(self._shards[place])
                if sum(map(len, window)) >= self.shuffle:
                    mixed.append(rng.permutation(np.concatenate(window)))
                    window = []
            mixed += [rng.permutation(np.concatenate(window))] if window else []
            self._last = number, np.concatenate(mixed)
        return self._last[1]


class Stream:
    """What every interval of a run draws from a prepared set.

    A step is of one size, drawn by how many images have it. Each of its places is desirable with probability
    `train.gamma` (any image, where that is None), and takes the next of its strand; a size of one class fills all
    places from it. For pairs, the next prompt with images of both classes gives one of each, drawn by chance.

    Args:
        seed: the run's.

    Raises:
        ValueError: the set has nothing that the objective learns from; see `lacking`.
    """

    def __init__(self, prepared: PreparedSet, train: Train, settings: StreamSettings, seed: int) -> None:
        if why := lacking(prepared, train):
            raise ValueError(why)
        self.prepared, self.train, self.settings, self.seed = prepared, train, settings, seed
        needs, desirable_N, size_N = train.objective.needs, prepared.desirable_N, prepared.size_N
        self.paired = needs.pairs is not None
        self._members = _pairs(prepared) if self.paired else {}
        self.strands: dict[tuple[int, str], Strand] = {}
        for size in range(int(size_N.max()) + 1):
            of_size = size_N == size
            if self.paired:
                prompts = np.array(sorted(prompt for prompt, its in self._members if its == size), np.int64)
                self._add(size, "pairs", prompts, prompts)
            elif train.gamma is None and needs.undesirable:
                self._add(size, "all", np.flatnonzero(of_size), prepared.shard_N)
            else:
                self._add(size, "yes", np.flatnonzero(of_size & desirable_N), prepared.shard_N)
                if needs.undesirable:
                    self._add(size, "no", np.flatnonzero(of_size & ~desirable_N), prepared.shard_N)
        self._weights = np.zeros(int(size_N.max()) + 1)
        for (size, _), strand in self.strands.items():
            self._weights[size] += len(strand)
        self._begins: list[dict[tuple[int, str], int]] = [dict.fromkeys(self.strands, 0)]  # by interval

    def _add(self, size: int, name: str, rows: Rows, shard_N: Rows) -> None:
        if len(rows):
            shards = np.arange(int(rows.max()) + 1) if self.paired else shard_N
            self.strands[size, name] = Strand(rows, shards, self.settings.shuffle, (self.seed, size, name))

    def interval(self, index: int) -> "StreamInterval":
        """What the steps of an interval take."""
        plan_SG = self._draw(index)
        rows, places = np.unique(plan_SG, return_inverse=True)
        return StreamInterval(index, self.prepared, rows, places.reshape(plan_SG.shape), 2 if self.paired else 1)

    def passes(self, intervals: int) -> dict[str, float]:
        """How often, on average, the images of each strand's class are drawn in so many intervals."""
        begins = self._begin(intervals)
        drawn: dict[str, int] = {}
        images: dict[str, int] = {}
        for (size, name), strand in self.strands.items():
            drawn[name] = drawn.get(name, 0) + begins[size, name]
            images[name] = images.get(name, 0) + len(strand)
        return {name: drawn[name] / images[name] for name in drawn}

    def _draw(self, index: int) -> Rows:
        begin, plan = dict(self._begin(index)), []
        rng = np.random.default_rng(derive_seed(self.seed, "pairs", index))
        for counts in self._counts(index):
            row = np.empty(self.train.global_batch, np.int64)
            for strand, places in counts.items():
                count = len(places)
                taken = self.strands[strand].take(begin[strand], count)
                begin[strand] += count
                if self.paired:
                    for place, prompt in zip(places.tolist(), taken.tolist(), strict=True):
                        better, worse = self._members[prompt, strand[0]]
                        row[2 * place], row[2 * place + 1] = rng.choice(better), rng.choice(worse)
                else:
                    row[places] = taken
            plan.append(row)
        return np.stack(plan)

    def _counts(self, index: int) -> Iterator[dict[tuple[int, str], Rows]]:
        """For each step, the places of the global batch that each strand fills; of pairs, the numbers of pairs."""
        rng = np.random.default_rng(derive_seed(self.seed, "stream", index))
        sizes_S = rng.choice(len(self._weights), self.settings.steps, p=self._weights / self._weights.sum())
        gamma = self.train.gamma or 0.0
        wants_SG = rng.random((self.settings.steps, self.train.global_batch)) < gamma
        for size, wants_G in zip(sizes_S.tolist(), wants_SG, strict=True):
            names = [name for its, name in self.strands if its == size]
            if names == ["yes", "no"]:
                yield {(size, "yes"): np.flatnonzero(wants_G), (size, "no"): np.flatnonzero(~wants_G)}
            else:
                yield {(size, names[0]): np.arange(len(wants_G) // 2 if self.paired else len(wants_G))}

    def _begin(self, index: int) -> dict[tuple[int, str], int]:
        """Where in each strand an interval begins: at what those before it have drawn."""
        while len(self._begins) <= index:
            begin = dict(self._begins[-1])
            for counts in self._counts(len(self._begins) - 1):
                for strand, places in counts.items():
                    begin[strand] += len(places)
            self._begins.append(begin)
        return self._begins[index]


def lacking(prepared: PreparedSet, train: Train) -> str | None:
    """What the objective learns from and the set has none of; None: nothing is lacking."""
    needs, yes = train.objective.needs, int(prepared.desirable_N.sum())
    no = len(prepared.desirable_N) - yes
    if not yes or (needs.undesirable and not no):
        wants = "both desirable and undesirable images" if needs.undesirable else "desirable images"
        return f"{train.objective.kind} needs {wants}, and the data has {yes} desirable and {no} undesirable ones"
    if needs.pairs and not _pairs(prepared):
        return f"{train.objective.kind} learns from pairs, and no prompt has both a desirable and an undesirable image"
    return None


def _pairs(prepared: PreparedSet) -> dict[tuple[int, int], tuple[Rows, Rows]]:
    """By prompt and size, the desirable and the undesirable rows, where there are both."""
    keys = prepared.prompt_N << 16 | prepared.size_N
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    found = {}
    for rows in np.split(order, starts[1:]):
        yes = prepared.desirable_N[rows]
        if yes.any() and not yes.all():
            found[int(prepared.prompt_N[rows[0]]), int(prepared.size_N[rows[0]])] = rows[yes], rows[~yes]
    return found


class SetLatents:
    """Latents of some records of a prepared set: what was prepared is held, and nothing else."""

    def __init__(self, prepared: PreparedSet, records: Sequence[SampleRecord], size_N: Rows) -> None:
        self.prepared, self.records, self.size_N = prepared, records, size_N
        self._read: dict[int, npt.NDArray[np.float32]] = {}

    def prepare(self, places: Rows) -> None:
        new = np.array(sorted(set(places.ravel().tolist()) - self._read.keys()), np.int64)
        for size in np.unique(self.size_N[new]):
            alike = new[self.size_N[new] == size].tolist()
            latents_BCHW = self.prepared.latents_of([self.records[place] for place in alike])
            self._read.update(zip(alike, latents_BCHW, strict=True))

    def take(self, places_B: Rows) -> npt.NDArray[np.float32]:
        return np.stack([self._read[place] for place in places_B.tolist()])


@dataclass
class StreamInterval:
    """Samples that an interval draws, each once, and which of them every step takes."""

    index: int
    prepared: PreparedSet
    rows: Rows
    """Of the set."""
    plan_SG: Rows
    """Places in `rows`."""
    together: int = 1
    """2 where the samples of a step come in pairs."""
    waited: list[float] = field(default_factory=list)

    def batches(
        self, config: Train, family: Family, texts: Texts, seed: int, device: torch.device, rank: int, ranks: int
    ) -> "IntervalBatches":
        return IntervalBatches(self, (config, family, texts, seed, device, rank, ranks))

    @property
    def seconds(self) -> float:
        return sum(self.waited)

    @cached_property
    def ids(self) -> list[str]:
        ids: list[str] = self.prepared.table["sample_id"].take(self.rows).to_pylist()
        return ids

    @cached_property
    def draws_N(self) -> Rows:
        """How often each sample is to be drawn."""
        return np.bincount(self.plan_SG.ravel(), minlength=len(self.rows))

    @property
    def desirable_N(self) -> npt.NDArray[np.bool_]:
        return self.prepared.desirable_N[self.rows]

    @property
    def size_N(self) -> Rows:
        return self.prepared.size_N[self.rows]

    @cached_property
    def steps_at_once(self) -> int:
        """Steps of a segment."""
        a_sample: int = self.prepared.latents_of(self.prepared.records(self.rows[:1])).nbytes
        samples = min(MOST_OF_A_SEGMENT, SEGMENT_BYTES // a_sample)
        return max(1, samples // len(self.plan_SG[0]))

    def segment(self, start: int, left_out: Set[int]) -> tuple[Rows, RoundData]:
        """The samples of the steps from `start` on, as places in `rows`, and those steps over them.

        Raises:
            NotFiniteError: of a class and size, all samples that are left of the interval are left out.
        """
        kind_N = 2 * self.size_N + self.desirable_N
        rest_SG = instead(self.plan_SG[start:], kind_N, left_out, self.together)
        if not len(rest_SG):
            raise NotFiniteError("denoising error", start, left_out)
        members, places = np.unique(rest_SG[: self.steps_at_once], return_inverse=True)
        records = self.prepared.records(self.rows[members])
        return members, RoundData(
            round_index=self.index,
            latents=SetLatents(self.prepared, records, self.size_N[members]),
            prompts=[record.prompt.text for record in records],
            desirable_N=self.desirable_N[members],
            plan_SG=places.reshape(-1, self.plan_SG.shape[1]),
            first_step=start,
            size_N=self.size_N[members],
        )


class IntervalBatches:
    """The batches of an interval; see `Batches`. A thread reads a segment while the one before is trained on.

    Args:
        arguments: of `RoundBatches`, besides its data.
    """

    def __init__(self, interval: StreamInterval, arguments: tuple[Any, ...]) -> None:
        self.interval, self.arguments = interval, arguments
        self.left_out: set[int] = set()
        self._members: Rows = np.zeros(0, np.int64)
        self._segment: RoundBatches | None = None
        self._plans: dict[int, Rows] = {}  # by their first steps, as they were trained

    @property
    def draws_N(self) -> npt.NDArray[np.int64]:
        plans = [plan_SG.ravel() for plan_SG in self._plans.values()]
        return np.bincount(np.concatenate([self._members[:0], *plans]), minlength=len(self.interval.rows))

    def __len__(self) -> int:
        return len(self.interval.plan_SG)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self), self.interval.steps_at_once)
        with ThreadPoolExecutor(1, thread_name_prefix="stream") as thread:
            coming = self._read_ahead(thread, 0)
            for start in starts:
                began = time.monotonic()
                left_out, (members, segment) = coming[0], coming[1].result()
                if left_out != self.left_out:  # found after it was read
                    members, segment = self._read(start, self.left_out)
                self.interval.waited.append(time.monotonic() - began)
                self._members, self._segment = members, segment
                if start + self.interval.steps_at_once < len(self):
                    coming = self._read_ahead(thread, start + self.interval.steps_at_once)
                yield from segment
                self._plans[start] = members[segment.plan]

    def _read_ahead(
        self, thread: ThreadPoolExecutor, start: int
    ) -> "tuple[set[int], Future[tuple[Rows, RoundBatches]]]":
        left_out = set(self.left_out)
        return left_out, thread.submit(self._read, start, left_out)

    def _read(self, start: int, left_out: set[int]) -> tuple[Rows, RoundBatches]:
        members, data = self.interval.segment(start, left_out)
        return members, RoundBatches(data, *self.arguments)

    def leave_out(self, error: NotFiniteError) -> None:
        """See `Batches`."""
        assert self._segment is not None
        try:
            self._segment.leave_out(error)
        except NotFiniteError as told:
            guilty, drawn = (self._members[numbers].tolist() for numbers in (told.samples, told.drawn))
            raise NotFiniteError(told.what, told.step, guilty, drawn) from error
        finally:
            self.left_out |= set(self._members[sorted(self._segment.left_out)].tolist())
