"""Everything that can be wrong before machine time is spent, looked at first.

`Preflight.check` is the list: each part of the project checks its own section of the configuration, and raises
`UserError` with the field, the value and what would be right. It writes nothing, so that a dry run makes the same
checks; `begin` then opens the run's folder. What was found is handed to the loop.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import kto_ray.diffusion.checks
import kto_ray.feedback.checks
import kto_ray.people.checks
import kto_ray.score.checks
from kto_ray import placement, prompts, tracking
from kto_ray.config import Model, RunConfig, implied, require_same, to_yaml
from kto_ray.config.resuming import Change, Marks, write_down
from kto_ray.diffusion import memory, source
from kto_ray.diffusion.checks import Read, read_by
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.geometry import image_size
from kto_ray.diffusion.sizes import parameters_of
from kto_ray.errors import UserError
from kto_ray.identity import marks_of
from kto_ray.labelers import labeler_class
from kto_ray.policies import PolicyStore
from kto_ray.prompts import trained_on
from kto_ray.records import Prompt
from kto_ray.relabel import Replayed, saved_config
from kto_ray.score.scorers import scorer_marks
from kto_ray.secrets import hide
from kto_ray.starting import started
from kto_ray.storage import Storage
from kto_ray.train import optimizers
from kto_ray.train.checkpoints import REWINDING

logger = logging.getLogger(__name__)

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of a submitted job's driver: what Ray knows of the job."""
ANOTHER = "another `run` name to begin a new one"


@dataclass(frozen=True)
class Preflight:
    """What a run needs, checked."""

    run: Storage
    train_prompts: list[Prompt]
    held_out_prompts: list[Prompt]
    reference_digest: str = ""
    components: dict[str, str] = field(default_factory=dict)
    """Of the base model; nothing is known of one that is still to be downloaded."""
    folder: Path | None = None
    changes: Sequence[Change] = ()
    """What a run that is continued does otherwise than before."""

    @classmethod
    def check(cls, config: RunConfig, download: bool = True) -> "Preflight":
        """Raises UserError. Reads only.

        Args:
            download: False leaves out what can only be checked of a model that is here.
        """
        _check_credentials(config)
        _check_kept(config.runs_folder)
        run = Storage(config.runs_folder) / config.run
        _check_rewound(run)
        # Of a run on labelled images, `offline/loop.py` reads them.
        train = prompts.prompts_of(run, "prompts.train", config.prompts.train) if not config.offline else []
        if config.data is not None and config.data.held_out_share:
            held_out = prompts.kept(run, "prompts.held_out")  # those of the data, once they were looked at
        else:
            held_out = prompts.prompts_of(run, "prompts.held_out", config.prompts.held_out)
        _require_unseen(trained_on(held_out, [prompt.text for prompt in train]))
        tracking.check(config.tracking)
        kto_ray.score.checks.check(config.label.scorers)
        if config.data is not None:
            kto_ray.score.checks.check(config.data.filters, "data.filters")
        labeler_class(config.label.labeler)
        optimizers.check(config.train)
        placement.require_one_a_card(config)
        if config.replay:
            _check_replay(config, held_out)
        if config.label.labeler == "human":
            kto_ray.people.checks.check(config.label.human, run)
        if config.label.labeler == "feedback":
            kto_ray.feedback.checks.check(config.label, run)
        if config.cluster.gpu_gb is not None and source.local_folder(config.model) is None:
            _require_fit(config, source.configs(config.model))  # before anything is downloaded
        found = cls(run, train, held_out)
        if (folder := source.resolve(config.model) if download else source.local_folder(config.model)) is not None:
            model = config.model
            source.check(folder, model)
            _require_fit(config, folder)
            kto_ray.diffusion.checks.check(config, folder)
            prefixes = config.train.objective.needs.prefixes or ("",)
            _check_texts(folder, model, train, held_out, max(prefixes, key=len))
            digests = source.reference_digest(folder, model), source.component_digests(folder, model)
            run.require_room(disk_bytes(config, folder, len(held_out)))
            found = cls(run, train, held_out, *digests, folder)
        return cls(**(vars(found) | {"changes": _changes(config, found)})) if run.exists("config.yaml") else found

    def begin(self, config: RunConfig) -> None:
        """Open the run's folder, whose lease is held: what it began with is written down, and what changes now."""
        if self.changes:
            trained = sum(self.run.exists(f"rounds/{name}/training.json") for name in self.run.names("rounds"))
            write_down(self.changes, self.run, trained)
        prompts.keep(self.run, "prompts.train", self.train_prompts)
        prompts.keep(self.run, "prompts.held_out", self.held_out_prompts)
        self.run.write("config.yaml", to_yaml(config).encode())


def _require_fit(config: RunConfig, configs: Path | None) -> None:
    """Raises UserError: the model does not fit the cards, where it is known what they have."""
    if config.cluster.gpu_gb is not None and configs is not None:
        memory.require_fit(memory.needs_of(config, configs), config.cluster.gpu_gb)


