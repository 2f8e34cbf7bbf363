"""What runs on every Ray Train worker: round after round, with model, optimizer and process group hot.

A round of a run on a prepared set is an interval of its stream (`streaming.py`); all else is the same.

    checkpoint? -> load -> [ publish the policy -> report it to the coordinator and ask for the round after it
                             -> train -> checkpoint committed ] ...

A round counts as trained only after its checkpoint is committed; policy and report follow from the checkpoint, so a
worker that died in between publishes and reports again when it comes back, with the same bytes.

Where the node of a worker is taken away, the workers leave between two rounds, or within one that would not end in time
(`moving.py`), and train that one anew elsewhere.

Where the checkpoint is older than the run, because a newer one was damaged, the rounds in between are trained again as
they were: the same round, the same choice to train or skip it, the same bytes.

A crash is answered by a restart. What a restart would find again (numbers that are not finite, a full disk) is a
UserError, which the coordinator is told instead.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode

from kto_ray import telemetry
from kto_ray.config import RunConfig, held_dtype
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import DTYPES, compile_denoiser, load_family, pick_device
from kto_ray.diffusion.policy import make_policy
from kto_ray.diffusion.sharding import Sharding
from kto_ray.diffusion.texts import texts_of
from kto_ray.errors import UserError
from kto_ray.naming import unique_name
from kto_ray.policies import DigestError, PolicyStore
from kto_ray.prepared import is_labelled, set_of
from kto_ray.rounds import RoundStore, by_sample
from kto_ray.ruling import values_of
from kto_ray.stopwatch import Laps, Seconds, Spent, as_figures
from kto_ray.storage import Storage
from kto_ray.train import checkpointing
from kto_ray.train.batches import RoundData, StoredLatents, TrainingData
from kto_ray.train.checkpoints import beginning
from kto_ray.train.coordinator import RoundTask, TrainingReport
from kto_ray.train.finite import NotFiniteError
from kto_ray.train.following import reference_of
from kto_ray.train.learner import Learner
from kto_ray.train.mixing import Mixed
from kto_ray.train.moving import Looks, Moving
from kto_ray.train.streaming import Stream


def train_worker(arguments: dict[str, Any]) -> None:
    """The train loop that Ray Train calls on every worker, with the arguments of `train_rounds` by name."""
    try:
        train_rounds(**arguments)
    except (UserError, DigestError) as error:
        ray.get(arguments["coordinator"].give_up.remote(str(error)))


def train_rounds(config: RunConfig, run: Storage, coordinator: Any, by_turns: bool = False) -> None:
    """Round after round, until there are no more.

    Args:
        by_turns: others have the card while no round is trained: nothing is on it before the first one is, and between
            rounds.

    Raises:
        UserError, DigestError: what a restart would not mend.
    """
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    resources = config.train.resources
    if resources.threads or config.train.on_cpu:
        torch.set_num_threads(resources.threads or max(1, torch.multiprocessing.cpu_count() // ranks))

    spent, said = Spent(), dict[str, Seconds]()
    run.require_seen()
    telemetry.of_run(unique_name(run))
    if by_turns and not ray.get(coordinator.wait_turn.remote()):
        return
    learner = build_learner(config, run, rank, ranks, distributed=True)
    store, rounds = PolicyStore(run), RoundStore(run)
    base = source.resolve(config.model), config.model
    store.publish_base(source.reference_digest(*base), source.component_digests(*base))
    read = reader_of(config, run)
    version, report = beginning(run), None
    if checkpoint := ray.train.get_checkpoint():
        version, report = load_checkpoint(checkpoint, learner)
    elif version:
        learner.begin_from(store.load(store.resolve(version)))

    moving = Moving(rank, ranks, coordinator)
    storing: float | None = None  # since when
    while True:
        if report:
            publish(store, learner, version)
            if storing:
                stored = {"seconds/publish": time.monotonic() - storing}
                report = replace(report, figures=report.figures | stored)
        again = trained_before(rounds, version)
        if by_turns and report and not again:
            learner.sleep()
            everybody_sleeps(ranks)
        spent.turn_to("sleep" if learner.asleep else "wait")
        task = again or moving.next_round(version, report)
        if task is None:
            return
        spent.turn_to("load")
        learner.wake()
        began = time.monotonic()
        ids, data = read(task, version)
        loaded = time.monotonic()

        looks, laps = moving.within_round(), Laps()

        def on_step(
            step: int, steps: int, index: int = task.round_index, looks: Looks = looks, laps: Laps = laps
        ) -> None:
            if rank == 0:
                telemetry.STEP_SECONDS.observe(laps())
                coordinator.set_progress.remote(index, step, steps)
            looks.after_step(step, steps)

        left_out: list[str] = []

        def on_left_out(samples: list[int], ids: list[str] = ids, left_out: list[str] = left_out) -> None:
            left_out += [ids[sample] for sample in samples]

        spent.turn_to("work")
        reference = reference_of(learner, store, rounds, task.round_index, version)
        try:
            figures, draws = learner.train_round(data, on_step, on_left_out) if data else ({}, np.zeros(0, np.int64))
        except NotFiniteError as error:
            raise UserError(not_finite_sentence(error, task.round_index, ids, run)) from error
        version += 1
        spent.turn_to("load")
        now = everyones(spent, ranks)
        reading = data.seconds if data else 0.0
        report = TrainingReport(
            version=version,
            figures={f"objective/{name}": value for name, value in figures.items()}
            | {"seconds/load": loaded - began + reading, "seconds/train": time.monotonic() - loaded - reading}
            | mixed_figures(ids, draws)
            | as_figures("train_workers", now, said),
            draws={sample_id: int(count) for sample_id, count in zip(ids, draws, strict=True)},
            left_out=left_out,
            reference=(reference.version, reference.digest) if reference else None,
        )
        said = now
        if again:
            require_same_policy(store, learner, version, run)
        storing = time.monotonic()
        commit_checkpoint(learner, version, report, run)


def mixed_figures(ids: Sequence[str], draws_N: npt.NDArray[np.int64]) -> dict[str, float]:
    """How many labelled images were trained on besides those of the round, and how often; nothing where none were."""
    mixed = [count for sample_id, count in zip(ids, draws_N.tolist(), strict=True) if count and is_labelled(sample_id)]
    of_round = int(draws_N.sum()) > sum(mixed)
    return {"mixed/images": float(len(mixed)), "mixed/draws": float(sum(mixed))} if mixed and of_round else {}


def everyones(spent: Spent, ranks: int) -> dict[str, Seconds]:
    """What each rank has spent so far, by its number. Called by every rank."""
    seconds: list[Any] = [spent.so_far()] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(seconds, spent.so_far())
    return {str(rank): one for rank, one in enumerate(seconds)}


def everybody_sleeps(ranks: int) -> None:
    """Until every rank has left its card: only then is the first one's report the end of this turn."""
    if ranks > 1:
        torch.distributed.barrier()


