"""The run's one configuration tree: a YAML recipe, dotted overrides, and what both resolve to.

    load("shapes_demo", ["train.learning_rate=1e-4", "rounds=3"]) -> RunConfig

Extra keys are refused, with the nearest known key. `describe` prints the tree and what it implies;
`require_same` guards a run folder against being continued with another configuration. The text under a field is its
documentation.
"""
# ruff: noqa: RUF012  pydantic copies mutable defaults

import difflib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from kto_ray.errors import UserError
from kto_ray.label.thresholds import (
    Absolute,
    Combination,
    PromptQuantile,
    Threshold,
    WeightedSum,
    as_combination,
    as_threshold,
)
from kto_ray.people.settings import Human, RouteAll, RouteDisagreement, as_route
from kto_ray.section import Count, InnerShare, NonNegative, Positive, Section, Share

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Model(Section):
    """The base model; `model: NAME` is short for `model: {name: NAME}`."""

    name: str = "shapes"
    """"shapes" (the embedded world), a diffusers pipeline folder, or a name on the model hub."""
    revision: str | None = None
    """Hub revision; a commit hash makes a run reproducible."""
    variant: str | None = None
    """Weight file variant, for instance "fp16"."""


def _model(value: Any) -> Any:
    """A name stands for the model of that name."""
    return {"name": value} if isinstance(value, str) else value


class Prompts(Section):
    """Where prompts come from: JSONL files of {"id", "text", ...metadata}, or plain text with one prompt a line."""

    train: str = "shapes:train"
    """A file, or "shapes:train"."""
    held_out: str = "shapes:held_out"
    """A file whose prompts are never trained on, or "shapes:held_out"."""


class Resources(Section):
    """What one actor of a role asks of the cluster."""

    num_cpus: NonNegative = 1
    num_gpus: NonNegative = 0
    """Fractions share one GPU."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads of an actor; 0: all cores of its machine when it has no GPU, of a scorer's as many as its CPUs."""


class Generate(Section):
    """How images are sampled, and by how many Serve replicas."""

    images_per_round: Count = 512
    images_per_prompt: Count = 1
    """Images of one prompt in a round."""
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    """Classifier-free guidance; 1 is none."""
    steps: Count = 50
    scheduler: str = "DDIMScheduler"
    """Any diffusers scheduler that is compatible with the pipeline, by class name."""
    batch_size: Count = 8
    """Images of one request."""
    height: Count | None = None
    width: Count | None = None
    """Pixels; None: what the model was trained on."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    compile: bool = False
    """torch.compile the denoiser of every replica."""
    min_replicas: Count = 1
    max_replicas: Count = 1
    """Serve autoscales between the two."""
    max_ongoing_requests: Count = 2
    """Requests a replica holds at a time (one is computed, the others wait)."""
    max_queued_requests: int = 64
    """Requests that wait beyond those before the caller is told to back off; -1: no limit."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> "Generate":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return self


class ScorerSettings(Section):
    """One scorer and the pool of actors that run it."""

    scorer: str | None = None
    """A built-in scorer, or the dotted path `package.module:Name` of a `Scorer` or a function; None: the key under
    which these settings stand, which is also the name that the scores are stored under."""
    args: dict[str, Any] = {}
    """Keyword arguments it is built with: checkpoint, device, dtype, ..."""
    env: str | None = None
    """Environment it runs in: a name of `kto-ray env list`, or the path of a Python; None: the job's own."""
    held_out: bool = False
    """Never used for verdicts, always reported: a second opinion on whether images get better."""
    weight: Positive = 1
    """In a weighted sum."""
    mean: float = 0
    std: Positive = 1
    """A weighted sum with calibration "fixed" takes (score - mean) / std."""
    threshold: Threshold | None = None
    """Of this scorer's vote, when scorers vote; None: `label.threshold`."""
    min_actors: Count = 1
    max_actors: Count = 2
    """The pool grows while samples wait and shrinks when it idles."""
    resources: Resources = Resources(num_cpus=0.25, threads=1)
    max_retries: Annotated[int, Field(ge=0)] = 2
    """How often a batch is handed to another actor when its own died or did not answer in time."""
    timeout_s: Positive = 600
    """An actor that holds a batch for so long is killed and replaced."""

    @model_validator(mode="after")
    def _actors_are_a_range(self) -> "ScorerSettings":
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) must be at least min_actors ({self.min_actors})")
        return self


