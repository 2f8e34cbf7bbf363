"""Albums: the images of one round or evaluation, each with its whole story, for the watch pages and the report.

An album is made of what lies in the folder at that moment. Of a round that goes on some images have no scores, no
verdict, or neither; a verdict of people that came late stands in a later round, and is found there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from kto_ray.config import RunConfig
from kto_ray.records import SampleRecord, Score, Verdict
from kto_ray.rounds import NO_PIXELS, Round, by_sample
from kto_ray.ruling import rule_of, table_of
from kto_ray.storage import Storage

Kind = Literal["round", "evaluation", "fresh_evaluation"]
FOLDERS: dict[Kind, str] = {"round": "rounds", "evaluation": "evaluations", "fresh_evaluation": "fresh_evaluations"}
SIGNS = {"desirable": "✓", "undesirable": "✗", "abstain": "?", "failed": "!", "pending": "…"}
"""What became of an image."""
Answer = tuple[str, str]
"""Who said what: "desirable", "undesirable" or "unsure"."""


@dataclass(frozen=True, order=True)
class Key:
    """Which album: of a round, by its number, or of an evaluation, by the version of the policy. "round-3" as text."""

    kind: Kind
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Key | None":
        kind, _, number = text.rpartition("-")
        return cls(kind, int(number)) if kind in FOLDERS and number.isdecimal() else None

    @property
    def title(self) -> str:
        if self.kind == "round":
            return f"Round {self.number}"
        fresh = ", fresh seeds" if self.kind == "fresh_evaluation" else ""
        return f"Policy {self.number}, held out{fresh}"

    @property
    def folder(self) -> str:
        return f"{FOLDERS[self.kind]}/{self.number:05}"

    @property
    def stage(self) -> str:
        return f"round-{self.number:05}" if self.kind == "round" else self.kind


@dataclass(frozen=True, slots=True)
class ImageStory:
    """One image, and all that the run's folder says of it.

    `disagreement` is how far apart scorers rank it among the images of its album: 0, all in the same place, to 1, the
    best to one and the worst to another; None without two scores. `draws`: how often it was drawn for training.
    """

    key: Key
    record: SampleRecord
    scores: Mapping[str, Score]
    verdict: Verdict | None
    draws: int = 0
    answers: tuple[Answer, ...] = ()
    disagreement: float | None = None

    @property
    def label(self) -> str:
        return self.verdict.label if self.verdict else "pending"

    @property
    def error(self) -> str | None:
        """Why it is no image, or why a scorer gave it no score."""
        if self.record.error is not None:
            return self.record.error
        failed = [score for score in self.scores.values() if score.value is None]
        return f"{failed[0].scorer}: {failed[0].error}" if failed else None

    @property
    def people_disagree(self) -> bool:
        return {"desirable", "undesirable"} <= {said for _, said in self.answers}

    def value(self, scorer: str) -> float | None:
        score = self.scores.get(scorer)
        return score.value if score else None


def spread(images: Sequence[ImageStory], count: int) -> Sequence[ImageStory]:
    """So many of them, from all over."""
    return [images[place * len(images) // count] for place in range(count)] if len(images) > count else images


@dataclass(frozen=True)
class Album:
    """See the module. `images` are in the order of their prompts.

    Args:
        kept: whether their pixels are still there.
        settled: nothing of it will change any more, but that pixels may go.
    """

    key: Key
    images: Sequence[ImageStory] = field(repr=False)
    sealed: bool
    kept: bool
    settled: bool

    @cached_property
    def by_id(self) -> dict[str, ImageStory]:
        return {image.record.id: image for image in self.images}

    @cached_property
    def by_prompt(self) -> dict[str, list[ImageStory]]:
        """By the prompt's id."""
        found: dict[str, list[ImageStory]] = {}
        for image in self.images:
            found.setdefault(image.record.prompt.id, []).append(image)
        return found


def read_round(run: Storage, config: RunConfig, key: Key, newest: int) -> Album:
    """The album of a round.

    Args:
        newest: number of the run's last round; verdicts that came late are looked for up to there.

    Raises:
        FileNotFoundError: parts went while they were read, because the round was being sealed: read again.
    """
    round_ = Round(run / key.folder, key.stage)
    records = round_.records()
    verdicts = {verdict.sample_id: verdict for verdict in round_.verdicts()}
    draws, answers = _draws(round_), _answers(run, key.number)
    looked_to = key.number
    # Only people answer late, and no later than a verdict can still be trained on.
    while round_.sealed and looked_to < min(newest, key.number + config.max_policy_lag):
        if all(record.id in verdicts for record in records):
            break
        looked_to += 1
        later = Round(run / f"rounds/{looked_to:05}", f"round-{looked_to:05}")
        if not later.sealed:
            break
        verdicts = {verdict.sample_id: verdict for verdict in later.verdicts()} | verdicts
        draws, answers = _draws(later) | draws, _answers(run, looked_to) | answers
    stories = _stories(key, config, records, by_sample(round_.scores()), verdicts, draws, answers)
    whole = all(record.id in verdicts for record in records) or looked_to >= key.number + config.max_policy_lag
    kept = not round_.storage.exists(NO_PIXELS)
    return Album(key, stories, round_.sealed, kept, round_.sealed and round_.trained and whole)


