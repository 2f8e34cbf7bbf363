"""What the run's own evaluations say of a policy: figures and pictures of the model card. Nothing is drawn or scored.

`card.py` shows it. Read from where the loop keeps evaluations; those with fresh seeds come first, as in the report.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.evaluate.report import Pair
from kto_ray.evaluate.statistics import EvaluationSummary
from kto_ray.prompts import FILES, kept, load_prompts
from kto_ray.records import Prompt
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

PICTURED_PROMPTS = 6


@dataclass(frozen=True)
class Evaluated:
    """Base and policy on the same held-out prompts and seeds."""

    base: EvaluationSummary
    policy: EvaluationSummary
    pairs: Sequence[Pair]
    """Without any where their pixels are gone."""


def held_out_prompts(run: Storage, config: RunConfig) -> list[Prompt]:
    """Those that the run began with; [] where they cannot be had any more."""
    if run.exists(FILES["prompts.held_out"]):
        return kept(run, "prompts.held_out")
    try:
        return load_prompts("prompts.held_out", config.prompts.held_out)
    except UserError as error:
        logger.warning("%s; the model card shows no held-out prompts", error)
        return []


def evaluated(run: Storage, config: RunConfig, prompts: Sequence[Prompt], version: int) -> Evaluated | None:
    """None: the run has not evaluated this policy."""
    for fresh in (True, False) if prompts else ():
        evaluation = Evaluation(config, run, prompts, fresh)
        if all(evaluation.round(each).sealed for each in (0, version)):
            pairs = [pair for pair in evaluation.pairs(version, PICTURED_PROMPTS) if len(pair.base) and len(pair.final)]
            return Evaluated(evaluation.summary(0), evaluation.summary(version), pairs)
    return None
