"""People as a `Labeler`: asks them about the images of a round, and gives their verdicts when the round is sealed.

    loop.py -> HumanLabeler -> Desk (actor) <- page (Ray Serve) <- people
                   |
                   +-> ThresholdLabeler: for the images that people are not asked about

Nothing is given before the seal, since until then people may take answers back and labelers may be excluded. Everything
is in the desk's database, so that a run that was killed goes on with all answers. With the verdicts the round's single
answers are written to `people/00003.parquet` in the run's folder.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.images import to_png
from kto_ray.label.protocol import Labeler
from kto_ray.label.threshold_labeler import ThresholdLabeler
from kto_ray.people.access import Signer, link
from kto_ray.people.address import base_url, database_owner, database_url, open_to_others, route_prefix
from kto_ray.people.agreement import agreement
from kto_ray.people.desk import Desk, remote_desk
from kto_ray.people.gold import load_gold
from kto_ray.people.people import OPERATOR
from kto_ray.people.routing import goes_to_people, needed, undecided
from kto_ray.people.terms import Judged, NewItem, Standing
from kto_ray.people.web.deployment import page_application
from kto_ray.records import Score, Verdict
from kto_ray.rounds import round_number
from kto_ray.samples import Samples
from kto_ray.serving import application_name, deploy, end_applications
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

FAREWELL_S = 4.0
"""How long pages have to learn that the run has ended, before their server does."""


@dataclass
class _Asked:
    """A round that people are asked about: its samples as long as scores may still send them there."""

    drawn: set[str] = field(default_factory=set)
    undecided: dict[str, Samples] = field(default_factory=dict)
    people: set[str] = field(default_factory=set)
    scorers: dict[str, Verdict] = field(default_factory=dict)
    standing: Standing | None = None


class HumanLabeler(Labeler):
    """See the module.

    Args:
        run: the run's folder.
        console: where links are printed.
    """

    name = "human"
    whole_rounds = True  # the scorers' thresholds and the routing look at whole rounds

    def __init__(self, config: RunConfig, run: Storage, console: Console) -> None:
        self.config, self.human, self.run, self.console = config, config.label.human, run, console
        self.scorers = ThresholdLabeler(config.label) if config.label.voting else None
        self._rounds: dict[str, _Asked] = {}
        self._figures: dict[str, dict[str, float]] = {}
        self._page = ""  # the name of its application, once that is started
        self._actor: Any = None
        self.desk: Desk

    async def start(self, memory: Mapping[str, Any]) -> None:
        if self.scorers:
            await self.scorers.start(memory)
        # On this node, where a SQLite file of the run lies; started again there whenever it dies.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Desk).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000, scheduling_strategy=here
        )
        self._actor = actor.remote(
            database_url(self.human, self.run),
            database_owner(self.human, self.run),
            self.human,
            self.config.max_policy_lag,
        )
        self.desk = remote_desk(self._actor)
        if self.human.gold.file:
            await self.desk.add_gold(await asyncio.to_thread(load_gold, self.human.gold.file))
        await self.desk.end(False)
        secret, prefix = await self.desk.secret(), route_prefix(self.run)
        self._page = application_name(self.run, "page")
        page = partial(page_application, self._actor, self.human, secret)
        await deploy("label.human: the page", page, self._page, prefix)
        await self._say_links(Signer(secret))

    async def _say_links(self, signer: Signer) -> None:
        base = base_url(self.human, self.run)
        await self._invite(base, signer)
        self._say(f"watch the labeling: {link(base, signer.token(await self.desk.badge_of(OPERATOR, 'operator')))}")
        if warning := open_to_others(self.human, "label.human.host"):
            self.console.print(warning, style="yellow", markup=False, highlight=False)

    async def _invite(self, base: str, signer: Signer) -> None:
        """Say how answers are given. `base`: of the run's page."""
        for name in self.human.labelers:
            self._say(f"judge images, as {name}: {link(base, signer.token(await self.desk.badge_of(name)))}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    async def submit(self, samples: Samples) -> None:
        if self.scorers:
            await self.scorers.submit(samples)
        asked: dict[str, set[str]] = {}
        for sample in samples:
            round_, decided = self._rounds.setdefault(sample.stage, _Asked()), goes_to_people(self.human, sample.id)
            round_.drawn.add(sample.id)
            if decided is None:
                round_.undecided[sample.id] = samples
            elif decided:
                asked.setdefault(sample.stage, set()).add(sample.id)
        for stage, those in asked.items():
            await self._ask(stage, samples.only(those))
        for stage in {sample.stage for sample in samples}:
            round_ = self._rounds[stage]
            # What no score decides, people need not wait for scores to hear.
            if len(round_.drawn) == self.config.generate.images_per_round and not round_.undecided:
                await self.desk.finish(stage, round_number(stage))

    async def scored(self, stage: str, scores: Sequence[Score]) -> None:
        if self.scorers:
            await self.scorers.scored(stage, scores)

    async def _ask(self, stage: str, samples: Samples) -> None:
        pngs = await asyncio.to_thread(to_png, await samples.pixels_BHWC())
        new = [
            NewItem(
                sample_id=sample.id,
                prompt_id=sample.prompt.id,
                prompt=sample.prompt.text,
                png=png,
                policy_version=sample.policy.version,
                needed=needed(self.human, sample.id),
            )
            for sample, png in zip(samples, pngs, strict=True)
        ]
        await self.desk.add(stage, round_number(stage), new)
        await self._show(stage, new)
        self._rounds[stage].people |= {sample.id for sample in samples}

    async def _show(self, stage: str, new: Sequence[NewItem]) -> None:
        """Let people see images that are in the queue; our page asks for them itself."""

    async def finish(self, stage: str) -> None:
        round_ = self._rounds.setdefault(stage, _Asked())
        judged = self.scorers.judge(stage) if self.scorers else None
        if judged:
            round_.scorers = {verdict.sample_id: verdict for verdict in judged.verdicts}
            chosen = undecided(self.human, judged) & round_.undecided.keys()
            if chosen:
                for batch in {id(batch): batch for batch in round_.undecided.values()}.values():
                    if those := batch.only(chosen):
                        await self._ask(stage, those)
        round_.undecided.clear()
        await self.desk.finish(stage, round_number(stage))

    async def collect(self) -> Sequence[Verdict]:
        """Never gives any: all come with the seal."""
        await asyncio.Event().wait()
        return ()

    async def enough(self, stage: str) -> None:
        revision, standing = await self.desk.standing(stage)
        while not standing.enough:
            self._rounds[stage].standing = standing
            revision, standing = await self.desk.standing(stage, revision)

    async def seal(self, stage: str) -> Sequence[Verdict]:
        if self.human.on_deadline == "wait":
            await self.enough(stage)
        round_ = self._rounds.pop(stage, _Asked())
        by_scorers = self.human.on_deadline == "scorer"
        judged = await self.desk.seal(stage, by_scorers)
        table = await self.desk.answers(stage)
        await asyncio.to_thread((self.run / "people").write_table, f"{round_number(stage):05}.parquet", table)
        by_people = {verdict.sample_id for verdict in judged}
        left = round_.scorers.keys() - (by_people if by_scorers else round_.people)
        self._figures[stage] = people_figures(round_number(stage), judged, table) | {
            "people/asked": len(round_.people),
            **(self.scorers.figures(stage) if self.scorers else {}),
        }
        return [
            *(Verdict(verdict.sample_id, verdict.label, self.name, verdict.rule) for verdict in judged),
            *(round_.scorers[sample_id] for sample_id in sorted(left)),
        ]

    def status(self, stage: str) -> str:
        standing = self._rounds.get(stage, _Asked()).standing
        if standing is None:
            return "people's verdicts"
        if not standing.labelers:
            return (
                "people's verdicts, but nobody can give any: links are revoked or expired, or labelers excluded; "
                f"add somebody with: kto-ray labelers add NAME --run {self.run}"
            )
        return f"people's verdicts: {standing.judged} of {standing.asked} images judged"

    def figures(self, stage: str) -> Mapping[str, float]:
        return self._figures.pop(stage, {})

    def memory(self) -> Mapping[str, Any]:
        return self.scorers.memory() if self.scorers else {}

    async def close(self) -> None:
        if self._actor is None:
            return
        actor, self._actor = self._actor, None
        try:
            if self._page:
                await self.desk.end(True)
                await asyncio.sleep(FAREWELL_S)
        finally:
            if self._page:
                end_applications([self._page])
            ray.kill(actor)


def people_figures(number: int, judged: Sequence[Judged], table: pa.Table) -> dict[str, float]:
    """What to log of a round that people judged.

    Args:
        number: of the round.
        judged: the samples whose verdict it is sealed with, late ones of earlier rounds among them.
        table: all answers on them; see `overview.ANSWER_SCHEMA`.
    """
    standing = [row for row in table.to_pylist() if row["void"] is None and row["answer"] != "skip"]
    seconds = [row["seconds"] for row in standing if row["seconds"] is not None]
    agreed = agreement((row["labeler"], row["sample_id"], row["answer"]) for row in standing)
    lags = [number - verdict.policy_version for verdict in judged]
    late = [number - v.policy_version for v in judged if not v.sample_id.startswith(f"round-{number:05}-")]
    figures: dict[str, float | None] = {
        "people/judged": len(judged),
        "people/answers": len(standing),
        "people/labelers": len({row["labeler"] for row in standing}),
        "people/seconds": median(seconds) if seconds else None,
        "people/agreement": agreed.percent,
        "people/alpha": agreed.alpha,
        "people/policy_lag": mean(lags) if lags else None,
        "people/late": len(late),
        "people/late_lag": mean(late) if late else None,
    }
    return {name: value for name, value in figures.items() if value is not None}
