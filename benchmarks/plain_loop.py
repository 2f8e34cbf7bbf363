"""The loop without Ray: draw, score, train, one after the other in this process.

Uses the prompts, seeds, sampler, scorer, batches and `Learner` of `kto_ray.loop`, so that a run of both makes the same
images and trains on them in the same order. `rounds.py` times it, `ablation.py` compares settings with it.

Left out: ensembles and thresholds other than absolute ones, everything that is stored, failures, policy lag, and
`label.on_one_class` (it always stops). Images are drawn in float32, in which the one U-Net of the process is trained.

Shape suffixes: N images; C, H, W channels, height, width of latents (CHW) and pixels (HWC).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kto_ray.config import RunConfig
from kto_ray.diffusion.sampling import draw, use_scheduler
from kto_ray.errors import UserError
from kto_ray.evaluate.evaluation import STAGE
from kto_ray.evaluate.statistics import Interval, mean_interval, pass_rate
from kto_ray.prompts import load_prompts, round_requests
from kto_ray.records import SampleRequest
from kto_ray.score.protocol import Scorer
from kto_ray.score.scorers import load_scorer
from kto_ray.train.batches import LatentsInMemory, RoundData
from kto_ray.train.worker import build_learner
from kto_ray.verdicts.thresholds import Absolute


@dataclass(frozen=True)
class PlainRound:
    """What came of one round: its verdicts, the learner's health figures, and where the time went."""

    round: int
    pass_rate: float
    desirable: int
    figures: dict[str, float]
    generate_s: float
    train_s: float


@dataclass(frozen=True)
class PlainEvaluation:
    """A policy on the held-out prompts."""

    policy_version: int
    pass_rate: Interval
    mean_score: Interval


class PlainLoop:
    """One policy and all that a round needs. Policy version v has seen rounds 0 to v - 1.

    Args:
        threads: torch threads; None: leave them as they are.
    """

    def __init__(self, config: RunConfig, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.config = config
        self.learner = build_learner(config)
        use_scheduler(self.learner.family.pipeline, config.generate.scheduler)
        ((name, settings),) = config.label.voting.items()  # one scorer
        self.scorer: Scorer = load_scorer(settings.scorer or name)(**settings.args)
        assert isinstance(config.label.threshold, Absolute)
        self.threshold = config.label.threshold
        self.train_prompts = load_prompts("prompts.train", config.prompts.train)
        held_out = load_prompts("prompts.held_out", config.prompts.held_out)
        self.held_out_requests = [
            SampleRequest.make(config.seed, STAGE, prompt, index)
            for prompt in held_out[: config.evaluate.max_prompts]
            for index in range(config.evaluate.images_per_prompt)
        ]

    def run_round(self, index: int) -> PlainRound:
        """Draw a round, score it, train on it.

        Raises:
            UserError: all images pass, or none does: Diffusion-KTO needs both.
        """
        config = self.config
        requests = round_requests(
            self.train_prompts, config.seed, f"round-{index:05}", index, config.generate.images_per_round
        )
        began = time.perf_counter()
        latents_NCHW, pixels_NHWC = self._draw(requests)
        generate_s = time.perf_counter() - began

        scores_N = self._score(pixels_NHWC, requests)
        desirable_N = scores_N >= self.threshold.value
        if desirable_N.all() or not desirable_N.any():
            raise UserError(f"round {index}: {desirable_N.sum()} of {len(desirable_N)} images pass")
        judged = np.abs(scores_N - self.threshold.value) >= self.threshold.dead_band
        order = [place for place in np.argsort([request.id for request in requests]) if judged[place]]  # the store's
        data = RoundData(
            index,
            LatentsInMemory(latents_NCHW[order]),
            [requests[place].prompt.text for place in order],
            desirable_N[order],
        )
        began = time.perf_counter()
        if self.learner.objective.needs.reference_of_the_round and index:
            self.learner.policy.refer_to(self.learner.policy.tensors())
        figures, _ = self.learner.train_round(data)
        train_s = time.perf_counter() - began
        return PlainRound(index, float(desirable_N.mean()), int(desirable_N.sum()), figures, generate_s, train_s)

    def evaluate(self, policy_version: int) -> PlainEvaluation:
        """Draw and score the held-out images; the same seeds for every policy."""
        _, pixels_NHWC = self._draw(self.held_out_requests)
        scores_N = self._score(pixels_NHWC, self.held_out_requests)
        prompts = [request.prompt.id for request in self.held_out_requests]
        return PlainEvaluation(
            policy_version,
            pass_rate(scores_N, prompts, self.threshold.value),
            mean_interval(scores_N, prompts),
        )

    def _draw(self, requests: Sequence[SampleRequest]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        size = self.config.generate.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        drawn = [
            draw(
                self.learner.family,
                [request.prompt.text for request in batch],
                [request.seed for request in batch],
                self.config.generate,
            )
            for batch in batches
        ]
        latents, pixels = zip(*drawn, strict=True)
        return np.concatenate(latents), np.concatenate(pixels)

    def _score(self, pixels_NHWC: npt.NDArray[np.uint8], requests: Sequence[SampleRequest]) -> npt.NDArray[np.float64]:
        return np.array(self.scorer.score(pixels_NHWC, [request.prompt for request in requests]), np.float64)