def trained_before(rounds: RoundStore, version: int) -> RoundTask | None:
    """The round after this version as it was trained, when the checkpoint is older than the run; else None."""
    round_ = rounds.round(version)
    return RoundTask(version, train=bool(round_.trained_ids())) if round_.trained else None


def require_same_policy(store: PolicyStore, learner: Learner, version: int, run: Storage) -> None:
    """Raises UserError when a policy that was trained again is not the one that was published."""
    try:
        publish(store, learner, version)
    except DigestError as error:
        raise UserError(
            f"policy {version}, trained again from an older checkpoint, is not to the last bit the one that was "
            "published, as happens on a GPU, and where a cosine was stretched by more rounds since. Go on from policy "
            f"{version - 1} with: kto-ray rewind {run} --to {version - 1}"
        ) from error


def not_finite_sentence(error: NotFiniteError, index: int, ids: Sequence[str], run: Storage) -> str:
    """What was not finite, and how to go on.

    Args:
        ids: of the samples of the round.
    """
    if error.step is None:
        return (
            f"round {index}: the weights of the policy are not finite; nothing was committed. Take up an earlier "
            f"policy with: kto-ray rewind {run} --to VERSION"
        )
    head = f"round {index}, step {error.step}: the {error.what} is not finite; the step was not taken"
    if error.samples:
        return (
            f"{head}, policy {index} is the last good one. It comes from: {_some([ids[i] for i in error.samples])}. "
            "Give the same command with train.on_nonfinite=leave_out to go on without these samples"
        )
    return (
        f"{head}, policy {index} is the last good one. No single sample is to blame; the step drew: "
        f"{_some([ids[i] for i in error.drawn])}. A smaller train.learning_rate, or train.dtype=float32, keeps numbers "
        f"in their range; to change them: kto-ray rewind {run} --to {index} train.learning_rate=..."
    )


def _some(ids: Sequence[str], most: int = 20) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more


def reader_of(config: RunConfig, run: Storage) -> Callable[[RoundTask, int], tuple[list[str], TrainingData | None]]:
    """What gives a round's samples to train on, by their ids, to whoever has this policy version; see `read_round`."""
    if config.data is None or not config.offline:
        rounds, mixed = RoundStore(run), Mixed(set_of(run), config) if config.mixed_places else None

        def read_mixed(task: RoundTask, version: int) -> tuple[list[str], TrainingData | None]:
            ids, data = read_round(rounds, task, version, config)
            return mixed.mix(ids, data) if mixed and data else (ids, data)

        return read_mixed
    stream = Stream(set_of(run), config.train, config.data.stream, config.seed)

    def read_interval(index: int) -> tuple[list[str], TrainingData]:
        interval = stream.interval(index)
        return interval.ids, interval

    return lambda task, version: read_interval(task.round_index)


