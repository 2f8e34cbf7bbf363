"""From a round's scores to its verdicts, and whether those are worth training on.

`threshold_labeler.py` judges each round with it, `relabel.py` old rounds anew, `evaluate/` held-out images.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kto_ray.config import Labeling
from kto_ray.errors import UserError
from kto_ray.objectives import AnyObjective
from kto_ray.objectives.protocol import Needs
from kto_ray.records import Label, Score, Verdict
from kto_ray.ruling import rule_of, table_of
from kto_ray.verdicts.rule import SUM, RuleFit, VerdictRule
from kto_ray.verdicts.thresholds import EVERY

logger = logging.getLogger(__name__)

BOTH_CLASSES = Needs()
"""Of an objective that learns from verdicts of either class; what `label.on_one_class: widen` goes by."""
BY_THRESHOLD = "threshold"
"""Whose verdicts these are, in the record."""


@dataclass(frozen=True)
class RoundVerdicts:
    """A judged round: its verdicts in the order of the samples, its fit, and what to log of it."""

    verdicts: list[Verdict]
    margins: dict[str, float]
    """How far each sample is from another verdict, by its id; see `VerdictRule.margins`."""
    fit: RuleFit
    figures: dict[str, float]


def judge_round(
    config: Labeling, scores: Mapping[str, Mapping[str, Score]], prompts: Mapping[str, str], last: RuleFit | None
) -> RoundVerdicts:
    """Fit the rule to a round's scores and judge each sample; widens where the configuration says so.

    Args:
        scores: by sample id and scorer; a missing or failed score makes its sample "failed".
        prompts: prompt id by sample id.
        last: the fit of the round before.
    """
    rule = rule_of(config)
    table = table_of(rule, scores, prompts)
    fit = rule.fit(table, last)
    judged = rule.judge(table, fit)
    figures = {f"threshold/{name or 'sum'}": f.cuts[EVERY][1] for name, f in fit.fits.items() if EVERY in f.cuts}
    if config.on_one_class == "widen" and one_sided(config, Counter(judged.labels)):
        widened = rule.widened(table, fit)
        if widened is not None:
            judged = rule.judge(table, widened)
            figures["threshold/widened"] = widened.fits[SUM].cuts[EVERY][1]
    if not np.isnan(judged.values_N).all():
        figures["score_mean"] = float(np.nanmean(judged.values_N))
    if last is not None and (flipped := rule.flip_rate(table, fit, last)) is not None:
        figures["flip_rate"] = flipped
    verdicts = [
        Verdict(
            *(sample_id, label, BY_THRESHOLD),
            rule=_failures(rule, scores.get(sample_id, {})) if label == "failed" else text,
        )
        for sample_id, label, text in zip(prompts, judged.labels, judged.rules, strict=True)
    ]
    margins = dict(zip(prompts, rule.margins(table, fit).tolist(), strict=True))
    return RoundVerdicts(verdicts, margins, fit, figures)


def _failures(rule: VerdictRule, scores: Mapping[str, Score]) -> str:
    """Whose scores are missing, and why."""
    missing = {voter.name: scores.get(voter.name) for voter in rule.voters}
    return "; ".join(
        f"no score of {name}: {score.error if score else 'not scored'}"
        for name, score in missing.items()
        if score is None or score.value is None
    )


def one_sided(config: Labeling, labels: Mapping[Label, int], needs: Needs = BOTH_CLASSES) -> bool:
    """Whether a class is missing that the objective needs, or there are fewer verdicts than `label.min_verdicts`."""
    yes, no = labels.get("desirable", 0), labels.get("undesirable", 0)
    if not yes + no or yes + no < config.min_verdicts:
        return True
    # Scores make pairs whatever the verdicts are.
    return needs.pairs != "scores" and (not yes or (needs.undesirable and not no))


def worth_training(config: Labeling, index: int, verdicts: Sequence[Verdict], objective: AnyObjective) -> bool:
    """Whether there are enough verdicts, of both classes where the objective needs them; else what
    `label.on_one_class` says, said aloud.

    Raises:
        UserError: `label.on_one_class` is "stop".
    """
    labels = Counter(verdict.label for verdict in verdicts)
    needs = objective.needs
    if not one_sided(config, labels, needs):
        return True
    yes, no = labels["desirable"], labels["undesirable"]
    what = "verdicts of one class only" if not yes or not no else f"fewer verdicts than {config.min_verdicts}"
    counts = f"{yes} desirable, {no} undesirable, {labels['abstain']} abstained, {labels['failed']} failed"
    choice = config.on_one_class
    if choice == "stop":
        wants = f"{objective.kind} needs {'both' if needs.undesirable else 'desirable ones'}"
        remedy = (
            "Give people more time (label.deadline_s)"
            if config.people
            else f"Choose another label.threshold than {config.threshold} (in a new run)"
        )
        raise UserError(
            f"round {index} has {what} ({counts}): {wants}. {remedy}, or let such rounds pass with "
            "label.on_one_class=skip or =train, or later ones be judged by their median with =widen. The round is "
            "sealed and kept."
        )
    train = choice == "train" and yes + no > 0
    logger.warning("round %d has %s (%s): %s", index, what, counts, "trained on all the same" if train else "skipped")
    return train