class Watch(Section):
    """The watch for reward hacking: scores that verdicts come from rise while those of held-out scorers fall."""

    rounds: Annotated[int, Field(ge=3)] = 5
    """Trends are taken over so many rounds."""
    least_slope: NonNegative = 0.05
    """Slopes up to this are chance: in standard deviations of the first round's scores, a round."""
    action: Literal["warn", "stop", "off"] = "warn"


def _scorers(value: Any) -> Any:
    """A name, or a list of names, stands for scorers without settings; the last part of a dotted path is its key."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        scorers = {name.rpartition(":")[2]: {"scorer": name} if ":" in name else {} for name in value}
        if len(scorers) < len(value):
            raise ValueError("two scorers of one name; write a mapping of names of your choice to {scorer: ...}")
        return scorers
    if isinstance(value, dict):
        return {name: {} if settings is None else settings for name, settings in value.items()}
    return value


class Label(Section):
    """Who says yes or no. A scorer and a threshold by default."""

    labeler: str = "threshold"
    """"threshold", "human" (people, on a page), or the dotted path `package.module:Name` of a `Labeler`."""
    labeler_args: dict[str, Any] = {}
    """Keyword arguments that a `Labeler` of one's own is built with."""
    human: Human = Human()
    scorers: Annotated[dict[str, ScorerSettings], BeforeValidator(_scorers)] = {"shapes": ScorerSettings()}
    """Scorers by the name their scores are stored under. They run at the same time, each in its own pool."""
    combine: Combination = WeightedSum()
    """How several scorers come to one verdict."""
    threshold: Threshold = Absolute(value=0.5)
    """From scores to verdicts; a number is an absolute threshold."""
    max_failed_fraction: Share = 0.1
    """A round in which more samples fail stops the run, with the scorer's own error."""
    deadline_s: Positive | None = None
    """How long after its last image a round waits for verdicts before it is sealed without them; None: for ever."""
    min_verdicts: Count = 2
    """A round with fewer yes and no in all is treated like a round of one class."""
    on_one_class: Literal["stop", "skip", "train", "widen"] = "stop"
    """What to do with a round that has yes or no only, or too few of both: stop the run, skip its training, train on
    what is there, or widen: let the round's median decide instead of the threshold (where all score the same, skip)."""
    watch: Watch = Watch()

    @model_validator(mode="after")
    def _scorers_have_a_say(self) -> "Label":
        if self.labeler == "threshold" and not self.voting:
            raise ValueError("scorers must have at least one that is not held_out: verdicts come from it")
        own = [name for name, settings in self.voting.items() if settings.threshold]
        if own and isinstance(self.combine, WeightedSum):
            raise ValueError(
                f"scorers.{own[0]}.threshold would not be used: a weighted_sum has one threshold for all; "
                "give it as label.threshold, or let the scorers vote with combine=agreement or =majority"
            )
        return self

    @model_validator(mode="after")
    def _people_can_be_helped(self) -> "Label":
        if self.labeler != "human":
            return self
        if not self.voting and self.human.on_deadline == "scorer":
            raise ValueError("human.on_deadline: scorer needs a scorer that is not held_out; name one in scorers")
        if not self.voting and not isinstance(self.human.route, RouteAll):
            raise ValueError(
                f"human.route: {self.human.route.kind} leaves the rest to scorers and needs one that is not held_out"
            )
        if isinstance(self.human.route, RouteDisagreement) and (
            isinstance(self.combine, WeightedSum) or len(self.voting) < 2
        ):
            raise ValueError(
                "human.route: disagreement needs scorers that vote: two that are not held_out, and combine=agreement "
                "or =majority"
            )
        return self

    @property
    def voting(self) -> dict[str, ScorerSettings]:
        return {name: settings for name, settings in self.scorers.items() if not settings.held_out}

    @property
    def held_out(self) -> list[str]:
        return [name for name, settings in self.scorers.items() if settings.held_out]


