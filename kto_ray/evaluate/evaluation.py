"""Held-out evaluation: the same prompts and seeds from any policy, scored, stored, and compared with the base.

The loop asks for an evaluation of a policy version; images and scores are kept under `evaluations/<version>` in the
form of a round, so that a resumed run does not draw them again.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kto_ray.config import RunConfig
from kto_ray.evaluate.report import Pair
from kto_ray.evaluate.statistics import EvaluationSummary, mean_interval, median_win_rate, pass_rate
from kto_ray.generate.client import Generators
from kto_ray.label.pool import ScorerPool
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest
from kto_ray.rounds import Round
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

STAGE = "evaluation"


class Evaluation:
    """Evaluates policies on the held-out prompts of a run."""

    def __init__(self, config: RunConfig, run: Storage, held_out: Sequence[Prompt]) -> None:
        self.config, self.run = config, run
        self.prompts = held_out[: config.evaluate.max_prompts]
        self.requests = [
            SampleRequest.make(config.seed, STAGE, prompt, index)
            for prompt in self.prompts
            for index in range(config.evaluate.images_per_prompt)
        ]

    def _round(self, version: int) -> Round:
        return Round(self.run / "evaluations" / f"{version:05}", STAGE)

    async def run_for(self, policy: PolicyRef, generators: Generators, pool: ScorerPool) -> EvaluationSummary:
        """Draw and score what is not there yet, then sum up."""
        folder = self._round(policy.version)
        if not folder.sealed:
            async for samples in generators.stream(folder.missing(self.requests), policy):
                folder.add_samples(samples)
            unscored = [sample for sample in folder.samples() if sample.id not in folder.scored_ids]
            size = self.config.generate.batch_size
            for start in range(0, len(unscored), size):
                folder.add_judgements(await pool.score(unscored[start : start + size]), [])
            folder.seal(policy_version=policy.version, policy_digest=policy.digest)
        return self.summary(policy.version)

    def summary(self, version: int) -> EvaluationSummary:
        """Figures of a sealed evaluation."""
        scores_PK = self._scores(version)
        groups = np.repeat(np.arange(scores_PK.shape[0]), scores_PK.shape[1])
        win_rate = median_win_rate(scores_PK, self._scores(0)) if version else None
        return EvaluationSummary(
            policy_version=version,
            mean_score=mean_interval(scores_PK.ravel(), groups),
            pass_rate=pass_rate(scores_PK.ravel(), groups, self.config.label.threshold),
            win_rate=win_rate,
            images=scores_PK.size,
            failed=int(np.isnan(scores_PK).sum()),
        )

    def _scores(self, version: int) -> npt.NDArray[np.float64]:
        """Scores (P prompts, K images), NaN where the scorer failed."""
        values = {score.sample_id: score.value for score in self._round(version).scores()}
        scores = [values[request.id] for request in self.requests]
        return np.array(scores, np.float64).reshape(len(self.prompts), -1)

    def pairs(self, version: int, count: int) -> list[Pair]:
        """The first `count` prompts (spread over the set) with their images from the base and from a version."""
        chosen = [
            self.prompts[i] for i in np.linspace(0, len(self.prompts) - 1, min(count, len(self.prompts))).astype(int)
        ]

        def images(version: int) -> dict[str, list[Sample]]:
            by_prompt: dict[str, list[Sample]] = {prompt.id: [] for prompt in chosen}
            for sample in sorted(self._round(version).samples(), key=lambda sample: sample.index):
                if sample.prompt.id in by_prompt:
                    by_prompt[sample.prompt.id].append(sample)
            return by_prompt

        before, after = images(0), images(version)
        scored = [{score.sample_id: score.value for score in self._round(v).scores()} for v in (0, version)]
        return [
            Pair(
                prompt=prompt.text,
                base=[sample.pixels_HWC for sample in before[prompt.id]],
                final=[sample.pixels_HWC for sample in after[prompt.id]],
                base_scores=[scored[0][sample.id] for sample in before[prompt.id]],
                final_scores=[scored[1][sample.id] for sample in after[prompt.id]],
            )
            for prompt in chosen
        ]
