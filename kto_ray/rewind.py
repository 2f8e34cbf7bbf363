"""The way back: `kto-ray rewind RUN --to N` sets aside what came after policy N; the same command goes on from there.

    set-aside/2026-11-25T09-12-33/     what was taken out of the run, under the names that it had
                                       policies, rounds, evaluations and checkpoints after policy N; the results

Nothing is deleted, but for what people's database knows of the rounds that go. Rounds that policy N or an older one
drew stay, with all verdicts: they are only trained again. While it is under way `rewinding.json` lies in the run's
folder, and the run does not go on; the same command finishes what a crash left.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kto_ray.config import RunConfig, override, to_yaml
from kto_ray.config.resuming import differences, write_down
from kto_ray.errors import UserError
from kto_ray.images import to_png
from kto_ray.lease import held
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.keeping import lacking, put_back
from kto_ray.people.overview import answers_table
from kto_ray.people.rewinding import take_back
from kto_ray.people.tables import open_database
from kto_ray.policies import PolicyStore
from kto_ray.relabel import saved_config
from kto_ray.rounds import RoundStore, round_number
from kto_ray.storage import Storage, to_json
from kto_ray.train.checkpoints import (
    BEGINNING,
    REWINDING,
    SNAPSHOT,
    KeptCheckpoint,
    flaw_of,
    keep_only,
    kept_checkpoints,
)

logger = logging.getLogger(__name__)

RESULTS = ("summary.json", "report.html", "before_after.png")


@dataclass(frozen=True)
class Rewound:
    """What was done."""

    folder: str
    """In the run's, where everything was put that was set aside."""
    rounds: list[int]
    """That were set aside."""
    again: list[int]
    """That stay, and will be trained again."""
    optimizer: bool
    """Whether the optimizer goes on from its state after policy N, or anew."""
    settings: list[str]
    """That changed: the command that continues has to give them, too."""


def rewind(run: Storage, to: int, overrides: Sequence[str] = ()) -> Rewound:
    """Let a run go on from policy `to`. It must not be running: its lease is held meanwhile.

    Args:
        overrides: settings of training that the run has from then on, for instance "train.learning_rate=1e-5".

    Raises:
        UserError: no such run or policy, another rewinding that is not finished, overrides that cannot be, or a driver
            that is at work on the run.
    """
    config = saved_config(run)
    with held(run, config.cluster.lease_renew_s, config.cluster.lease_stale_s) as (_, mine):
        return _rewind(mine, config, to, overrides)


def _rewind(run: Storage, config: RunConfig, to: int, overrides: Sequence[str]) -> Rewound:
    policies = PolicyStore(run)
    changed = _with(config, overrides)
    published = policies.versions()
    if to not in published:
        raise UserError(f"--to: {run} has no policy {to}; it has those from 0 to {max(published, default=0)}")
    if not policies.has_weights(to):
        left = ", ".join(str(version) for version in published if policies.has_weights(version))
        raise UserError(
            f"--to: the weights of policy {to} of {run} are gone (keep_policies); those that are still there: {left}"
        )
    plan = _plan(run, to)
    folder = str(plan["folder"])

    def set_aside(name: str) -> None:
        run.move(name, f"{folder}/{name}")

    optimizer = _set_checkpoints_aside(run, to, folder)
    run.write_json(BEGINNING, {"to": to})
    if config.label.people:
        _set_answers_aside(config, run, plan["gone"], folder)
    for index in plan["gone"]:
        set_aside(f"rounds/{index:05}")
        set_aside(f"people/{index:05}.parquet")
    for index in plan["again"]:
        set_aside(f"rounds/{index:05}/training.json")  # without it the round is not trained
        set_aside(f"rounds/{index:05}/training.parquet")
    for kind in ("evaluations", "fresh_evaluations", "policies"):
        for version in (run / kind).names():
            if version.isdigit() and int(version) > to:
                set_aside(f"{kind}/{version}")
    for name in (run / "pictures").names():  # of evaluations: evaluation-00003.png
        if int(name.removesuffix(".png").rpartition("-")[2]) > to:
            set_aside(f"pictures/{name}")
    for name in (run / "labels").names():  # label sets of rounds that are gone
        if plan["gone"] and run.read_json(f"labels/{name}/labels.json")["rounds"] > min(plan["gone"]):
            set_aside(f"labels/{name}")
    for name in RESULTS:
        set_aside(name)
    _cut_metrics(run, to, folder)
    if changed != config:
        run.write(f"{folder}/config.yaml", run.read("config.yaml"))
        write_down(differences(changed, config), run, to)
        run.write("config.yaml", to_yaml(changed).encode())
    run.move(REWINDING, f"{folder}/rewound.json")
    return Rewound(folder, plan["gone"], plan["again"], optimizer, [*overrides])