class Adapter(Section):
    """What is trained: low-rank adapters of the denoiser's attention, or all of it."""

    kind: Literal["lora", "full"] = "lora"
    rank: Count = 16
    alpha: Positive | None = None
    """None: equal to the rank, which scales the adapter by 1."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Train(Section):
    """Diffusion-KTO: objective, batches, optimizer, workers. Defaults are the paper's where it names one."""

    beta: Positive = 5000
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky"
    reference_point: Literal["batch_kl", "mismatched_kl", "class_mean", "zero"] = "batch_kl"
    gamma: InnerShare = 0.8
    """Probability that a drawn training sample is desirable."""
    desirable_weight: Positive = 1
    undesirable_weight: Positive = 1
    prompt_dropout: Share = 0.2
    """Share of prompts replaced by the empty prompt, for policy and reference alike."""
    noise_range: tuple[Share, Share] = (0, 1)
    """Part of the noise range that timesteps are drawn from; 0 is clean, 1 is pure noise."""
    global_batch: Count = 64
    """Samples of an optimizer step, over all workers and accumulated micro-batches."""
    micro_batch: Count = 64
    """Samples a worker takes through the model at once."""
    epochs: Positive = 2
    """Draws of a round as a multiple of its verdicts."""
    learning_rate: Positive = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up; "cosine" falls to 0 over `rounds` (and is stretched
    when a run is continued with more of them)."""
    weight_decay: NonNegative = 0
    max_grad_norm: Positive = 1
    adapter: Adapter = Adapter()
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward passes (autocast); weights, errors and optimizer stay float32. Not float16: its small
    gradients underflow without loss scaling."""
    compile: bool = False
    gradient_checkpointing: bool = False
    workers: Count = 1
    resources: Resources = Resources()
    max_failures: int = 3
    """How often Ray Train restarts the workers after a crash; -1: always."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _batch_adds_up(self) -> "Train":
        per_worker, rest = divmod(self.global_batch, self.workers)
        if rest or per_worker % min(self.micro_batch, per_worker):
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of workers ({self.workers}) "
                f"x micro_batch ({self.micro_batch})"
            )
        if self.global_batch == 1 and self.reference_point != "zero":
            raise ValueError(
                f"global_batch 1 with reference_point {self.reference_point}: the mean over one sample says nothing; "
                "use global_batch >= 2, or reference_point: zero"
            )
        if self.noise_range[0] >= self.noise_range[1]:
            raise ValueError(f"noise_range {list(self.noise_range)} must rise, for instance [0, 1]")
        return self


class Evaluate(Section):
    """Held-out prompts, fixed seeds, policy against base."""

    every: Count = 5
    """Rounds between evaluations; the base and the last policy are always evaluated."""
    images_per_prompt: Count = 5
    """The paper compares the median of 5."""
    max_prompts: Count | None = None
    """Take only so many of the held-out prompts."""
    stop_at_pass_rate: Share | None = None
    """End the run when so large a share of the held-out images passes the threshold."""

    def prompts_of(self, held_out: int) -> int:
        """How many of so many held-out prompts are evaluated."""
        return min(held_out, self.max_prompts or held_out)


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_uri: str | None = None


class Cluster(Section):
    """How long and how loudly to wait for the cluster."""

    address: str = "auto"
    """"auto": the cluster this job runs on, or else one of its own on this machine; "local": always its own."""
    wait_s: Positive = 30
    """After so long without the resources asked for, say what is missing; then every minute."""
    health_check_s: Positive = 0.2
    """Poll interval of Ray Train's controller; it bounds the overhead of a warm round."""


class Replay(Section):
    """Rounds of an earlier run, trained on anew before the run goes on with rounds of its own."""

    run: str
    """The folder of the earlier run: a local path or a URI."""
    labels: str | None = None
    """A label set that `kto-ray relabel` has made of it; None: its own verdicts."""


