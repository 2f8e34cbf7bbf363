"""Held-out evaluation: the same prompts and seeds from any policy, scored, judged, and compared with the base.

The loop asks for an evaluation of a policy version; images and scores are kept under `evaluations/<version>` (those
with fresh seeds under `fresh_evaluations/<version>`) in the form of a round, so that a resumed run does not draw them
again. All policies are judged by the run's rule as fitted to the base's images: a quantile of the base's scores is the
same bar for everybody.
"""

import asyncio
import contextlib
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kto_ray.concurrency import Gathering, together
from kto_ray.config import HELD_OUT_STAGES, RunConfig
from kto_ray.errors import UserError
from kto_ray.evaluate.report import Pair, save_png_grid
from kto_ray.evaluate.statistics import (
    EvaluationSummary,
    Interval,
    mean_difference,
    mean_interval,
    median_win_rate,
    pass_rate,
    pass_rate_difference,
)
from kto_ray.generate.client import Generators
from kto_ray.generate.drawn import require_drawn
from kto_ray.parts import write_part
from kto_ray.records import PolicyRef, Prompt, Sample, SampleRequest, Score
from kto_ray.rounds import Round, by_sample
from kto_ray.ruling import rule_of, table_of
from kto_ray.samples import Samples
from kto_ray.score.pool import Scorers, require_scored
from kto_ray.storage import Storage
from kto_ray.verdicts.rule import Judgement, RuleFit

logger = logging.getLogger(__name__)

STAGE, FRESH_STAGE = HELD_OUT_STAGES
PICTURED_PROMPTS = 12
UNKNOWN = Interval(math.nan, math.nan, math.nan)
"""Nothing was judged: no scorer votes, all failed, or the base's images all score the same and give no bar."""