def read_round(
    rounds: RoundStore, task: RoundTask, version: int, config: RunConfig
) -> tuple[list[str], RoundData | None]:
    """Ids and data of a sealed round's samples to train on; None when there are none, or the round is to be skipped.

    Raises:
        ValueError: the round's files are not as they were sealed.
    """
    lag = config.max_policy_lag
    records, desirable = rounds.trainable(task.round_index, version, lag) if task.train else ([], [])
    if not records:
        return [], None
    values_N = None
    if config.train.objective.needs.pairs == "scores":
        prompts = {record.id: record.prompt.id for record in records}
        scores = [score for home in rounds.homes(prompts) for score in rounds.round(home).scores()]
        values_N = values_of(config.label, by_sample(scores), prompts)
    return [record.id for record in records], RoundData(
        round_index=task.round_index,
        latents=StoredLatents(rounds, records),
        prompts=[record.prompt.text for record in records],
        desirable_N=np.array(desirable),
        seeds=[record.seed for record in records],
        dtype=config.generate.dtype,
        values_N=values_N,
    )


def build_learner(
    config: RunConfig, run: Storage | None = None, rank: int = 0, ranks: int = 1, distributed: bool = False
) -> Learner:
    """Load the base model and set up policy, objective and optimizer; every rank starts from equal weights.

    Args:
        run: the run's folder, which has prompts encoded: nothing that only draws is loaded then, and text encoders only
            for prompts that nobody has met. None: all of the model is loaded, for whoever draws with it, too.
        distributed: whether there is a process group, over which `train.strategy` spreads the work.
    """
    folder, model, guidance = source.resolve(config.model), config.model, config.generate.guidance_scale
    device = pick_device(config.train.device, config.train.resources.num_gpus)
    held = DTYPES[held_dtype(config.train)]
    sharded = distributed and config.train.strategy == "fsdp"
    # What is sharded goes to its device block by block, and need not fit there as a whole.
    at_first = torch.device("cpu") if sharded else device
    family = load_family(folder, model, at_first, held, guidance, "all" if run is None else "denoiser")
    texts = None
    if run is not None:
        dtype, components = DTYPES[config.generate.dtype], source.component_digests(folder, model)
        texts = texts_of(config, run, components, lambda: load_family(folder, model, device, dtype, parts="encoders"))
    # Adapter weights are drawn at random; every rank, and every restart, must draw the same.
    torch.manual_seed(config.seed)
    shard = Sharding(device, DTYPES[config.train.dtype]) if sharded else None
    policy = make_policy(family, config.train.adapter, shard)
    if config.train.compile:
        compile_denoiser(policy.module)
    more = {"find_unused_parameters": True} if family.leaves_unused and config.train.adapter.kind == "full" else {}
    # Ray Train would move it to the card that it was given, if any.
    prepare = partial(
        ray.train.torch.prepare_model,
        move_to_device=device if config.train.on_cpu else True,
        parallel_strategy_kwargs=more,
    )
    wrap = prepare if distributed and not sharded else (lambda module: module)
    total_steps = config.rounds * config.optimizer_steps_per_round
    return Learner(family, policy, config.train, config.seed, device, wrap, rank, ranks, total_steps, texts)


def publish(store: PolicyStore, learner: Learner, version: int) -> None:
    """Publish the weights that are to draw; does nothing when that was done before. Called by every rank."""
    if learner.rank == 0:
        store.publish(version, learner.sampling.tensors(), learner.policy.metadata())
    elif learner.policy.sharded:
        learner.sampling.tensors()  # brings this rank's part


def load_checkpoint(checkpoint: Checkpoint, learner: Learner) -> tuple[int, TrainingReport]:
    """Put the learner where the checkpoint left it; returns its policy version and that round's report."""
    with checkpoint.as_directory() as folder:
        return checkpointing.load(learner, Path(folder))


def commit_checkpoint(learner: Learner, version: int, report: TrainingReport, run: Storage) -> None:
    """Report a checkpoint and wait until Ray Train's controller has committed it. Called by every rank.

    Raises:
        UserError: it cannot be written, or the run's lease was lost.
    """
    run.require_mine()
    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpointing.save(learner, version, report, Path(folder))
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk is full
            raise UserError(f"the checkpoint of policy {version} cannot be written to {folder}: {error}") from error
        mine = learner.rank == 0 or learner.policy.sharded
        try:
            ray.train.report(
                {"version": version, **report.figures}, checkpoint=Checkpoint.from_directory(folder) if mine else None
            )
        except OSError as error:
            raise UserError(
                f"runs_folder: cannot write the checkpoint of policy {version} to {run}/checkpoints: {error}; "
                "give a folder that can be written and has room. The same command then goes on"
            ) from error
    # report() returns before the commit; a crash in between would train this round twice.
    ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