def _check_credentials(config: RunConfig) -> None:
    """These addresses are said in messages, and handed to libraries that say them."""
    addresses = {
        "runs_folder": config.runs_folder,
        "prompts.train.source": config.prompts.train.source,
        "prompts.held_out.source": config.prompts.held_out.source,
        "label.feedback.folder": config.label.feedback.folder or "",
        "label.feedback.path": config.label.feedback.path or "",
        "replay.run": config.replay.run if config.replay else "",
        "start_from": config.start_from or "",
        "tracking.mlflow_uri": config.tracking.mlflow_uri or "",
    }
    for name, address in addresses.items():
        if (shown := hide(address)) != address:
            raise UserError(
                f"{name}: {shown} holds a password or key; leave it out and give it in the environment, where the "
                "library that opens the address looks for it, for instance as AWS_SECRET_ACCESS_KEY"
            )


def _check_kept(runs_folder: str) -> None:
    """A job's working directory is a copy: unpacked on each node for itself, anew after every change, for a session."""
    job = json.loads(os.environ.get(RAY_JOB) or "{}")
    if "://" in runs_folder or not (job.get("runtime_env") or {}).get("working_dir"):
        return
    folder = Path(runs_folder).expanduser().absolute()
    if folder.is_relative_to(Path.cwd()):
        raise UserError(
            f"runs_folder: {runs_folder} is in this job's working directory ({Path.cwd()}), which Ray unpacks on every "
            "node for itself and throws away; give the path of a folder that all machines share, or for instance "
            "s3://bucket/runs"
        )


def _check_rewound(run: Storage) -> None:
    if run.exists(REWINDING):
        to = run.read_json(REWINDING)["to"]
        raise UserError(f"run: {run} is half rewound; finish that with: kto-ray rewind {run} --to {to}")


def _require_unseen(seen: Sequence[str]) -> None:
    if seen:
        raise UserError(
            f"prompts.held_out: {len(seen)} of its prompts are trained on, too, for instance {sorted(seen)[0]!r}; "
            "held-out prompts must not be in prompts.train"
        )


def _check_replay(config: RunConfig, held_out: Sequence[Prompt]) -> None:
    assert config.replay is not None
    if both := trained_on(held_out, Replayed(config.replay, config).prompt_texts()):
        raise UserError(
            f"replay.run: {config.replay.run} was trained on {len(both)} of the prompts.held_out, for instance "
            f"{sorted(both)[0]!r}; held-out prompts must not be trained on"
        )


def _check_texts(folder: Path, model: Model, train: Sequence[Prompt], held_out: Sequence[Prompt], prefix: str) -> None:
    """Say what the model does not read of the prompts. Raises UserError for held-out prompts that it is trained on.

    Args:
        prefix: the longest that goes before a prompt.
    """
    limit, read = 0, dict[str, list[Read]]()
    for name, texts in (("prompts.train", train), ("prompts.held_out", held_out)):
        if not texts:  # of a run on labelled images, which are looked at later
            read[name] = []
            continue
        read[name], limit = read_by(folder, model, [prefix + prompt.text for prompt in texts])
        if cut := [(prompt, text.lost) for prompt, text in zip(texts, read[name], strict=True) if text.cut]:
            prompt, lost = max(cut, key=lambda pair: len(pair[1]))
            logger.warning(
                "%s: of %d of %d prompts the model reads only the first %d tokens; most is lost of %r: %r",
                *(name, len(cut), len(texts), limit, prompt.id, lost),
            )
    known = {text.tokens for text in read["prompts.train"]}
    pairs = zip(held_out, read["prompts.held_out"], strict=True)
    seen = [(prompt.text, text.cut) for prompt, text in pairs if text.tokens in known]
    _require_unseen([text for text, cut in seen if not cut])
    if seen:
        logger.warning(
            "prompts.held_out: %d of its prompts are in their first %d tokens, all that the model reads, like one that "
            "is trained on, for instance %r",
            *(len(seen), limit, seen[0][0]),
        )


def _changes(config: RunConfig, found: Preflight) -> list[Change]:
    """In what a run differs from its folder. Raises UserError where it must not."""
    policies, same_content = PolicyStore(found.run), []
    try:
        saved = saved_config(found.run)
    except UserError as error:
        raise UserError(f"{error}\nGive {ANOTHER}.") from error
    differs = policies.base_differs(found.reference_digest, found.components) if found.folder else None
    # Of a model that has moved, only its digests can tell that it is the same.
    if found.folder and policies.base_components() is not None and not differs:
        same_content += ["model"]
    same_content += [
        name
        for name, texts in (("prompts.train", found.train_prompts), ("prompts.held_out", found.held_out_prompts))
        if prompts.require_kept(found.run, name, texts)
    ]
    if found.folder:
        same_content += _named(config, saved, kto_ray.diffusion.checks.defaults(found.folder, config.model))
    changes = require_same(config, saved, _argument_marks(config), same_content)
    if any(change.field in ("evaluate.every", "rounds") for change in changes):
        _check_evaluated(config, saved, found.run)
    if differs:
        raise UserError(f"model.name: {differs}; give the model that the run began with, or {ANOTHER}")
    return changes