class Evaluation:
    """Evaluates policies on the held-out prompts of a run.

    Args:
        fresh: draw from other seeds than those by which the run is ended (`evaluate.stop_at_pass_rate`): whoever stops
            when the figures are good enough must not report these figures. Everything is apart then, base and bar, too.
    """

    def __init__(self, config: RunConfig, run: Storage, held_out: Sequence[Prompt], fresh: bool = False) -> None:
        self.config, self.run, self.fresh = config, run, fresh
        self.stage = FRESH_STAGE if fresh else STAGE
        self.prompts = held_out[: config.evaluate.max_prompts]
        self.requests = [
            SampleRequest.make(config.seed, self.stage, prompt, index)
            for prompt in self.prompts
            for index in range(config.evaluate.images_per_prompt)
        ]
        self.rule = rule_of(config.label)
        self._rounds: dict[int, Round] = {}

    def round(self, version: int) -> Round:
        """The folder of a policy's images and scores."""
        return Round(self.run / f"{self.stage}s" / f"{version:05}", self.stage)

    def _round(self, version: int) -> Round:
        """That of the base and the last one that was asked for are kept in memory, without arrays."""
        if version not in self._rounds:
            self._rounds = {kept: round_ for kept, round_ in self._rounds.items() if kept == 0}
            self._rounds[version] = self.round(version)
        return self._rounds[version]

    async def run_for(self, policy: PolicyRef, generators: Generators, scorers: Scorers) -> EvaluationSummary:
        """Draw and score what is not there yet, as a stream, then sum up."""
        folder = self._round(policy.version)
        await asyncio.to_thread(folder.open)
        if not folder.sealed:
            what, names = f"evaluation of policy {policy.version}", list(self.config.label.scorers)
            store_scores = Gathering(folder.store_scores)

            async def add(scores: Sequence[Score]) -> None:
                folder.know_scores(await store_scores(folder.new_scores(scores)))

            async def score(samples: Samples) -> None:
                await add(await scorers.score(samples, folder.known_scores(samples, names)))

            async def store_failed(failed: Sequence[Sample]) -> None:
                known = {record.id for record in folder.records() if record.error is not None}
                require_drawn(self.config, what, len(known | {s.id for s in failed}), len(self.requests))
                folder.know_samples(await asyncio.to_thread(write_part, folder.storage, failed) if failed else [])
                known_failed = [record for record in folder.records() if record.error is not None]
                await add([Score(record.id, name, "", None, record.error) for record in known_failed for name in names])

            await store_failed([])
            there = [record for record in folder.records() if record.error is None]
            async with together() as group:
                for start in range(0, len(there), generators.batch_size):
                    batch = Samples(there[start : start + generators.batch_size], folder.storage)
                    group.create_task(score(batch))
                drawing = generators.stream(folder.missing(self.requests), policy, folder.storage)
                async with contextlib.aclosing(drawing) as batches:
                    async for samples, failed in batches:
                        folder.know_samples(samples)
                        if failed:
                            await store_failed(failed)
                        if samples:
                            group.create_task(score(samples))
            require_scored(self.config.label, what, folder.failures, len(self.requests))
            facts = {"policy_version": policy.version, "policy_digest": policy.digest, "drawing": generators.drawing}
            otherwise = self.config.held_out_otherwise
            await asyncio.to_thread(folder.seal, **facts, **({"drawn_with": otherwise} if otherwise else {}))
        return await asyncio.to_thread(self.summary, policy.version)

    def summary(self, version: int) -> EvaluationSummary:
        """Figures of a sealed evaluation."""
        judged, prompts_N = self._judged(version), list(self._prompts.values())
        columns = self._columns(version)
        passes_N = columns["pass_rate"]
        return EvaluationSummary(
            policy_version=version,
            mean_score=UNKNOWN if np.isnan(judged.values_N).all() else mean_interval(judged.values_N, prompts_N),
            pass_rate=UNKNOWN if np.isnan(passes_N).all() else pass_rate(passes_N, prompts_N, 0.5),
            win_rate=self._win_rate(judged) if version else None,
            images=len(judged.labels),
            failed=judged.labels.count("failed"),
            scores={
                name: mean_interval(columns[f"score/{name}"], prompts_N)
                for name in self.config.label.scorers
                if not np.isnan(columns[f"score/{name}"]).all()
            },
            differences=self._differences(columns) if version else {},
        )

    def _columns(self, version: int) -> dict[str, npt.NDArray[np.float64]]:
        """What is known of each image, in the order of the requests; NaN for what is not."""
        judged, scores = self._judged(version), by_sample(self._round(version).scores())
        return {
            "pass_rate": self._passes(judged, self._prompts.values()),
            "mean_score": judged.values_N,
            **{
                f"score/{name}": np.array([scores[id_][name].value for id_ in self._prompts], np.float64)
                for name in self.config.label.scorers
            },
        }

    def _differences(self, columns: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Interval]:
        """Against the base, which drew from the same seeds."""
        base, prompts_N = self._columns(0), list(self._prompts.values())
        return {
            name: pass_rate_difference(values_N, base[name], prompts_N, 0.5)
            if name == "pass_rate"
            else mean_difference(values_N, base[name], prompts_N)
            for name, values_N in columns.items()
            if not np.isnan(values_N - base[name]).all()
        }

    def _win_rate(self, judged: Judgement) -> Interval | None:
        """Against the base; None when no prompt can be compared."""
        policy_PK, base_PK = (j.values_N.reshape(len(self.prompts), -1) for j in (judged, self._judged(0)))
        comparable_P = ~(np.isnan(policy_PK).all(axis=1) | np.isnan(base_PK).all(axis=1))
        return median_win_rate(policy_PK, base_PK) if comparable_P.any() else None

    def pass_rate(self, prompts: Mapping[str, str], scores: Sequence[Score]) -> float | None:
        """Share of any samples that the bar of the held-out images lets pass; None if none could be judged.

        A bar that differs from prompt to prompt says nothing of other prompts.

        Args:
            prompts: prompt id by sample id.
            scores: of these samples.
        """
        passes_N = self._passes(self._judge(scores, prompts), prompts.values())
        known = not np.isnan(passes_N).all() and self._bar.same_for_every_prompt
        return float(np.nanmean(passes_N)) if known else None

    @cached_property
    def _prompts(self) -> dict[str, str]:
        """Prompt id by sample id of the held-out images."""
        return {request.id: request.prompt.id for request in self.requests}

    @cached_property
    def _bar(self) -> RuleFit:
        return self.rule.fit(table_of(self.rule, by_sample(self._round(0).scores()), self._prompts))

    def _judge(self, scores: Sequence[Score], prompts: Mapping[str, str]) -> Judgement:
        """By the bar; where no scorer votes, every value is NaN."""
        if not self.rule.voters:
            return Judgement(["abstain"] * len(prompts), np.full(len(prompts), np.nan), [""] * len(prompts))
        return self.rule.judge(table_of(self.rule, by_sample(scores), prompts), self._bar)

    def _passes(self, judged: Judgement, prompts_N: Iterable[str]) -> npt.NDArray[np.float64]:
        """1 for an image that passes, 0 for one that does not (as in the dead band), NaN for one that is not judged."""
        return np.array(
            [
                float(label == "desirable") if not np.isnan(value) and self._bar.judges(prompt) else np.nan
                for label, value, prompt in zip(judged.labels, judged.values_N, prompts_N, strict=True)
            ]
        )

    def _judged(self, version: int) -> Judgement:
        return self._judge(self._round(version).scores(), self._prompts)

    def _marks(self, version: int) -> dict[str, tuple[float | None, bool | None]]:
        """Value of each image, and whether it passes, by sample id; None for what was not judged."""
        judged = self._judged(version)
        passes_N = self._passes(judged, self._prompts.values())
        return {
            sample_id: (None if np.isnan(value) else float(value), None if np.isnan(passes) else bool(passes))
            for sample_id, value, passes in zip(self._prompts, judged.values_N, passes_N, strict=True)
        }

    def picture(self, version: int, count: int = PICTURED_PROMPTS) -> bytes | None:
        """A version's images of the first `count` prompts beside the base's, as a PNG file; None as in `pairs`."""
        if not (pairs := self.pairs(version, count)):
            return None
        file = io.BytesIO()
        save_png_grid(pairs, file, ("policy 0", f"policy {version}"))
        return file.getvalue()

    def pairs(self, version: int, count: int) -> list[Pair]:
        """The first `count` prompts (spread over the set) with their images from the base and from a version.

        None, when `keep_pixels` has let go of them.
        """
        chosen = [
            self.prompts[i] for i in np.linspace(0, len(self.prompts) - 1, min(count, len(self.prompts))).astype(int)
        ]

        wanted = {prompt.id for prompt in chosen}

        def pictures(version: int) -> dict[str, list[tuple[str, npt.NDArray[np.uint8]]]]:
            """Sample ids and pixels by prompt."""
            by_prompt: dict[str, list[tuple[str, npt.NDArray[np.uint8]]]] = {prompt_id: [] for prompt_id in wanted}
            records = [record for record in self._round(version).records() if record.prompt.id in wanted]
            records.sort(key=lambda record: record.index)
            pixels_BHWC = self._round(version).pixels_of(records) if records else ()
            for record, pixels_HWC in zip(records, pixels_BHWC, strict=True):
                by_prompt[record.prompt.id].append((record.id, pixels_HWC))
            return by_prompt

        try:
            before, after = pictures(0), pictures(version)
        except UserError as error:  # after a rewinding, for instance
            logger.warning("%s; the report shows no images", error)
            return []
        marks = {v: self._marks(v) for v in (0, version)}
        return [
            Pair(
                prompt=prompt.text,
                base=[pixels_HWC for _, pixels_HWC in before[prompt.id]],
                final=[pixels_HWC for _, pixels_HWC in after[prompt.id]],
                base_scores=[marks[0][sample_id][0] for sample_id, _ in before[prompt.id]],
                final_scores=[marks[version][sample_id][0] for sample_id, _ in after[prompt.id]],
                base_passes=[marks[0][sample_id][1] for sample_id, _ in before[prompt.id]],
                final_passes=[marks[version][sample_id][1] for sample_id, _ in after[prompt.id]],
            )
            for prompt in chosen
        ]
