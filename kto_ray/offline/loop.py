"""A run on labelled images that are there already: prepared once, then train -> publish -> evaluate, again and again.

    source (data/) -> [ prepare ] -> prepared set -> [ stream ] -> train workers -> checkpoint -> policy -> evaluation
                      preparing.py    prepared.py     train/streaming.py            the same as online: `learning.py`

An interval of `data.stream.steps` optimizer steps takes the place of a round: it is sealed by what the stream will draw
in it, in `rounds/` of the run's folder, without samples of its own. So checkpoints, resuming, rewinding, evaluation,
report and export are those of an online run. Nothing is drawn but held-out images.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from kto_ray.caretaker import Caretaker
from kto_ray.cluster import connected, noisily
from kto_ray.concurrency import all_closed, together
from kto_ray.config import RunConfig
from kto_ray.diffusion.sampling import drawing_digest
from kto_ray.errors import UserError
from kto_ray.evaluate.evaluation import Evaluation
from kto_ray.evaluate.summary import write_results
from kto_ray.generate.client import Generators
from kto_ray.learning import Learning, finished
from kto_ray.lease import held
from kto_ray.offline.planning import FILTERED, IN_WORDS_NO_VERDICT
from kto_ray.offline.readying import ready
from kto_ray.placement import Placement, placed
from kto_ray.policies import PolicyStore
from kto_ray.preflight import Preflight
from kto_ray.prepared import PreparedSet
from kto_ray.retention import Retention
from kto_ray.rounds import Ledger, Round, RoundStore
from kto_ray.score.pool import Scorers
from kto_ray.serving import start_serve
from kto_ray.stalls import stalls_said
from kto_ray.starting import kept, started
from kto_ray.stopwatch import Stopwatch
from kto_ray.telling import LiveView, interval_sentence
from kto_ray.tracking import Metrics
from kto_ray.train.job import Training
from kto_ray.train.streaming import Stream
from kto_ray.turns import stage_of
from kto_ray.watch.own_page import OwnPage


def run_offline_kto(config: RunConfig, console: Console | None = None) -> dict[str, Any]:
    """Run, or continue, Diffusion-KTO on labelled images; returns what `summary.json` says.

    Raises:
        UserError: something in the configuration, in the data or around them is not as it must be.
    """
    console = console or Console()
    if config.data is None or not config.offline:
        raise UserError(
            "data: a run on labelled images needs some: give data=PATH, for instance a folder that has liked/ and "
            "disliked/ in it; a run on images of its own is jobs/online_kto.py"
        )
    preflight = Preflight.check(started(config))
    with held(preflight.run, config.cluster.lease_renew_s, config.cluster.lease_stale_s) as (lease, run):
        config, preflight = kept(config, run), replace(preflight, run=run)
        if summary := finished(config, run):
            return summary
        with connected(config.cluster, run):
            placement = placed(config)  # what can never fit is refused before anything is encoded
            prepared = ready(config, preflight, console)
            if config.data and config.data.held_out_share:
                preflight = replace(preflight, held_out_prompts=prepared.held_out())
            preflight.begin(config)
            loop = _OfflineLoop(config, preflight, prepared, console, placement)
            return asyncio.run(lease.while_held(loop.run()))


class Intervals(RoundStore):
    """The intervals of a run, as rounds without samples of their own."""

    def __init__(self, run: Any, prepared: PreparedSet) -> None:
        super().__init__(run)
        self.prepared = prepared

    def ledger(self) -> Ledger:
        """Of the images of the source; that passes draw one again is as it should be, and does not count."""
        manifest, trained = self.prepared.manifest, set[str]()
        for index in self.indices():
            trained.update(self.round(index).trained_ids())
        left_out = Counter(manifest["left_out"])
        blameless = [why for why in left_out if why in IN_WORDS_NO_VERDICT or why.startswith(FILTERED)]
        abstained = sum(left_out[why] for why in blameless)
        return Ledger(
            generated=manifest["images"] + left_out.total(),
            labeled=manifest["images"],
            abstained=abstained,
            failed=left_out.total() - abstained,
            trained=len(trained),
        )


class _OfflineLoop:
    """The parts of one run, wired together; see `learning.Rounds`."""

    def __init__(
        self, config: RunConfig, preflight: Preflight, prepared: PreparedSet, console: Console, placement: Placement
    ) -> None:
        assert config.data is not None
        self.config, self.console, self.run_storage, self.prepared = config, console, preflight.run, prepared
        self.stream = Stream(prepared, config.train, config.data.stream, config.seed)
        self.rounds = Intervals(self.run_storage, prepared)
        policies = PolicyStore(self.run_storage)
        self.retention, self.metrics = Retention(config, policies), Metrics(config, self.run_storage)
        self.caretaker = Caretaker(self.run_storage)
        self.training = Training(config, self.run_storage, placement)
        drawing = drawing_digest(config, preflight.components)
        self.generators = Generators(config, self.run_storage, drawing, placement, self.training.coordinator)
        self.scorers = Scorers(config.label, config.cluster, placement)
        self.page = OwnPage(config, self.run_storage, console)
        self.evaluation = Evaluation(config, self.run_storage, preflight.held_out_prompts)
        asks_fresh = config.evaluate.stop_at_pass_rate is not None
        self.fresh = Evaluation(config, self.run_storage, preflight.held_out_prompts, True) if asks_fresh else None
        policies.publish_base(preflight.reference_digest, preflight.components)
        stage = stage_of(config, placement, self.generators, self.scorers, console.print)
        self.watch, self.progress = Stopwatch(), LiveView(console, config.rounds, lambda: stage.roles)
        self.learning = Learning(
            *(config, console, policies, self.training, self.generators, self.scorers, self.evaluation, self.fresh),
            *(self.retention, self.metrics, stage, self.watch, self.progress),
        )

    async def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self._say_passes()
        parts = self.generators, self.scorers, self.page, self.retention, self.caretaker, self.metrics
        async with all_closed(*parts), stalls_said():
            with self.watch.measure("startup"):
                await self._start()
            with self.progress:
                await self.learning.learn(self)
            await self.training.close()
        self.watch.seconds["total"] = time.monotonic() - began
        return await asyncio.to_thread(
            write_results,
            *(self.config, self.run_storage, self.metrics, self.rounds),
            *(self.evaluation, self.fresh, self.watch.seconds),
        )

    def _say_passes(self) -> None:
        names = {"yes": "desirable image", "no": "undesirable image", "all": "image", "pairs": "prompt"}
        drawn = [f"each {names[n]} {times:.3g} times" for n, times in self.stream.passes(self.config.rounds).items()]
        self.console.print(f"  drawn in all, on average: {', '.join(drawn)}", highlight=False)

    async def _start(self) -> None:
        async with noisily("the run's caretaker, and Serve", self.config.cluster):
            alone = await asyncio.to_thread(self.caretaker.start)
            await asyncio.to_thread(start_serve, self.config.listens, alone)
        self.training.start()
        async with together() as group:
            group.create_task(self.page.start())
            group.create_task(self.generators.start())
            group.create_task(self.scorers.start())

    # -- what learning asks for (`Rounds`) --------------------------------------------------------------------------

    async def sealed(self, index: int) -> Round:
        round_ = self.rounds.round(index)
        await asyncio.to_thread(self._seal, index, round_)
        return round_

    def _seal(self, index: int, round_: Round) -> None:
        """Nothing but what the stream will draw, which follows from the set."""
        if round_.sealed:
            return
        interval = self.stream.interval(index)
        drawn, yes = int(interval.draws_N.sum()), int(interval.draws_N[interval.desirable_N].sum())
        round_.open()
        round_.seal(
            round=index,
            set=self.prepared.key,
            policy_version=index,
            images=len(interval.rows),
            **{"desirable": yes, "undesirable": drawn - yes, "abstained": 0, "failed": 0, "pending": 0},
        )

    def worth_training(self, index: int, round_: Round) -> bool:
        return True

    def nothing_trained(self, index: int, draws: Mapping[str, int]) -> str:
        return f"interval {index}: nothing was trained on, all of its images were left out"

    def sentence(self, facts: Mapping[str, Any]) -> str:
        return interval_sentence(facts)

    async def walked(self, version: int, stopped: bool) -> None:
        """Nobody waits for it: no round is drawn."""