def read_evaluation(run: Storage, config: RunConfig, key: Key, base: Album | None) -> Album:
    """The album of an evaluation. Its verdicts say what the bar says that the run reports by: the rule, as fitted to
    the base's images.

    Args:
        base: of policy 0, of the same kind; None: it is this one.
    """
    round_ = Round(run / key.folder, key.stage)
    records, scores = round_.records(), by_sample(round_.scores())
    verdicts: dict[str, Verdict] = {}
    barred = base is None or base.sealed
    if config.label.voting and records and scores and round_.sealed and barred:
        rule = rule_of(config.label)
        prompts = {record.id: record.prompt.id for record in records}
        table = table_of(rule, scores, prompts)
        if base is None:
            bar = rule.fit(table)
        else:
            bar_scores = {image.record.id: image.scores for image in base.images}
            bar_prompts = {image.record.id: image.record.prompt.id for image in base.images}
            bar = rule.fit(table_of(rule, bar_scores, bar_prompts))
        judged = rule.judge(table, bar)
        for id_, label, why in zip(prompts, judged.labels, judged.rules, strict=True):
            verdicts[id_] = Verdict(id_, label, "the bar of held-out images", why)
    stories = _stories(key, config, records, scores, verdicts, {}, {})
    kept = not round_.storage.exists(NO_PIXELS)
    return Album(key, stories, round_.sealed, kept, round_.sealed and barred)


def _stories(
    key: Key,
    config: RunConfig,
    records: Iterable[SampleRecord],
    scores: Mapping[str, Mapping[str, Score]],
    verdicts: Mapping[str, Verdict],
    draws: Mapping[str, int],
    answers: Mapping[str, tuple[Answer, ...]],
) -> list[ImageStory]:
    apart = disagreements(scores, list(config.label.scorers))
    stories = [
        ImageStory(
            key=key,
            record=record,
            scores=scores.get(record.id, {}),
            verdict=verdicts.get(record.id),
            draws=draws.get(record.id, 0),
            answers=answers.get(record.id, ()),
            disagreement=apart.get(record.id),
        )
        for record in records
    ]
    return sorted(stories, key=lambda story: (story.record.prompt.text, story.record.prompt.id, story.record.index))


def disagreements(scores: Mapping[str, Mapping[str, Score]], scorers: Sequence[str]) -> dict[str, float]:
    """How far apart scorers rank each image that at least two of them have scored, by sample id; in [0, 1].

    A rank is the share of the images that score less, those that score the same counted half.
    """
    places: dict[str, list[float]] = {}
    for scorer in scorers:
        found = {id_: of[scorer].value for id_, of in scores.items() if scorer in of and of[scorer].value is not None}
        values_N = np.array(list(found.values()), np.float64)
        in_order_N = np.sort(values_N)
        below_N, up_to_N = (np.searchsorted(in_order_N, values_N, side) for side in ("left", "right"))
        ranks_N = (below_N + up_to_N) / 2 / max(1, len(values_N))
        for id_, rank in zip(found, ranks_N.tolist(), strict=True):
            places.setdefault(id_, []).append(rank)
    return {id_: max(ranks) - min(ranks) for id_, ranks in places.items() if len(ranks) > 1}


def _draws(round_: Round) -> dict[str, int]:
    if not round_.trained:
        return {}
    table = round_.storage.read_table("training.parquet")
    return dict(zip(table["sample_id"].to_pylist(), table["draws"].to_pylist(), strict=True))


def _answers(run: Storage, number: int) -> dict[str, tuple[Answer, ...]]:
    """What people said of the images whose verdicts were sealed in a round; see `people/overview.py`."""
    name = f"people/{number:05}.parquet"
    if not run.exists(name):
        return {}
    found: dict[str, tuple[Answer, ...]] = {}
    for row in run.read_table(name, ["sample_id", "labeler", "answer", "void"]).to_pylist():
        if row["void"] is None and row["answer"] != "skip":
            found[row["sample_id"]] = (*found.get(row["sample_id"], ()), (row["labeler"], row["answer"]))
    return found
