"""Labelled images in the training of an online run: `data.mix`.

    a sealed round  (sampler.py)        G - k samples of every optimizer step
    a prepared set  (streaming.py)      k samples of it, by the number of the round

Both are drawn as they would be alone, each by its own gamma and passes, and put into one round's data. All samples of a
step are measured against the reference that the round has, whoever drew them.

Shape suffixes: S steps; G global batch; N samples of the round, then of the set; B samples asked for.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kto_ray.config import RunConfig, steps_for
from kto_ray.prepared import PreparedSet
from kto_ray.records import derive_seed
from kto_ray.train.batches import Latents, RoundData, draw_plan
from kto_ray.train.streaming import SetLatents, Stream

Rows = npt.NDArray[np.int64]


class Mixed:
    """Rounds of a run with images of a prepared set.

    Raises:
        ValueError: the set has nothing that the objective learns from; see `streaming.lacking`.
    """

    def __init__(self, prepared: PreparedSet, config: RunConfig) -> None:
        assert config.data is not None
        self.prepared, self.config = prepared, config
        # A round with a verdict on each image has so many steps; one of late verdicts may have more.
        self.usual = config.optimizer_steps_per_round
        self._streams: dict[int, Stream] = {}
        self._stream(self.usual)

    def _stream(self, steps: int) -> Stream:
        if steps not in self._streams:
            assert self.config.data is not None
            train = self.config.train.model_copy(update={"global_batch": self.config.mixed_places})
            settings = self.config.data.stream.model_copy(update={"steps": steps})
            self._streams[steps] = Stream(self.prepared, train, settings, self.config.seed)
        return self._streams[steps]

    def mix(self, ids: list[str], data: RoundData) -> tuple[list[str], RoundData]:
        """Ids and data of a round, with the images of the set that its steps take."""
        config, count = self.config.train, self.config.mixed_places
        steps, own = steps_for(len(data.desirable_N), config), len(data.desirable_N)
        own_SG = draw_plan(data, config, steps, config.global_batch - count, self.config.seed)
        if not len(own_SG):  # nothing to learn from in the round: no step is taken
            return ids, data
        interval = self._stream(max(self.usual, steps)).interval(data.round_index)
        members, places = np.unique(interval.plan_SG[: len(own_SG)], return_inverse=True)
        rows = interval.rows[members]
        plan_SG = np.concatenate([own_SG, own + places.reshape(len(own_SG), count)], axis=1)
        records = self.prepared.records(rows)
        kinds_N = np.repeat([0, 1], [own, len(rows)])
        mixed = replace(
            data,
            latents=MixedLatents(data.latents, own, SetLatents(self.prepared, records, np.zeros(len(rows), np.int64))),
            prompts=[*data.prompts, *(record.prompt.text for record in records)],
            desirable_N=np.concatenate([data.desirable_N, self.prepared.desirable_N[rows]]),
            seeds=(),
            plan_SG=self._shuffled(plan_SG, data.round_index),
            size_N=kinds_N,  # for a sample that is left out, another of the set or of the round stands in, as it was
        )
        return [*ids, *(record.id for record in records)], mixed

    def _shuffled(self, plan_SG: Rows, index: int) -> Rows:
        """The samples of each step in another order, so that every rank has some of both; pairs stay together."""
        together = 2 if self.config.train.objective.needs.pairs else 1
        units_SUK = plan_SG.reshape(len(plan_SG), -1, together)
        rng = np.random.default_rng(derive_seed(self.config.seed, "mix", index))
        order_SU = rng.permuted(np.tile(np.arange(units_SUK.shape[1]), (len(plan_SG), 1)), axis=1)
        return np.take_along_axis(units_SUK, order_SU[..., None], axis=1).reshape(plan_SG.shape)


class MixedLatents:
    """Of a round's samples, and after them of those of a set."""

    def __init__(self, first: Latents, count: int, second: Latents) -> None:
        self.first, self.count, self.second = first, count, second

    def prepare(self, places: Rows) -> None:
        places = places.ravel()
        self.first.prepare(places[places < self.count])
        self.second.prepare(places[places >= self.count] - self.count)

    def take(self, places_B: Rows) -> npt.NDArray[np.float32]:
        latents = dict[int, npt.NDArray[np.float32]]()
        is_second_B = places_B >= self.count
        for source, mask_B, begin in ((self.first, ~is_second_B, 0), (self.second, is_second_B, self.count)):
            if mask_B.any():
                latents.update(zip(np.flatnonzero(mask_B).tolist(), source.take(places_B[mask_B] - begin), strict=True))
        return np.stack([latents[place] for place in range(len(places_B))])
