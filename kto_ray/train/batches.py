"""Where a learner's batches come from: of a sealed round, as the sampler plans it.

`learner.py` takes its optimizer steps over any `Batches`; those of a prepared set are in `streaming.py`. Noise,
timesteps and dropped prompts of a step are drawn for the *global* batch from a seed and then sliced by rank: two ranks
train as one does.

Shape suffixes: N samples of the round; G the global batch; B a rank's share of it; C, H, W latent channels, height,
width.
"""

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kto_ray.config import Dtype, Train, steps_for
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family
from kto_ray.diffusion.loading import DTYPES
from kto_ray.diffusion.sampling import initial_noise
from kto_ray.diffusion.texts import Texts
from kto_ray.records import SampleRecord, derive_seed
from kto_ray.rounds import RoundStore
from kto_ray.train.finite import NotFiniteError
from kto_ray.train.levels import draw_levels
from kto_ray.train.sampler import plan_pairs, plan_round


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimizer step, on the device."""

    clean_BCHW: Tensor
    noise_BCHW: Tensor
    level_B: Tensor
    text_B: Conditioning
    mismatched_text_B: Conditioning
    """Of another prompt each than the image's own; what `text_B` is, where an objective does not ask for it."""
    desirable_B: Tensor

    def micro_batches(self, size: int) -> list["Batch"]:
        parts = [value.split(size) for value in vars(self).values()]
        return [Batch(*fields) for fields in zip(*parts, strict=True)]


class Batches(Protocol):
    """A source of optimizer steps: as many batches as its length says, each once, in the same order on every rank."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def leave_out(self, error: NotFiniteError) -> None:
        """The batch given last was not trained on: give another one in its place, without the samples to blame.

        Raises:
            NotFiniteError: that is not wanted, or cannot be done; says which samples they are.
        """


class CountedBatches(Batches, Protocol):
    """Those of N samples that are known by their number."""

    left_out: set[int]
    """Samples to blame for steps that were not taken."""

    @property
    def draws_N(self) -> npt.NDArray[np.int64]:
        """How often each sample is drawn, by all ranks together."""
        ...


class TrainingData(Protocol):
    """Samples to train on once."""

    def batches(
        self, config: Train, family: Family, texts: Texts, seed: int, device: torch.device, rank: int, ranks: int
    ) -> CountedBatches:
        """See `RoundBatches`."""
        ...

    @property
    def seconds(self) -> float:
        """That training has waited for storage so far."""
        ...


class Latents(Protocol):
    """Clean latents of the samples of a round, by their place in it."""

    def prepare(self, places: npt.NDArray[np.int64]) -> None:
        """These will be asked for: fetch at once what is not here yet."""

    def take(self, places_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(B, C, H, W), of places that were prepared."""
        ...