def _plan(run: Storage, to: int) -> dict[str, Any]:
    """Where things go ("folder"), rounds that go, since a later policy drew in them ("gone"), and rounds that stay and
    are trained again ("again"). Written down first: it cannot be found out any more once things have moved."""
    if run.exists(REWINDING):
        begun: dict[str, Any] = run.read_json(REWINDING)
        if begun["to"] != to:
            raise UserError(f"--to: {run} is half rewound to policy {begun['to']}; finish that first")
        return begun
    gone, again = [], []
    for round_ in RoundStore(run).rounds():
        replayed = round_.sealed and "replayed_from" in round_.manifest
        index = round_number(round_.stage)
        if not replayed and max(round_.policy_versions(), default=0) > to:
            gone.append(index)
        elif index >= to and round_.trained:
            again.append(index)
    folder = time.strftime("set-aside/%Y-%m-%dT%H-%M-%S", time.gmtime())
    plan = {"to": to, "folder": folder, "gone": gone, "again": again}
    run.write_json(REWINDING, plan)
    return plan


def _with(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    for text in overrides:
        field = text.partition("=")[0]
        if not field.startswith("train.") or field.startswith("train.adapter"):
            raise UserError(
                f"{text!r}: with a rewinding only fields of `train` can change, and none of train.adapter, whose "
                "weights are there already"
            )
    return override(config, overrides) if overrides else config


def _set_checkpoints_aside(run: Storage, to: int, folder: str) -> bool:
    """Leave those up to policy `to`; whether there is a good one of `to` itself, without which none is left."""
    try:
        kept = kept_checkpoints(run)
    except UserError:  # a list that cannot be read: without it nothing in there can be used
        kept = []
        run.move(f"checkpoints/{SNAPSHOT}", f"{folder}/checkpoints/{SNAPSHOT}")
    good: list[KeptCheckpoint] = [c for c in kept if c.version <= to and run.exists(f"checkpoints/{c.name}/state.pt")]
    if not good or good[-1].version != to or flaw_of(run, good[-1]):
        good = []
    if len(good) < len(kept):
        if good:
            keep_only(run, good)
        else:
            run.move(f"checkpoints/{SNAPSHOT}", f"{folder}/checkpoints/{SNAPSHOT}")
    names = {checkpoint.name for checkpoint in good}
    for name in (run / "checkpoints").names():
        if name.startswith("checkpoint_") and name not in names and name != SNAPSHOT:
            run.move(f"checkpoints/{name}", f"{folder}/checkpoints/{name}")
    return bool(good)


def _set_answers_aside(config: RunConfig, run: Storage, gone: Sequence[int], folder: str) -> None:
    """Keep a copy of all answers, and take those on the rounds that go out of the database.

    Labels that went into those rounds may change again, and images of older rounds be asked about again.
    """
    human = config.label.human
    engine = open_database(database_url(human, run), database_owner(human, run))
    try:
        if not run.exists(f"{folder}/people/answers.parquet"):
            run.write_table(f"{folder}/people/answers.parquet", answers_table(engine))
        take_back(engine, [RoundStore(run).stage(index) for index in gone])
        for stage, sample_ids in lacking(engine, config.max_policy_lag).items():
            _show_again(run, engine, stage, sample_ids)
    finally:
        engine.dispose()


def _show_again(run: Storage, engine: sa.Engine, stage: str, sample_ids: set[str]) -> None:
    """Put images back that left people's database with their seal."""
    round_ = RoundStore(run).round(round_number(stage))
    records = [record for record in round_.records() if record.id in sample_ids]
    try:
        pngs = to_png(round_.pixels_of(records)) if records else []
    except UserError as error:
        logger.warning("%s: people are not asked about %d of its images again", error, len(sample_ids))
        return
    put_back(engine, {record.id: png for record, png in zip(records, pngs, strict=True)})


def _cut_metrics(run: Storage, to: int, folder: str) -> None:
    """Leave the rows of rounds that led to policy `to`, and of evaluations up to it."""
    if not run.exists("metrics.jsonl"):
        return
    if not run.exists(f"{folder}/metrics.jsonl"):
        run.write(f"{folder}/metrics.jsonl", run.read("metrics.jsonl"))
    rows = [json.loads(line) for line in run.read(f"{folder}/metrics.jsonl").decode().splitlines()]
    left = [row for row in rows if row["step"] < to or (row["kind"] != "round" and row["step"] == to)]
    run.write("metrics.jsonl", "".join(to_json(row) + "\n" for row in left).encode())
