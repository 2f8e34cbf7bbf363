"""Label sets: sealed rounds judged anew from their stored scores, and rounds of an earlier run trained on again.

    runs/demo/labels/strict/00003/verdicts.parquet     a label set beside the run's own verdicts, which stay
                            labels.json                written last: the configuration it was made with

`kto-ray relabel` makes one; a run with `replay.run` and `replay.labels` copies rounds with its verdicts into its own
folder (`Replayed`, asked by the loop), trains on them, and then goes on with rounds of its own.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from kto_ray.config import Model, Replay, RunConfig, from_tree, override, public, yaml12
from kto_ray.config.moved import upgraded
from kto_ray.diffusion import source
from kto_ray.errors import UserError
from kto_ray.label.judging import judge_round
from kto_ray.policies import PolicyStore
from kto_ray.records import VERDICT_SCHEMA, Verdict, table_to_verdicts, verdicts_to_table
from kto_ray.rounds import Round, RoundStore, by_sample
from kto_ray.storage import Storage
from kto_ray.verdicts.rule import RuleFit


@dataclass(frozen=True)
class RelabeledRound:
    """What became of one round: its new labels, and the share that differs from the old ones."""

    round: int
    labels: Counter[str]
    changed: float


def relabel(run: Storage, name: str, overrides: Sequence[str]) -> list[RelabeledRound]:
    """Judge all sealed rounds of a run anew and store the verdicts as label set `name`; nothing else is touched.

    Args:
        overrides: of the run's own configuration, for instance "label.threshold={kind: round_quantile, quantile: 0.7}".

    Raises:
        UserError: no such run, a label set of that name, an override that is wrong, or scores the run does not have.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"name: {name!r} cannot be the name of a label set; use letters, digits, - and _")
    if stray := [text for text in overrides if not text.startswith("label.")]:
        raise UserError(f"{stray[0]!r}: only fields of `label` can be given to judge old rounds anew, as label.NAME")
    # Whoever judged the run: here it is done by thresholds.
    config = override(saved_config(run), ["label.labeler=threshold", *overrides])
    folder = run / "labels" / name
    if folder.exists("labels.json"):
        raise UserError(f"name: {run} has a label set {name!r} already; give another name")
    rounds = sealed_rounds(run)
    known = {scorer for round_ in rounds for _, scorer in round_.scored}
    if missing := sorted(config.label.voting.keys() - known):
        has = ", ".join(sorted(known)) or "none"
        raise UserError(f"label.scorers: {run} has no scores of {missing[0]!r}; it has those of: {has}")
    last: RuleFit | None = None
    report = []
    for index, round_ in enumerate(rounds):
        judged = judge_round(config.label, by_sample(round_.scores()), round_.prompt_ids(), last)
        last = judged.fit
        old = {verdict.sample_id: verdict.label for verdict in round_.verdicts()}
        changed = sum(old.get(verdict.sample_id) != verdict.label for verdict in judged.verdicts)
        (folder / f"{index:05}").write_table("verdicts.parquet", verdicts_to_table(judged.verdicts))
        labels = Counter(str(verdict.label) for verdict in judged.verdicts)
        report.append(RelabeledRound(index, labels, changed / max(1, len(judged.verdicts))))
    folder.write_json("labels.json", {"label": public(config.label), "rounds": len(rounds)})
    return report


def saved_config(run: Storage, field: str = "run") -> RunConfig:
    """The configuration in the run folder that `field` names. Raises UserError when there is none of this version."""
    if not run.exists("config.yaml"):
        raise UserError(f"{field}: {run} is not a run folder: it has no config.yaml")
    try:
        return from_tree(upgraded(yaml12.load(run.read("config.yaml"))))
    except (UserError, yaml12.YAMLError) as error:
        raise UserError(f"{field}: {run}/config.yaml is not a configuration of this version:\n{error}") from error


def sealed_rounds(run: Storage, field: str = "run") -> list[Round]:
    """Raises UserError when there is none."""
    rounds = [round_ for round_ in RoundStore(run).rounds() if round_.sealed]
    if not rounds:
        raise UserError(f"{field}: {run} has no sealed round yet")
    return rounds


class Replayed:
    """The rounds of an earlier run, with its own verdicts or those of a label set.

    Raises:
        UserError: no such run or label set, no sealed rounds, or latents of another model.
    """

    def __init__(self, settings: Replay, config: RunConfig) -> None:
        self.settings, self.run = settings, Storage(settings.run)
        model = saved_config(self.run, "replay.run").model
        if model != config.model and not self._is_made_by(config.model):
            raise UserError(
                f"replay.run: the rounds of {self.run} are latents of another model ({model}) "
                f"than the one this run trains ({config.model})"
            )
        self.rounds = len(sealed_rounds(self.run, "replay.run"))
        self._labels = self.run / "labels" / settings.labels if settings.labels else None
        if self._labels:
            if not self._labels.exists("labels.json"):
                known = ", ".join((self.run / "labels").names()) or "none"
                raise UserError(
                    f"replay.labels: {self.run} has no label set {settings.labels!r} (it has: {known}); "
                    f"make it with: kto-ray relabel {self.run} --name {settings.labels} --threshold ..."
                )
            # The run may have gone on since.
            self.rounds = self._labels.read_json("labels.json")["rounds"]

    def _is_made_by(self, model: Model) -> bool:
        """Whether a model of another name is known to be the earlier run's, to the last byte."""
        made_by, folder = PolicyStore(self.run).base_components(), source.local_folder(model)
        return folder is not None and made_by == source.component_digests(folder, model)

    def settle(self, run: Storage) -> None:
        """Write down in the run that replays how many rounds there are; from then on they are so many.

        The earlier run may grow, but rounds that this run has made of its own are not filled from it.
        """
        if run.exists("replay.json"):
            self.rounds = run.read_json("replay.json")["rounds"]
        else:
            run.write_json("replay.json", {"run": str(self.run), "rounds": self.rounds})

    def prompt_texts(self) -> set[str]:
        """All texts that these rounds would train on."""
        store = RoundStore(self.run)
        return {text for index in range(self.rounds) for text in store.round(index).prompt_texts()}

    def fill(self, index: int, round_: Round) -> None:
        """Copy samples, scores and verdicts of a round into an open round of another run."""
        origin = RoundStore(self.run).round(index)
        origin.verify()
        round_.copy_samples(origin)
        round_.add_scores(origin.scores())
        round_.add_verdicts(self._verdicts(index, origin))

    def _verdicts(self, index: int, origin: Round) -> list[Verdict]:
        if self._labels is None:
            return origin.verdicts()
        table: pa.Table = (self._labels / f"{index:05}").read_table("verdicts.parquet")
        return table_to_verdicts(table.cast(VERDICT_SCHEMA))