class RunConfig(Section):
    """Everything that defines a run."""

    run: str = "run"
    """Name of the run: its folder under `runs_folder`. The same name continues the run."""
    runs_folder: str = "runs"
    """Local path, or URI that pyarrow or fsspec opens (s3://..., gs://..., memory://...)."""
    seed: int = 0
    rounds: Count = 10
    max_policy_lag: Annotated[int, Field(ge=0)] = 0
    """How many versions older than the policy being trained a sample's may be. 0: strictly on-policy. From 1 on, the
    next round is generated while this one is trained; more lets verdicts that people gave late be trained on, too."""
    replay: Replay | None = None
    """Train on another run's rounds first."""
    model: Annotated[Model, BeforeValidator(_model)] = Model()
    prompts: Prompts = Prompts()
    generate: Generate = Generate()
    label: Label = Label()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _prompt_quantiles_have_something_to_compare(self) -> "RunConfig":
        thresholds = [self.label.threshold, *(settings.threshold for settings in self.label.scorers.values())]
        if any(isinstance(threshold, PromptQuantile) for threshold in thresholds):
            for field, images in (
                ("generate.images_per_prompt", self.generate.images_per_prompt),
                ("evaluate.images_per_prompt", self.evaluate.images_per_prompt),
            ):
                if images < 2:
                    raise ValueError(f"{field} ({images}) must be at least 2 for a threshold of kind prompt_quantile")
        if self.generate.images_per_round % self.generate.images_per_prompt:
            raise ValueError(
                f"generate.images_per_round ({self.generate.images_per_round}) must be a multiple of "
                f"generate.images_per_prompt ({self.generate.images_per_prompt})"
            )
        return self

    @property
    def rounds_ahead(self) -> int:
        """By how many rounds generation runs ahead of training; more than one would only make samples older."""
        return min(1, self.max_policy_lag)

    @property
    def optimizer_steps_per_round(self) -> int:
        """If every image gets a verdict; fewer verdicts, fewer steps."""
        return steps_for(self.generate.images_per_round, self.train)


SHORT_FORMS: dict[str, Callable[[Any], Any]] = {
    "model": _model,
    "label.scorers": _scorers,
    "label.scorers.*.threshold": as_threshold,
    "label.threshold": as_threshold,
    "label.combine": as_combination,
    "label.human.route": as_route,
}
"""Fields whose value may be shorter than the mapping it stands for; an override reaches into the mapping."""

MAY_CHANGE_ON_RESUME = (
    *("rounds", "runs_folder", "evaluate.every", "evaluate.stop_at_pass_rate", "tracking", "cluster"),
    *("generate.resources", "generate.min_replicas", "generate.max_replicas"),
    *("generate.max_ongoing_requests", "generate.max_queued_requests"),
    *("label.scorers.*.resources", "label.scorers.*.min_actors", "label.scorers.*.max_actors"),
    *("label.scorers.*.max_retries", "label.scorers.*.timeout_s", "label.scorers.*.env"),
    *("label.max_failed_fraction", "label.deadline_s", "label.on_one_class", "label.min_verdicts", "label.watch"),
    *("label.human.labelers", "label.human.min_labels", "label.human.on_deadline", "label.human.lease_s"),
    *("label.human.host", "label.human.port", "label.human.public_url", "label.human.link_days"),
    *("label.human.requests_per_minute", "label.human.gold"),
    *("train.resources", "train.workers", "train.micro_batch", "train.max_failures", "train.keep_checkpoints"),
)
"""Fields in which a continued run may differ: how long, how watched, on what machines, and what to do in trouble.
Whatever else differs would make it another experiment."""


def steps_for(verdicts: int, train: Train) -> int:
    """Optimizer steps of a round with so many verdicts: epochs x verdicts / global batch, at least one if any."""
    return max(1, round(train.epochs * verdicts / train.global_batch)) if verdicts else 0


