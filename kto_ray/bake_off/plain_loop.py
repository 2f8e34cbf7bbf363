"""The loop without Ray: draw, score, judge, train, one after the other in this process.

Uses the prompts, seeds, sampler, scorers, verdict rule, batches and `Learner` of `kto_ray.loop`, so that a run of both
makes the same images and trains on them in the same order. `running.py` compares methods with it, `benchmarks/` times
it.

Left out: everything that is stored, failures, people, policy lag, what only replicas do (`generate.offload`, `compile`
and `batch_size: auto`), and `label.on_one_class`: a round from which the objective cannot learn is passed over. Images
are drawn in the precision in which the one denoiser is held.

Shape suffixes: N images; C, H, W channels, height, width of latents (CHW) and pixels (HWC).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kto_ray.config import RunConfig
from kto_ray.diffusion.sampling import as_asked, draw
from kto_ray.errors import UserError
from kto_ray.evaluate.evaluation import STAGE
from kto_ray.evaluate.statistics import Interval, mean_interval, pass_rate
from kto_ray.label.judging import judge_round, one_sided
from kto_ray.objectives.reference import Referring
from kto_ray.pictures import picture_figures
from kto_ray.prompts import load_prompts, round_requests
from kto_ray.records import Label, SampleRequest, Score, derive_seed
from kto_ray.ruling import rule_of, table_of, values_of
from kto_ray.score.protocol import Scorer
from kto_ray.score.scorers import load_scorer
from kto_ray.train.batches import LatentsInMemory, RoundData
from kto_ray.train.worker import build_learner
from kto_ray.verdicts.rule import RuleFit

Scores = dict[str, dict[str, Score]]
"""By sample id and scorer."""


@dataclass(frozen=True)
class PlainRound:
    """What came of one round: its verdicts, the learner's health figures, and where the time went."""

    round: int
    pass_rate: float
    """Of the verdicts, the share that is desirable."""
    desirable: int
    figures: dict[str, float]
    """Empty when the round was not trained on."""
    generate_s: float
    train_s: float


@dataclass(frozen=True)
class PlainEvaluation:
    """A policy on the held-out prompts, by the cuts that the base's images were judged by."""

    policy_version: int
    pass_rate: Interval
    mean_score: Interval
    scores: Mapping[str, float] = field(default_factory=dict)
    """Mean of every scorer, held out or not."""
    diversity: float = float("nan")
    """See `kto_ray.pictures`."""


