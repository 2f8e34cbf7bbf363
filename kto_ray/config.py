"""The run's one configuration tree: a YAML recipe, dotted overrides, and what both resolve to.

    load("shapes_demo", ["train.learning_rate=1e-4", "rounds=3"]) -> RunConfig

Extra keys are refused, with the nearest known key. `describe` prints the tree and what it implies;
`require_same` guards a run folder against being continued with another configuration. The text under a field is its
documentation.
"""

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kto_ray.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the tree: frozen, no extra keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Model(Section):
    """The base model; `model: NAME` is short for `model: {name: NAME}`."""

    name: str = "shapes"
    """"shapes" (the embedded world), a diffusers pipeline folder, or a name on the model hub."""
    revision: str | None = None
    """Hub revision; a commit hash makes a run reproducible."""
    variant: str | None = None
    """Weight file variant, for instance "fp16"."""


class Prompts(Section):
    """Where prompts come from: JSONL files of {"id", "text", ...metadata}, or plain text with one prompt a line."""

    train: str = "shapes:train"
    """A file, or "shapes:train"."""
    held_out: str = "shapes:held_out"
    """A file whose prompts are never trained on, or "shapes:held_out"."""


class Resources(Section):
    """What one actor of a role asks of the cluster."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """Fractions share one GPU."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads of an actor; 0: all cores of its machine when it has no GPU."""


class Generate(Section):
    """How images are sampled, and by how many Serve replicas."""

    images_per_round: Count = 512
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


class Label(Section):
    """Who says yes or no. A scorer and a threshold by default."""

    labeler: str = "scorer"
    """"scorer", or the dotted path `package.module:Name` of a `Labeler`."""
    labeler_args: dict[str, Any] = {}
    scorer: str = "shapes"
    """A built-in scorer, or the dotted path `package.module:Name` of a `Scorer`."""
    scorer_args: dict[str, Any] = {}
    threshold: float = 0.5
    """A score at least this high is desirable."""
    abstain_below_margin: Annotated[float, Field(ge=0)] = 0
    """Scores closer to the threshold than this get no verdict."""
    min_actors: Count = 1
    max_actors: Count = 2
    """The pool grows while samples wait and shrinks when it idles."""
    resources: Resources = Resources(num_cpus=0.25, threads=1)
    max_retries: Annotated[int, Field(ge=0)] = 3
    """How often samples are handed to another actor when theirs died."""
    timeout_s: Positive = 600
    """A batch unanswered for so long is counted as failed, and its actor replaced."""
    max_failed_fraction: Share = 0.1
    """A round with more failed scores stops the run, with the scorer's own error."""
    deadline_s: Positive | None = None
    """How long after its last image a round waits for verdicts before it is sealed without them; None: for ever."""
    on_one_class: Literal["stop", "skip", "train"] = "stop"
    """What to do with a round without desirable, or without undesirable, verdicts."""

    @model_validator(mode="after")
    def _actors_are_a_range(self) -> "Label":
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors ({self.max_actors}) must be at least min_actors ({self.min_actors})")
        return self


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
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.8
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
    weight_decay: Annotated[float, Field(ge=0)] = 0
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


class RunConfig(Section):
    """Everything that defines a run."""

    run: str = "run"
    """Name of the run: its folder under `runs_folder`. The same name continues the run."""
    runs_folder: str = "runs"
    """Local path, or URI that pyarrow or fsspec opens (s3://..., gs://..., memory://...)."""
    seed: int = 0
    rounds: Count = 10
    max_policy_lag: Annotated[int, Field(ge=0, le=1)] = 0
    """0: strictly on-policy. 1: the next round is generated while this one is trained."""
    model: Annotated[Model, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Model()
    prompts: Prompts = Prompts()
    generate: Generate = Generate()
    label: Label = Label()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()

    @property
    def optimizer_steps_per_round(self) -> int:
        """If every image gets a verdict; fewer verdicts, fewer steps."""
        return steps_for(self.generate.images_per_round, self.train)


MAY_CHANGE_ON_RESUME = (
    *("rounds", "runs_folder", "evaluate.every", "evaluate.stop_at_pass_rate", "tracking", "cluster"),
    *("generate.resources", "generate.min_replicas", "generate.max_replicas"),
    *("generate.max_ongoing_requests", "generate.max_queued_requests"),
    *("label.resources", "label.min_actors", "label.max_actors", "label.max_retries", "label.timeout_s"),
    *("label.max_failed_fraction", "label.deadline_s", "label.on_one_class"),
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


def load(recipe: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a recipe, lay the overrides over it, check everything.

    Args:
        recipe: a built-in name (`recipe_names`), a path to a YAML file, or None for the defaults.
        overrides: "dotted.field=value" each; values are read as YAML.

    Raises:
        UserError: names the field, the value and what would be right.
    """
    tree = _read_recipe(recipe) if recipe else {}
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"override {override!r} is not of the form field=value, for instance rounds=3")
        keys = path.split(".")
        branch = tree
        for key in keys[:-1]:
            value = branch.get(key)
            if isinstance(value, str) and key == "model":
                value = {"name": value}
            branch[key] = value if isinstance(value, dict) else {}
            branch = branch[key]
        try:
            branch[keys[-1]] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override {path}: {text!r} is not a YAML value: {error}") from error
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(detail) for detail in error.errors())) from error


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


def _explain(detail: Any) -> str:
    """One pydantic error in the words of this project."""
    location = [str(part) for part in detail["loc"]]
    field = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _fields_of(location[:-1])
        return f"unknown field {field!r}{_nearest(location[-1], known)}; known here: {', '.join(known)}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] == "value_error" else f" (given: {detail['input']!r})"
    return f"{field}: {message}{given}" if field else message


def _fields_of(location: list[str]) -> list[str]:
    section: Any = RunConfig
    for key in location:
        annotation = section.model_fields[key].annotation
        section = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, Section))
    return list(section.model_fields)


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

    def compare(new: Any, old: Any, path: str) -> None:
        if path in MAY_CHANGE_ON_RESUME:
            return
        if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
            for key in new:
                compare(new[key], old[key], f"{path}.{key}" if path else key)
        elif new != old:
            differences.append(f"  {path}: the run has {old!r}, this command says {new!r}")

    compare(config.model_dump(mode="json"), saved.model_dump(mode="json"), "")
    if differences:
        raise UserError(
            f"run {config.run!r} was begun with another configuration:\n" + "\n".join(differences) + "\n"
            "Give the same values to continue it, or another `run` name to begin a new one."
        )
