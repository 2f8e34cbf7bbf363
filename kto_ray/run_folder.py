"""A run's folder as a program reads it: figures as rows, rounds as Arrow tables, policies as state dicts.

    run = RunFolder("runs/demo")                  or s3://bucket/runs/demo; neither Ray nor a GPU is needed
    run.figures("evaluation")[-1]["pass_rate"]
    run.table(3).to_pandas()                      one row a sample: prompt, seed, policy, scores, verdict
    run.policy(run.policies[-1])                  tensors by name, as their digest says

`from kto_ray import RunFolder` gives it. Nothing is written, and a run that goes on may be read meanwhile.
"""

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.outbox import Row
from kto_ray.policies import PolicyStore
from kto_ray.records import records_to_table, scores_to_table, verdicts_to_table
from kto_ray.relabel import saved_config
from kto_ray.rounds import Round, RoundStore, by_sample
from kto_ray.storage import Storage
from kto_ray.tracking import KINDS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


class RunFolder:
    """Reads one run.

    Args:
        uri: of its folder: a local path, or what pyarrow or fsspec opens.

    Raises:
        UserError: there is no run, or one of a version that this one cannot read.
    """

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)
        self.config: RunConfig = saved_config(self.storage)
        """What it was last started with, resolved; without secrets."""

    @property
    def name(self) -> str:
        return self.config.run

    def figures(self, kind: str = "round") -> list[Row]:
        """Rows of `metrics.jsonl`, in the order of their steps.

        Args:
            kind: "round" (`step` is the round), "evaluation" or "fresh_evaluation" (`step` is the policy).

        Raises:
            ValueError: there is no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: {kind!r} is none of {', '.join(KINDS)}")
        text = self.storage.read("metrics.jsonl").decode() if self.storage.exists("metrics.jsonl") else ""
        rows = [json.loads(line) for line in text.splitlines()]
        return sorted((row for row in rows if row["kind"] == kind), key=lambda row: int(row["step"]))

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `summary.json` says; None: the run has not ended yet."""
        return self.storage.read_json("summary.json") if self.storage.exists("summary.json") else None

    # -- rounds -----------------------------------------------------------------------------------------------------

    @property
    def rounds(self) -> list[int]:
        """Numbers of the sealed ones, ascending."""
        return [index for index, round_ in enumerate(RoundStore(self.storage).rounds()) if round_.sealed]

    def round(self, index: int) -> Round:
        """Raises UserError where it is not sealed (yet)."""
        round_ = RoundStore(self.storage).round(index)
        if not round_.sealed:
            raise UserError(f"round: {self.storage} has no sealed round {index}; it has {self.rounds}")
        return round_

    def samples(self, index: int) -> pa.Table:
        """One row a sample of a round, in the order of their ids; without arrays, see `records.RECORD_SCHEMA`."""
        return records_to_table(self.round(index).records())

    def scores(self, index: int) -> pa.Table:
        """One row a sample and scorer, see `records.SCORE_SCHEMA`; the value of a failed one is null."""
        return scores_to_table(self.round(index).scores())

    def verdicts(self, index: int) -> pa.Table:
        """One row a verdict, see `records.VERDICT_SCHEMA`; late ones of people are on samples of earlier rounds."""
        return verdicts_to_table(self.round(index).verdicts())

    def table(self, index: int) -> pa.Table:
        """One row a sample with all that is known of it: `samples`, and `label`, `rule` and each scorer's `score/NAME`.

        What is not there is null: a verdict that has not come, a score that failed.
        """
        round_ = self.round(index)
        ids = [record.id for record in round_.records()]
        scores, verdicts = by_sample(round_.scores()), {verdict.sample_id: verdict for verdict in round_.verdicts()}
        table = self.samples(index)
        for name in ("label", "rule"):
            column = [getattr(verdicts[id_], name) if id_ in verdicts else None for id_ in ids]
            table = table.append_column(name, pa.array(column, pa.string()))
        for scorer in sorted({score.scorer for score in round_.scores()}):
            found = (scores.get(id_, {}).get(scorer) for id_ in ids)
            table = table.append_column(
                f"score/{scorer}", pa.array([score.value if score else None for score in found], pa.float64())
            )
        return table

    def images(self, index: int) -> "npt.NDArray[np.uint8]":
        """(N, H, W, 3), RGB, of a round's samples without error, in the order of `samples`.

        Raises:
            UserError: `keep_pixels` did not keep them.
        """
        round_ = self.round(index)
        return round_.pixels_of([record for record in round_.records() if record.error is None])

    def latents(self, index: int) -> "npt.NDArray[np.float32]":
        """(N, C, h, w), clean, scaled as the denoiser was trained, of the same samples as `images`."""
        round_ = self.round(index)
        return round_.latents_of([record for record in round_.records() if record.error is None])

    # -- policies ---------------------------------------------------------------------------------------------------

    @cached_property
    def _policies(self) -> PolicyStore:
        return PolicyStore(self.storage)

    @property
    def policies(self) -> list[int]:
        """Versions that can be loaded, ascending; 0, the base model, is always among them."""
        return [version for version in self._policies.versions() if self._policies.has_weights(version)]

    def policy(self, version: int) -> "dict[str, Tensor] | None":
        """Weights as they were published, float32 by name, proven by their digest; None for 0, the base model.

        Raises:
            UserError: there is no such policy, or it was not kept (`keep_policies`).
            DigestError: the file is not what was published.
        """
        try:
            return self._policies.load(self._policies.resolve(version))
        except FileNotFoundError:
            raise UserError(f"policy: {self.storage} has no policy {version}; it has {self.policies}") from None