class PlainLoop:
    """One policy and all that a round needs. Policy version v has seen rounds 0 to v - 1.

    Args:
        threads: torch threads; None: leave them as they are.
        flipped: share of the verdicts that are given the wrong way round, by chance.
    """

    def __init__(self, config: RunConfig, threads: int | None = None, flipped: float = 0.0) -> None:
        if threads:
            torch.set_num_threads(threads)
        if config.generate.find_batch_size:
            raise UserError("generate.batch_size: auto is found by a replica, and this loop has none; give a number")
        self.config, self.flipped, self.version = config, flipped, 0
        self.learner = build_learner(config)
        self.scorers: dict[str, Scorer] = {
            name: load_scorer(settings.scorer or name)(**settings.args)
            for name, settings in config.label.scorers.items()
        }
        self.rule = rule_of(config.label)
        self.fit: RuleFit | None = None
        self.bar: RuleFit | None = None
        self.train_prompts = load_prompts("prompts.train", config.prompts.train)
        held_out = load_prompts("prompts.held_out", config.prompts.held_out)
        self.held_out_requests = [
            SampleRequest.make(config.seed, STAGE, prompt, index)
            for prompt in held_out[: config.evaluate.max_prompts]
            for index in range(config.evaluate.images_per_prompt)
        ]

    def run_round(self, index: int) -> PlainRound:
        """Draw a round, score it, judge it, train on it."""
        config = self.config
        requests = round_requests(
            *(self.train_prompts, config.seed, f"round-{index:05}", index),
            config.generate.images_per_round,
            config.generate.images_per_prompt,
        )
        began = time.perf_counter()
        latents_NCHW, pixels_NHWC = self._draw(requests)
        generate_s = time.perf_counter() - began

        prompts = {request.id: request.prompt.id for request in requests}
        scores, needs = self._score(pixels_NHWC, requests), config.train.objective.needs
        judged = judge_round(config.label, scores, prompts, self.fit)
        self.fit = judged.fit
        verdicts = {
            v.sample_id: (v.label == "desirable") != self._is_flipped(v.sample_id)
            for v in judged.verdicts
            if v.label in ("desirable", "undesirable")
        }
        place_of = {request.id: place for place, request in enumerate(requests)}
        order = [place_of[sample_id] for sample_id in sorted(verdicts)]  # the store's
        data = RoundData(
            round_index=index,
            latents=LatentsInMemory(latents_NCHW[order]),
            prompts=[requests[place].prompt.text for place in order],
            desirable_N=np.array([verdicts[requests[place].id] for place in order], np.bool_),
            seeds=[requests[place].seed for place in order],
            values_N=values_of(config.label, scores, prompts)[order] if needs.pairs == "scores" else None,
        )
        labels: dict[Label, int] = {
            "desirable": int(data.desirable_N.sum()),
            "undesirable": int((~data.desirable_N).sum()),
        }
        began = time.perf_counter()
        figures: dict[str, float] = {}
        if not one_sided(config.label, labels, needs):
            self._refer()
            figures, _ = self.learner.train_round(data)
        self.version += 1
        train_s = time.perf_counter() - began
        return PlainRound(index, labels["desirable"] / len(order), labels["desirable"], figures, generate_s, train_s)

    def evaluate(self, policy_version: int) -> PlainEvaluation:
        """Draw and score the held-out images; the same seeds for every policy. The base comes first: it is the bar."""
        requests = self.held_out_requests
        _, pixels_NHWC = self._draw(requests)
        scores, prompts = self._score(pixels_NHWC, requests), {r.id: r.prompt.id for r in requests}
        table = table_of(self.rule, scores, prompts)
        if self.bar is None:
            self.bar = self.rule.fit(table)
        judged, groups = self.rule.judge(table, self.bar), list(prompts.values())
        return PlainEvaluation(
            policy_version,
            pass_rate([float(label == "desirable") for label in judged.labels], groups, 0.5),
            mean_interval(judged.values_N, groups),
            {name: float(np.mean([scores[id_][name].value for id_ in prompts])) for name in self.scorers},
            picture_figures(pixels_NHWC)["pictures/diversity"],
        )

    def _refer(self) -> None:
        """Let the reference be what it is for images of the policy as it is, see `train/following.py`."""
        learner, objective = self.learner, self.learner.objective
        if not self.version or objective.needs.reference not in ("round", "ema"):
            return
        if objective.needs.reference == "round":
            learner.policy.refer_to(learner.sampling.tensors())
            return
        assert isinstance(objective, Referring)
        learner.reference.follow(learner.sampling.tensors(), objective.reference_rate, objective.reference_anchor)
        learner.policy.refer_to(learner.reference.tensors)

    def _is_flipped(self, sample_id: str) -> bool:
        rng = np.random.default_rng(derive_seed(self.config.seed, "flip", sample_id))
        return bool(rng.random() < self.flipped)

    def _draw(self, requests: Sequence[SampleRequest]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        size = self.config.generate.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        with self.learner.sampling.held():
            drawn = [
                draw(
                    self.learner.family,
                    self.learner.texts,
                    as_asked(self.config, [request.prompt.text for request in batch], self.version),
                    [request.seed for request in batch],
                    self.config.drawn(batch[0].stage),
                )
                for batch in batches
            ]
        latents, pixels, _ = zip(*drawn, strict=True)
        return np.concatenate(latents), np.concatenate(pixels)

    def _score(self, pixels_NHWC: npt.NDArray[np.uint8], requests: Sequence[SampleRequest]) -> Scores:
        prompts = [request.prompt for request in requests]
        scores: Scores = {request.id: {} for request in requests}
        for name, scorer in self.scorers.items():
            for request, value in zip(requests, scorer.score(pixels_NHWC, prompts), strict=True):
                scores[request.id][name] = Score(request.id, name, scorer.version, float(value), None)
        return scores