def recipe_names() -> list[str]:
    return sorted(
        path.name.removesuffix(".yaml")
        for path in resources.files("kto_ray.recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def load(recipe: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, lay the overrides over it, check everything.

    Args:
        recipe: a built-in name (`recipe_names`), a path to a YAML file, or None for the defaults.
        overrides: "dotted.field=value" each; values are read as YAML.

    Raises:
        UserError: names the field, the value and what would be right.
    """
    return from_tree(_overlay(_read_recipe(recipe) if recipe else {}, overrides))


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with overrides laid over it; raises as `load`."""
    return from_tree(_overlay(config.model_dump(mode="json"), overrides))


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """Raises UserError, as `load`."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(detail) for detail in error.errors())) from error


def _overlay(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form field=value, for instance rounds=3")
        keys = path.split(".")
        branch = tree
        for depth, key in enumerate(keys[:-1], start=1):
            value = branch.get(key)
            for field, written_out in SHORT_FORMS.items():
                if _is(keys[:depth], field):
                    value = written_out(value)
            branch[key] = value if isinstance(value, dict) else {}
            branch = branch[key]
        try:
            branch[keys[-1]] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override {path}: {text!r} is not a YAML value: {error}") from error
    return tree


def _is(keys: Sequence[str], field: str) -> bool:
    """Whether keys lead to a field, in whose dotted name * stands for any one key."""
    names = field.split(".")
    return len(keys) == len(names) and all(name in ("*", key) for key, name in zip(keys, names, strict=True))


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            raise UserError(
                f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}; known: {', '.join(recipe_names())}"
            )
        text = (resources.files("kto_ray.recipes") / f"{recipe}.yaml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise UserError(f"recipe file {recipe} does not exist; built-in recipes: {', '.join(recipe_names())}")
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {recipe} must be a mapping of fields, not a {type(tree).__name__}")
    return tree


UNIONS = (Union, UnionType)


def _explain(detail: Any) -> str:
    """One pydantic error in the words of this project."""
    location = [str(part) for part in detail["loc"]]
    keys, section = _resolve(location[:-1])
    field = ".".join(keys if get_origin(section) in UNIONS else [*keys, *location[-1:]])
    if detail["type"] == "extra_forbidden":
        known = list(section.model_fields)
        return f"unknown field {field!r}{_nearest(location[-1], known)}; known here: {', '.join(known)}"
    if detail["type"] in ("union_tag_invalid", "model_attributes_type"):
        known, kind = list(_kinds(_resolve(location)[1])), str(detail.get("ctx", {}).get("tag", detail["input"]))
        return f"{field}: unknown kind {kind!r}{_nearest(kind, known)}; known: {', '.join(known)}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (given: {detail['input']!r})"
    return f"{field}: {message}{given}" if field else message


def _resolve(location: list[str]) -> tuple[list[str], Any]:
    """The keys that a user wrote, and the type they lead to; pydantic also names the kind that it chose."""
    keys: list[str] = []
    here: Any = RunConfig
    for part in location:
        if get_origin(here) in UNIONS:
            here = _kinds(here)[part]
            continue
        keys.append(part)
        here = _bare(get_args(here)[1] if get_origin(here) is dict else here.model_fields[part].annotation)
    return keys, here


def _kinds(union: Any) -> dict[str, type[Section]]:
    return {section.model_fields["kind"].default: section for section in get_args(union)}


def _bare(annotation: Any) -> Any:
    """Without Annotated, and without None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in UNIONS:
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def to_yaml(config: RunConfig) -> str:
    """The resolved tree; `load` of this text gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def implied(config: RunConfig, held_out_prompts: int | None = None) -> dict[str, str]:
    """What the tree implies, in words: images, steps, effective batch, disk."""
    train, images, steps = config.train, config.generate.images_per_round, config.optimizer_steps_per_round
    per_worker = train.global_batch // train.workers
    accumulated = per_worker // min(train.micro_batch, per_worker)
    lines = {
        "images": f"{images} a round x {config.rounds} rounds = {images * config.rounds}",
        "optimizer steps": f"up to {steps} a round, {steps * config.rounds} in all",
        "effective batch": f"{train.global_batch} = {train.workers} workers x {per_worker // accumulated} "
        f"x {accumulated} accumulated",
        "draws of a sample": f"{train.epochs:g} a round on average",
    }
    if held_out_prompts is not None:
        prompts, each = config.evaluate.prompts_of(held_out_prompts), config.evaluate.images_per_prompt
        lines["held-out images"] = f"{prompts} prompts x {each} = {prompts * each} an evaluation"
    return lines


def require_same(config: RunConfig, saved: RunConfig) -> None:
    """Raises UserError when a run folder was begun with a configuration that differs where it must not."""
    differences = []

    def compare(new: Any, old: Any, *keys: str) -> None:
        if any(_is(keys, field) for field in MAY_CHANGE_ON_RESUME):
            return
        if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
            for key in new:
                compare(new[key], old[key], *keys, key)
        elif new != old:
            differences.append(f"  {'.'.join(keys)}: the run has {old!r}, this command says {new!r}")

    compare(config.model_dump(mode="json"), saved.model_dump(mode="json"))
    if differences:
        raise UserError(
            f"run {config.run!r} was begun with another configuration:\n" + "\n".join(differences) + "\n"
            "Give the same values to continue it, or another `run` name to begin a new one."
        )
