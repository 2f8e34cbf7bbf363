"""The rule that a configuration asks for, and the scores that it judges.

`label/judging.py` judges rounds by it, `evaluate/` held-out images, and `train/worker.py` compares samples by it for
objectives that learn from pairs of scores. The rule itself is in `verdicts/`.
"""

from collections.abc import Mapping

import numpy as np

from kto_ray.config import Labeling
from kto_ray.records import Score
from kto_ray.verdicts.rule import ScoreTable, VerdictRule, Voter
from kto_ray.verdicts.thresholds import Floats


def rule_of(config: Labeling) -> VerdictRule:
    """The rule of `label.scorers` (those not held out), `label.combine` and `label.threshold`."""
    voters = [Voter(name, s.weight, s.mean, s.std, s.threshold) for name, s in config.voting.items()]
    return VerdictRule(voters, config.combine, config.threshold)


def table_of(rule: VerdictRule, scores: Mapping[str, Mapping[str, Score]], prompts: Mapping[str, str]) -> ScoreTable:
    """The table of the samples in `prompts` (sample id -> prompt id), in that order."""

    def value(sample_id: str, scorer: str) -> float:
        score = scores.get(sample_id, {}).get(scorer)
        return np.nan if score is None or score.value is None else score.value

    values_SN = np.array([[value(sample_id, voter.name) for sample_id in prompts] for voter in rule.voters], np.float64)
    return ScoreTable(values_SN.reshape(len(rule.voters), len(prompts)), list(prompts.values()))


def values_of(config: Labeling, scores: Mapping[str, Mapping[str, Score]], prompts: Mapping[str, str]) -> Floats:
    """What the rule compares samples by, float64 (N,): one scorer's score, the sum of several (calibrated by these
    samples), or the share of scorers that say yes; NaN without every voter's score.

    Args:
        scores: by sample id and scorer.
        prompts: prompt id by sample id.
    """
    rule = rule_of(config)
    table = table_of(rule, scores, prompts)
    return rule.judge(table, rule.fit(table)).values_N
