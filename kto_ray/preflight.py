"""Everything that can be wrong before machine time is spent, looked at first.

`Preflight.check` reads the model folder's headers, the prompts and the run folder, and raises `UserError` with the
field, the value and what would be right. What it found is handed to the loop.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kto_ray.config import RunConfig, implied, require_same, to_yaml
from kto_ray.config.resuming import Change, Marks, write_down
from kto_ray.diffusion import source
from kto_ray.diffusion.layouts import layout_of
from kto_ray.errors import UserError
from kto_ray.identity import marks_of
from kto_ray.labelers import labeler_class
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.clock import Clock
from kto_ray.people.gold import load_gold
from kto_ray.people.people import People
from kto_ray.people.tables import open_database
from kto_ray.policies import PolicyStore
from kto_ray.prompts import load_prompts
from kto_ray.records import Prompt
from kto_ray.relabel import Replayed, saved_config
from kto_ray.score.environments.finding import interpreter
from kto_ray.score.scorers import load_scorer, scorer_marks
from kto_ray.storage import Storage
from kto_ray.train.checkpoints import REWINDING


@dataclass(frozen=True)
class Preflight:
    """What a run needs, checked."""

    run: Storage
    train_prompts: list[Prompt]
    held_out_prompts: list[Prompt]
    reference_digest: str
    components: dict[str, str]

    @classmethod
    def check(cls, config: RunConfig) -> "Preflight":
        """Raises UserError. Creates the run folder and saves the resolved configuration in it."""
        train = load_prompts("prompts.train", config.prompts.train)
        held_out = load_prompts("prompts.held_out", config.prompts.held_out)
        if both := {prompt.text for prompt in train} & {prompt.text for prompt in held_out}:
            raise UserError(
                f"prompts.held_out: {len(both)} of its prompts are trained on, too, for instance {sorted(both)[0]!r}; "
                "held-out prompts must not be in prompts.train"
            )
        _check_label(config, held_out)
        folder, variant = source.resolve(config.model), config.model.variant
        source.check(folder, variant)
        _check_scheduler(config, folder)
        run = Storage(config.runs_folder) / config.run
        if run.exists(REWINDING):
            to = run.read_json(REWINDING)["to"]
            raise UserError(f"run: {run} is half rewound; finish that with: kto-ray rewind {run} --to {to}")
        base = source.reference_digest(folder, variant), source.component_digests(folder, variant)
        changes = _changes(config, run, base) if run.exists("config.yaml") else []
        run.require_room(disk_bytes(config, folder, len(held_out)))
        if config.label.labeler == "human":
            _check_people(config, run)
        write_down(changes, run, sum(run.exists(f"rounds/{name}/training.json") for name in run.names("rounds")))
        run.write("config.yaml", to_yaml(config).encode())
        return cls(run, train, held_out, *base)


def _changes(config: RunConfig, run: Storage, base: tuple[str, dict[str, str]]) -> list[Change]:
    """In what a run differs from its folder. Raises UserError where it must not."""
    policies, another = PolicyStore(run), "another `run` name to begin a new one"
    try:
        saved = saved_config(run)
    except UserError as error:
        raise UserError(f"{error}\nGive {another}.") from error
    differs = policies.base_differs(*base)
    # Of a model that has moved, only its digests can tell that it is the same.
    same_content = [] if differs or policies.base_components() is None else ["model"]
    changes = require_same(config, saved, _argument_marks(config), same_content)
    if differs:
        raise UserError(f"model.name: {differs}; give the model that the run began with, or {another}")
    return changes


def _argument_marks(config: RunConfig) -> dict[str, Marks]:
    """What arguments of the run's plug-ins may change, by the field that holds them."""
    scorers = {name: settings.scorer or name for name, settings in config.label.scorers.items()}
    marks: dict[str, Marks] = {f"label.scorers.{name}.args": scorer_marks(path) for name, path in scorers.items()}
    return marks | {"label.labeler_args": marks_of(labeler_class(config.label.labeler))}


def _check_label(config: RunConfig, held_out: Sequence[Prompt]) -> None:
    for name, settings in config.label.scorers.items():
        load_scorer(settings.scorer or name, f"label.scorers.{name}")
        try:
            if settings.env:
                interpreter(settings.env)
        except UserError as error:
            raise UserError(f"label.scorers.{name}.env: {error}") from error
    labeler_class(config.label.labeler)
    if config.replay and (both := Replayed(config.replay, config).prompt_texts() & {p.text for p in held_out}):
        raise UserError(
            f"replay.run: {config.replay.run} was trained on {len(both)} of the prompts.held_out, for instance "
            f"{sorted(both)[0]!r}; held-out prompts must not be trained on"
        )


def _check_people(config: RunConfig, run: Storage) -> None:
    """Raises UserError: a database or gold that cannot be used, or nobody who could label."""
    human, field = config.label.human, "label.human.labelers"
    if human.gold.file:
        load_gold(human.gold.file)
    engine = open_database(database_url(human, run), database_owner(human, run))
    people = People(engine, human, Clock()).everybody()
    engine.dispose()
    if not human.labelers and not any(person.role == "labeler" and person.links for person in people):
        raise UserError(
            f"{field}: nobody can label: name somebody, for instance {field}=[ann], or add people with: "
            f"kto-ray labelers add NAME --run {run}"
        )


def _check_scheduler(config: RunConfig, folder: Path) -> None:
    import diffusers

    from kto_ray.diffusion.noise import DiscreteDiffusion
    from kto_ray.diffusion.sampling import compatible_scheduler

    named = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, named).from_pretrained(folder, subfolder="scheduler")
    compatible_scheduler(scheduler, config.generate.scheduler)
    DiscreteDiffusion.from_folder(folder)


def disk_bytes(config: RunConfig, folder: Path, held_out_prompts: int) -> int:
    """About how much a whole run stores: images and latents uncompressed, policies and checkpoints."""
    layout = layout_of(folder)
    geometry = layout.geometry(folder)
    native_height, native_width = geometry.pixels or (0, 0)
    height, width = config.generate.height or native_height, config.generate.width or native_width
    image = height * width * 3 + height * width // geometry.shrink**2 * geometry.channels * 4
    evaluations = 2 + config.rounds // config.evaluate.every + 2 * (config.evaluate.stop_at_pass_rate is not None)
    evaluated = evaluations * config.evaluate.prompts_of(held_out_prompts)
    images = config.rounds * config.generate.images_per_round + evaluated * config.evaluate.images_per_prompt
    weights = sum(file.stat().st_size for file in source.weight_files(folder / layout.denoiser, config.model.variant))
    trained = weights * 2 if config.train.adapter.kind == "full" else weights // 10
    return images * image + (config.rounds + 3 * config.train.keep_checkpoints) * trained


def describe(config: RunConfig) -> str:
    """The resolved tree and what it implies, checked against prompts and model as far as they are at hand."""
    train = load_prompts("prompts.train", config.prompts.train)
    held_out = load_prompts("prompts.held_out", config.prompts.held_out)
    facts = {"prompts": f"{len(train)} for training, {len(held_out)} held out", **implied(config, len(held_out))}
    _check_label(config, held_out)
    folder = source.local_folder(config.model)
    if folder is None:
        facts["disk"] = "unknown until the model is downloaded"
    else:
        source.check(folder, config.model.variant)
        facts["disk"] = f"about {disk_bytes(config, folder, len(held_out)) / 1e6:,.0f} MB uncompressed"
    return to_yaml(config) + "\n" + "\n".join(f"{name}: {value}" for name, value in facts.items())