def _named(config: RunConfig, saved: RunConfig, defaults: Mapping[str, Any]) -> list[str]:
    """Of the fields with a default that depends on the model, those in which two configurations come to the same."""

    def values(tree: RunConfig) -> dict[str, Any]:
        named = {name: attrgetter(name)(tree) or default for name, default in defaults.items()}
        return named | {"evaluate.generate.scheduler": tree.held_out.scheduler or defaults["generate.scheduler"]}

    saved_values = values(saved)
    return [name for name, value in values(config).items() if value == saved_values[name]]


def _check_evaluated(config: RunConfig, saved: RunConfig, run: Storage) -> None:
    """Raises UserError where other policies are to be evaluated than before, and one is not kept any more."""
    policies, every = PolicyStore(run), config.evaluate.every
    newest = min(policies.newest(), config.rounds)
    wanted = [version for version in range(1, newest + 1) if version % every == 0 or version == config.rounds]
    gone = [
        version
        for version in wanted
        if not policies.has_weights(version) and not run.exists(f"evaluations/{version:05}/manifest.json")
    ]
    if gone:
        raise UserError(
            f"evaluate.every ({every}) and rounds ({config.rounds}) would have policies evaluated that were not before "
            f"and whose weights are gone (keep_policies): {', '.join(map(str, gone))}; give the values of the run, "
            f"{saved.evaluate.every} and {saved.rounds}, or more rounds"
        )


def _argument_marks(config: RunConfig) -> dict[str, Marks]:
    """What arguments of the run's plug-ins may change, by the field that holds them."""
    scorers = {name: settings.scorer or name for name, settings in config.label.scorers.items()}
    marks: dict[str, Marks] = {f"label.scorers.{name}.args": scorer_marks(path) for name, path in scorers.items()}
    if config.data is not None:
        filters = {name: settings.scorer or name for name, settings in config.data.filters.items()}
        marks |= {f"data.filters.{name}.args": scorer_marks(path) for name, path in filters.items()}
    return marks | {"label.labeler_args": marks_of(labeler_class(config.label.labeler))}


def disk_bytes(config: RunConfig, folder: Path, held_out_prompts: int) -> int:
    """About how much a whole run stores at most: images and latents uncompressed, policies and checkpoints."""
    family = family_of(folder, config.model)
    geometry = family.geometry_of(folder)
    height, width = image_size(config.generate, geometry)
    pixels, latents = height * width * 3, height * width // geometry.shrink**2 * geometry.channels * 4
    evaluations = 2 + config.rounds // config.evaluate.every + 2 * (config.evaluate.stop_at_pass_rate is not None)
    a_round, kept = config.generate.images_per_round, config.keep_pixels
    an_evaluation = config.evaluate.prompts_of(held_out_prompts) * config.evaluate.images_per_prompt
    drawn = (0 if config.offline else config.rounds * a_round) + evaluations * an_evaluation
    # Besides the rounds that are kept, those in the making and in training; besides two evaluations, the one in work.
    with_pixels = min(drawn, (kept + 2) * a_round + 3 * an_evaluation) if kept != "all" else drawn
    adapter = config.train.adapter
    if adapter.kind == "full":
        trained = 4 * parameters_of(folder, family.part)
    else:
        shapes = kto_ray.diffusion.checks.adapted(folder, config.model, adapter).values()
        trained = sum(4 * adapter.rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)
    policies = config.rounds if config.keep_policies == "all" else min(config.rounds, config.keep_policies)
    return drawn * latents + with_pixels * pixels + (policies + 3 * config.train.keep_checkpoints) * trained


def _memory(config: RunConfig) -> dict[str, str]:
    """What each role holds on its device, in words."""
    try:
        configs = source.configs(config.model)
    except UserError as error:  # the hub is away: a dry run goes without
        return {"memory": f"unknown: {error}"}
    if configs is None:
        return {"memory": "unknown until a folder is made of the file"}
    return {f"a {need.role} holds": str(need) for need in memory.needs_of(config, configs)}


def describe(config: RunConfig) -> str:
    """The resolved tree and what it implies, checked as a run's is, but for a model that is still to be downloaded."""
    config = started(config)
    found = Preflight.check(config, download=False)
    train, held_out = len(found.train_prompts), len(found.held_out_prompts)
    trained = "" if config.offline else f"{train} for training, "
    facts = {"prompts": f"{trained}{held_out} held out", **implied(config, held_out)}
    facts["disk"] = "unknown until the model is downloaded"
    if found.folder is not None:
        stored = disk_bytes(config, found.folder, held_out) / 1e6
        facts["disk"] = f"about {stored:,.0f} MB uncompressed, and at most {config.keep_texts:g} GB of encoded prompts"
    facts |= _memory(config)
    return to_yaml(config) + "\n" + "\n".join(f"{name}: {value}" for name, value in facts.items())