class LatentsInMemory:
    """All of them, float32 (N, C, H, W)."""

    def __init__(self, latents_NCHW: npt.NDArray[np.float32]) -> None:
        self.latents_NCHW = latents_NCHW

    def prepare(self, places: npt.NDArray[np.int64]) -> None:
        """They are here."""

    def take(self, places_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self.latents_NCHW[places_B]


class StoredLatents:
    """Read from rounds, each once, and only those that this rank trains on."""

    def __init__(self, rounds: RoundStore, records: Sequence[SampleRecord]) -> None:
        self.rounds, self.records = rounds, records
        self.read: dict[int, npt.NDArray[np.float32]] = {}
        self.seconds = 0.0  # that reading took

    def prepare(self, places: npt.NDArray[np.int64]) -> None:
        if new := sorted(set(places.ravel().tolist()) - self.read.keys()):
            began = time.monotonic()
            latents_BCHW = self.rounds.latents_of([self.records[place] for place in new])
            self.read.update(zip(new, latents_BCHW, strict=True))
            self.seconds += time.monotonic() - began

    def take(self, places_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.stack([self.read[place] for place in places_B.tolist()])


@dataclass(frozen=True)
class RoundData:
    """What a rank needs of a sealed round: only samples with a verdict, within the lag limit, in the store's order."""

    round_index: int
    latents: Latents
    prompts: Sequence[str]
    desirable_N: npt.NDArray[np.bool_]
    seeds: Sequence[int] = ()
    """That the images were drawn from; for `train.own_noise`."""
    dtype: Dtype = "float32"
    """That they were drawn in; `generate.dtype`."""
    values_N: npt.NDArray[np.float64] | None = None
    """What they are compared by, where pairs are made of scores; NaN: nothing is known."""
    plan_SG: npt.NDArray[np.int64] | None = None
    """The samples of every step, where whoever gathered them has drawn them, too; None: `train/sampler.py` draws."""
    first_step: int = 0
    """Number of the plan's first step in its round; noise goes by it."""
    size_N: npt.NDArray[np.int64] | None = None
    """Which samples are of one size, where not all are: the plan has one size a step."""

    def batches(
        self, config: Train, family: Family, texts: Texts, seed: int, device: torch.device, rank: int, ranks: int
    ) -> "RoundBatches":
        return RoundBatches(self, config, family, texts, seed, device, rank, ranks)

    @property
    def kind_N(self) -> npt.NDArray[np.int64]:
        """Of each sample, its class and size as one number."""
        size_N = np.zeros(len(self.desirable_N), np.int64) if self.size_N is None else self.size_N
        return 2 * size_N + self.desirable_N

    @property
    def seconds(self) -> float:
        return self.latents.seconds if isinstance(self.latents, StoredLatents) else 0.0


class RoundBatches:
    """The batches of one round: a pure function of (seed, round, verdicts), at any step and after any restart.

    What `train.objective` needs decides what is in them: desirable samples only, pairs, another prompt for each image
    besides its own, prompts with a prefix.

    Args:
        texts: the family's prompts, encoded.
        rank, ranks: which slice of every global batch is this process's.
    """

    def __init__(
        self,
        data: RoundData,
        config: Train,
        family: Family,
        texts: Texts,
        seed: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.data, self.config, self.seed, self.device = data, config, seed, device
        self.rank, self.ranks, self.needs = rank, ranks, config.objective.needs
        self.noise_dtype = family.noise_dtype or DTYPES[data.dtype]
        self.level_draw = family.noise.level_draw if config.noise_draw == "auto" else config.noise_draw
        self.left_out: set[int] = set()
        self.step = 0
        steps = steps_for(len(data.desirable_N), config) if data.plan_SG is None else len(data.plan_SG)
        self.plan = self._plan(steps)
        desirable, undesirable = self.needs.prefixes or ("", "")
        prompts = [
            (desirable if yes else undesirable) + prompt
            for prompt, yes in zip(data.prompts, data.desirable_N, strict=True)
        ]
        known = sorted(set(prompts))
        place_of = {text: place for place, text in enumerate(known, start=1)}  # the first is that of dropped ones
        self.text_P = Conditioning.cat([texts.nothing(), *([texts.encode(known)] if known else [])])
        self.text_index_N = torch.tensor([place_of[prompt] for prompt in prompts], dtype=torch.int64)

    @property
    def draws_N(self) -> npt.NDArray[np.int64]:
        """How often each sample of the round is drawn, by all ranks together."""
        return np.bincount(self.plan.ravel(), minlength=len(self.data.desirable_N))

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        self.step = 0
        while self.step < len(self.plan):
            self.step += 1  # `leave_out` takes it back
            seed = derive_seed(self.seed, self.data.round_index, self.data.first_step + self.step - 1)
            yield self._batch(self.plan[self.step - 1], seed)

    def leave_out(self, error: NotFiniteError) -> None:
        """See `Batches`."""
        picks_G = self.plan[self.step - 1]
        guilty = set(picks_G[error.samples].tolist())
        self.left_out |= guilty
        if guilty and self.config.on_nonfinite == "leave_out":
            others = self._plan(len(self.plan) - self.step + 1)
            if len(others):
                self.step -= 1
                self.plan[self.step :] = others
                return
        step = self.data.first_step + self.step - 1
        raise NotFiniteError(error.what, step, guilty, picks_G.tolist()) from error

    def _plan(self, steps: int) -> npt.NDArray[np.int64]:
        """See `plan_round` and `plan_pairs`; over the samples that are not left out. No steps without any, or pairs."""
        config = self.config
        if self.data.plan_SG is not None:
            rest_SG = self.data.plan_SG[len(self.data.plan_SG) - steps :]
            rest_SG = instead(rest_SG, self.data.kind_N, self.left_out, 2 if self.needs.pairs else 1)
            self.data.latents.prepare(rest_SG[:, self._share(config.global_batch)])
            return rest_SG
        plan_SG = draw_plan(self.data, config, steps, config.global_batch, self.seed, self.left_out)
        self.data.latents.prepare(plan_SG[:, self._share(config.global_batch)])
        return plan_SG

    def _share(self, batch: int) -> slice:
        """This rank's places of a global batch."""
        return slice(self.rank * batch // self.ranks, (self.rank + 1) * batch // self.ranks)

    def _batch(self, picks_G: npt.NDArray[np.int64], seed: int) -> Batch:
        """This rank's slice of the global batch; everything random is drawn for all of it."""
        generator, config = torch.Generator().manual_seed(seed), self.config
        mine = self._share(len(picks_G))
        clean_BCHW = torch.from_numpy(self.data.latents.take(picks_G[mine]))
        noise_GCHW = torch.randn((len(picks_G), *clean_BCHW.shape[1:]), generator=generator)
        level_G = draw_levels(self.level_draw, len(picks_G), config.noise_range, generator)
        dropped_G = torch.rand(len(picks_G), generator=generator) < config.prompt_dropout
        if config.own_noise:
            for place in torch.nonzero(torch.rand(len(picks_G), generator=generator) < config.own_noise)[:, 0].tolist():
                sample_seed = self.data.seeds[picks_G[place]]
                noise_GCHW[place] = initial_noise(sample_seed, noise_GCHW.shape[1:], self.noise_dtype)
        if self.needs.pairs:
            for drawn_G in (noise_GCHW, level_G, dropped_G):
                drawn_G[1::2] = drawn_G[0::2]
        desirable_G = self.data.desirable_N[picks_G]
        if self.needs.pairs:
            desirable_G = np.arange(len(picks_G)) % 2 == 0
        own_G = self.text_index_N[picks_G]
        return Batch(
            clean_BCHW=clean_BCHW.to(self.device),
            noise_BCHW=noise_GCHW[mine].to(self.device),
            level_B=level_G[mine].to(self.device),
            text_B=self._texts(own_G.masked_fill(dropped_G, 0)[mine]),
            mismatched_text_B=self._texts((_mismatched(own_G) if self.needs.mismatched else own_G)[mine]),
            desirable_B=torch.from_numpy(desirable_G)[mine].to(self.device),
        )

    def _texts(self, rows_B: Tensor) -> Conditioning:
        return self.text_P[rows_B].to(self.device, torch.float32)


def draw_plan(
    data: RoundData, config: Train, steps: int, size: int, seed: int, left_out: Set[int] = frozenset()
) -> npt.NDArray[np.int64]:
    """What steps of so many samples take of a round, (S, size); see `plan_round` and `plan_pairs`."""
    needs = config.objective.needs
    wanted = [n for n, yes in enumerate(data.desirable_N) if yes or needs.undesirable]
    members = np.array([n for n in wanted if n not in left_out], np.int64)
    desirable_N = data.desirable_N[members]
    if needs.pairs:
        prompts = [data.prompts[n] for n in members]
        values_N = data.desirable_N if needs.pairs == "verdicts" else data.values_N
        assert values_N is not None, "pairs of scores, without any"
        places_SG = plan_pairs(values_N[members].astype(np.float64), prompts, steps, size, seed, data.round_index)
    else:
        steps = steps if len(members) else 0
        places_SG = plan_round(desirable_N, config.gamma, steps, size, seed, data.round_index, config.max_draws)
    return members[places_SG]


def instead(
    plan_SG: npt.NDArray[np.int64], kind_N: npt.NDArray[np.int64], left_out: Set[int], together: int = 1
) -> npt.NDArray[np.int64]:
    """A plan without some samples: in the place of each stands another of its kind that is in the plan, in turn.

    No steps where a kind has no others.

    Args:
        kind_N: what may stand for what: samples of one class and size.
        together: how many successive samples of a step belong together, and go together; 2 for pairs.
    """
    units_UK = plan_SG.reshape(-1, together).copy()
    lacking_U = np.isin(units_UK, np.array(sorted(left_out), np.int64)).any(axis=1)
    kind_U = kind_N[units_UK[:, 0]]
    for kind in np.unique(kind_U[lacking_U]):
        of_kind_U = kind_U == kind
        others = np.flatnonzero(of_kind_U & ~lacking_U)
        if not len(others):
            return plan_SG[:0]
        places = np.flatnonzero(of_kind_U & lacking_U)
        units_UK[places] = units_UK[np.resize(others, len(places))]
    return units_UK.reshape(plan_SG.shape)


def _mismatched(own_G: Tensor) -> Tensor:
    """For each image the nearest prompt before it that is not its own; in a batch of one prompt there is none."""
    mismatched_G = own_G
    for places in range(1, len(own_G)):
        mismatched_G = torch.where(mismatched_G == own_G, own_G.roll(places), mismatched_G)
    return mismatched_G
