"""The tree: a run as a whole, and the sections that belong to no single part of it.

The other sections have a file each beside this one. The text under a field is its documentation.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kto_ray.config.data import Data, as_data
from kto_ray.config.generate import ALIGNED_STEPS, DRAWING, LATER, Generate, Otherwise
from kto_ray.config.label import Labeling, as_scorers
from kto_ray.config.machines import Cluster
from kto_ray.config.pages import Address, WatchPage
from kto_ray.config.people import as_route
from kto_ray.config.prompts import Prompts, as_prompt_set
from kto_ray.config.train import Train, as_sampling_policy, steps_for
from kto_ray.config.watching import as_watch
from kto_ray.errors import UserError
from kto_ray.identity import ByContent, Fixed, Free
from kto_ray.objectives import as_objective
from kto_ray.section import Count, Section, Share
from kto_ray.verdicts.thresholds import PromptQuantile, as_combination, as_threshold


class BaseAdapter(Section):
    """A LoRA that becomes a part of the base model; a name alone is short for `{name: NAME}`."""

    name: ByContent[str]
    """A safetensors file, a folder that has one, or a name on the model hub."""
    file: ByContent[str | None] = None
    """Of a folder or hub name that has several."""
    revision: ByContent[str | None] = None
    """Hub revision; a commit hash makes a run reproducible."""
    scale: Fixed[float] = 1.0
    """How much of it is added to the weights."""


def as_base_adapters(value: Any) -> Any:
    """A name stands for the adapter of that name, and one adapter for a list of it."""
    several = [value] if isinstance(value, str | Mapping) else value
    return [{"name": one} if isinstance(one, str) else one for one in several] if isinstance(several, list) else several


class Model(Section):
    """The base model; `model: NAME` is short for `model: {name: NAME}`."""

    name: ByContent[str] = "shapes"
    """"shapes" (the embedded world), a diffusers pipeline folder, a single safetensors checkpoint, or a name on the
    model hub."""
    revision: ByContent[str | None] = None
    """Hub revision; a commit hash makes a run reproducible."""
    variant: ByContent[str | None] = None
    """Weight file variant, for instance "fp16"."""
    config: ByContent[str | None] = None
    """For a single checkpoint: a diffusers folder of the same kind, of which configurations, tokenizers and what the
    file lacks are taken; None: what the model hub has for the kind."""
    adapters: ByContent[Annotated[tuple[BaseAdapter, ...], BeforeValidator(as_base_adapters)]] = ()
    """LoRAs that are added to the base model's weights before anything is drawn or trained."""
    family: Fixed[str | None] = None
    """A class of one's own that loads and trains the model, `my_module:MyFamily`; None: by the folder's pipeline."""


def as_model(value: Any) -> Any:
    """A name stands for the model of that name."""
    return {"name": value} if isinstance(value, str) else value


HELD_OUT_STAGES = "evaluation", "fresh_evaluation"
"""Stages of what is drawn to evaluate a policy; the second, of other seeds than those by which the run is ended."""


class Evaluate(Section):
    """Held-out prompts, fixed seeds, policy against base."""

    every: Free[Count] = 5
    """Rounds between evaluations; the base and the last policy are always evaluated."""
    images_per_prompt: Fixed[Count] = 5
    """The paper compares the median of 5."""
    max_prompts: Fixed[Count | None] = None
    """Take only so many of the held-out prompts."""
    stop_at_pass_rate: Free[Share | None] = None
    """End the run when the pass rate of the held-out prompts is at least this, and so is the low end of its 95 %
    interval. Base and last policy are then reported on images with other seeds than those that decided."""
    generate: Otherwise = Otherwise()
    """How held-out images are drawn, where it is not as those of rounds are, for instance in more steps."""

    def prompts_of(self, held_out: int) -> int:
        """How many of so many held-out prompts are evaluated."""
        return min(held_out, self.max_prompts or held_out)


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`. A server that is away is sent later what it missed."""

    tensorboard: Free[bool] = True
    """Write `tensorboard/` in the run's folder."""
    wandb_project: Free[str | None] = None
    """Project of Weights & Biases that figures are sent to (`pip install 'kto-ray[wandb]'`); None: not sent."""
    mlflow_uri: Free[str | None] = None
    """Server or folder of MLflow that figures are sent to (`pip install 'kto-ray[mlflow]'`); None: not sent."""


class Replay(Section):
    """Rounds of an earlier run, trained on anew before the run goes on with rounds of its own."""

    run: Fixed[str]
    """The folder of the earlier run: a local path or a URI."""
    labels: Fixed[str | None] = None
    """A label set that `kto-ray relabel` has made of it; None: its own verdicts."""


def as_name(value: Any) -> Any:
    """Raises ValueError for what YAML takes for something else than a text."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text to YAML; put it in quotes that the shell leaves: run='\"{value}\"'")
    return value


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def require_name(run: str) -> None:
    """Raises UserError for a name that cannot be everything a run's name is. Runs that have one already still open."""
    if not NAME.fullmatch(run):
        raise UserError(
            f"run: {run!r} cannot be the name of a run, which is a folder, a part of web addresses and a name in other "
            "services; use letters, digits, '.', '_' and '-', beginning with a letter or digit, 100 at most"
        )


class RunConfig(Section):
    """Everything that defines a run."""

    run: Fixed[Annotated[str, BeforeValidator(as_name)]] = "run"
    """Name of the run: its folder under `runs_folder`. The same name continues the run. Letters, digits, ".", "_" and
    "-", beginning with a letter or digit, 100 at most."""
    runs_folder: Free[str] = "runs"
    """Local path, or URI that pyarrow or fsspec opens (s3://..., gs://..., memory://...)."""
    seed: Fixed[int] = 0
    """Seeds of images, batches and noise follow from it."""
    rounds: Free[Count] = 10
    """How many rounds there are in all; a run that is continued may have more."""
    max_policy_lag: Fixed[Annotated[int, Field(ge=0)]] = 0
    """How many versions older than the policy being trained a sample's may be. 0: strictly on-policy. From 1 on, the
    next round is generated while this one is trained; more lets verdicts that people gave late be trained on, too."""
    keep_policies: Free[Literal["all"] | Annotated[int, Field(ge=2)]] = "all"
    """How many policies keep their weights: "all", or the last so many, at least `train.keep_checkpoints`. Of others
    the digests are left; they can neither be evaluated later, nor can the run be rewound to them."""
    keep_pixels: Free[Literal["all"] | Annotated[int, Field(ge=0)]] = "all"
    """Of how many rounds, and of which evaluations, the images themselves are kept: "all", or the last so many rounds
    (0: none once the round is sealed) and the evaluations of the base and of the newest policy, which the report shows.
    Latents, scores and verdicts stay, and with them all that training, `relabel` and `replay` need."""
    keep_texts: Free[Annotated[float, Field(ge=0)]] = 20
    """About how many GB of encoded prompts are kept, so that each prompt is encoded once in a run, for drawing and for
    training; what is beyond is encoded again by whoever needs it."""
    replay: Fixed[Replay | None] = None
    """Train on another run's rounds first."""
    model: Annotated[Model, BeforeValidator(as_model)] = Model()
    start_from: Fixed[str | None] = None
    """`RUN@POLICY`: begin with a policy that another run (its folder or URI) has trained of the same `model`; without
    `@POLICY`, with its newest. It becomes a part of the base model: policy 0, and a fixed reference, are it."""
    prompts: Prompts = Prompts()
    data: Fixed[Annotated[Data | None, BeforeValidator(as_data)]] = None
    """Labelled images that are there already, to train on; None: all images are drawn and judged by the run itself."""
    generate: Generate = Generate()
    label: Labeling = Labeling()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    watch: WatchPage = WatchPage()
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

    @model_validator(mode="after")
    def _somebody_brings_replicas_back(self) -> "RunConfig":
        if not self.generate.min_replicas and self.cluster.placement != "elastic":
            raise ValueError(
                "generate.min_replicas (0) is for cluster.placement: elastic, where the loop brings replicas back "
                "before it draws; give at least 1, or that"
            )
        return self

    @model_validator(mode="after")
    def _aligned_steps_are_as_many_as_there_are(self) -> "RunConfig":
        for section, settings in (("generate", self.generate), ("evaluate.generate", self.held_out)):
            if settings.timesteps and settings.steps != ALIGNED_STEPS:
                raise ValueError(
                    f"{section}.timesteps: {settings.timesteps} is a schedule of {ALIGNED_STEPS} steps, and "
                    f"{section}.steps is {settings.steps}: give {ALIGNED_STEPS}, or other timesteps "
                    f"({section}.timesteps={'null' if section == 'generate' else 'own'})"
                )
        return self

    @model_validator(mode="after")
    def _policies_reach_as_far_back_as_checkpoints(self) -> "RunConfig":
        kept = self.keep_policies
        if kept != "all" and kept < self.train.keep_checkpoints:
            raise ValueError(
                f"keep_policies ({kept}) must be at least train.keep_checkpoints ({self.train.keep_checkpoints}), so "
                "that the policy of a checkpoint that the run may have to go on from is there"
            )
        return self

    @model_validator(mode="after")
    def _the_objective_gets_what_it_needs(self) -> "RunConfig":
        needs, kind = self.train.objective.needs, self.train.objective.kind
        if self.replay and (needs.own_rounds or needs.reference == "ema"):
            raise ValueError(
                f"train.objective ({kind}, reference: {needs.reference}) goes by the policies that drew the rounds, "
                "and those of replayed rounds are another run's: use diffusion_kto with reference: fixed or round, or "
                "no replay"
            )
        if not self.offline and needs.pairs and self.generate.images_per_prompt < 2:
            raise ValueError(
                f"train.objective ({kind}) learns from pairs of images of one prompt: generate.images_per_prompt "
                f"({self.generate.images_per_prompt}) must be at least 2, better 4 or more"
            )
        if not self.offline and needs.pairs == "scores" and not self.label.voting:
            raise ValueError(
                "train.objective.pairs: scores makes pairs of what scorers say, and label.scorers names none that is "
                "not held_out: name one, or use pairs: verdicts"
            )
        return self

    @model_validator(mode="after")
    def _labelled_images_are_nobodys(self) -> "RunConfig":
        if self.data is None:
            return self
        needs, kind = self.train.objective.needs, self.train.objective.kind
        if needs.own_rounds or (self.offline and needs.reference in ("round", "ema")):
            raise ValueError(
                f"train.objective ({kind}, reference: {needs.reference}) goes by the policies that drew the images, "
                "and those of `data` were drawn by none of this run's: use diffusion_kto or dpo with reference: fixed, "
                "sft or csft"
            )
        if needs.pairs == "scores":
            raise ValueError("train.objective.pairs: scores, but images of `data` have verdicts: use pairs: verdicts")
        if self.train.own_noise:
            raise ValueError(
                f"train.own_noise ({self.train.own_noise:g}): the noise that images of `data` were drawn from is not "
                "known; give 0"
            )
        if self.data.score != "none" and not self.label.voting:
            raise ValueError(
                f"data.score ({self.data.score}): images are judged by label.scorers, which names none that is not "
                "held_out; name one"
            )
        if both := sorted(self.data.filters.keys() & self.label.scorers.keys()):
            raise ValueError(f"data.filters and label.scorers both have {both[0]!r}: give one of them another name")
        if self.replay and self.offline:
            raise ValueError("replay and data: give one of them; a run is a source of `data`, too (kind: run)")
        return self

    @model_validator(mode="after")
    def _labelled_images_can_be_mixed_in(self) -> "RunConfig":
        if self.data is None or self.data.mix is None:
            return self
        if not 0 < self.mixed_places < self.train.global_batch:
            raise ValueError(
                f"data.mix.share ({self.data.mix.share:g}) of train.global_batch ({self.train.global_batch}) is "
                f"{self.mixed_places} samples of a step: give a share that leaves some of either kind"
            )
        if self.data.prepare.resize != "crop":
            raise ValueError(
                "data.prepare.resize: buckets, but images that are mixed in have the size of those that are drawn: "
                "give crop"
            )
        if self.data.held_out_share:
            raise ValueError(
                "data.held_out_share is for runs on labelled images alone: give 0; images of prompts.held_out are not "
                "trained on in any case"
            )
        return self

    @model_validator(mode="after")
    def _pages_share_an_address(self) -> "RunConfig":
        people, watch = None if self.offline else self.label.people, self.watch
        if people and watch.port and (watch.host, watch.port) != (people.host, people.port):
            raise ValueError(
                f"watch.host and watch.port ({watch.host}:{watch.port}) must be label.human.host and label.human.port "
                f"({people.host}:{people.port}): Ray Serve listens on one address, on which each page has its own path"
            )
        return self

    @property
    def listens(self) -> Address | None:
        """Where the run's pages are to be found; None: it has none."""
        if not self.offline and (people := self.label.people):
            return Address("label.human", people.host, people.port)
        return Address("watch", self.watch.host, self.watch.port) if self.watch.port else None

    @property
    def offline(self) -> bool:
        """Whether all images that are trained on are there already."""
        return self.data is not None and self.data.mix is None

    @property
    def mixed_places(self) -> int:
        """Samples of an optimizer step that are labelled images of `data.mix`; of pairs, both are."""
        if self.data is None or self.data.mix is None:
            return 0
        together = 2 if self.train.objective.needs.pairs else 1
        return together * round(self.data.mix.share * self.train.global_batch / together)

    def drawn(self, stage: str) -> Generate:
        """How the images of a stage are drawn."""
        return self.evaluate.generate.over(self.generate) if stage in HELD_OUT_STAGES else self.generate

    @property
    def held_out(self) -> Generate:
        """How held-out images are drawn."""
        return self.drawn(HELD_OUT_STAGES[0])

    @property
    def held_out_otherwise(self) -> dict[str, Any]:
        """What shapes held-out images and not those of rounds, as JSON has it."""
        rounds, held_out = (settings.model_dump(mode="json") for settings in (self.generate, self.held_out))
        return {name: held_out[name] for name in (*DRAWING, *LATER) if held_out[name] != rounds[name]}

    @property
    def rounds_ahead(self) -> int:
        """By how many rounds generation runs ahead of training; more than one would only make samples older."""
        return min(1, self.max_policy_lag)

    @property
    def optimizer_steps_per_round(self) -> int:
        """If every image gets a verdict; fewer verdicts, fewer steps. Of a stream, those of an interval."""
        if self.data is not None and self.offline:
            return self.data.stream.steps
        return steps_for(self.generate.images_per_round, self.train)


SHORT_FORMS: dict[str, Callable[[Any], Any]] = {
    "model": as_model,
    "prompts.train": as_prompt_set,
    "prompts.held_out": as_prompt_set,
    "data": as_data,
    "label.scorers": as_scorers,
    "label.scorers.*.threshold": as_threshold,
    "label.threshold": as_threshold,
    "label.combine": as_combination,
    "label.human.route": as_route,
    "train.objective": as_objective,
    "train.sampling_policy": as_sampling_policy,
    "label.watch": as_watch,
    "train.watch": as_watch,
}
"""Fields whose value may be shorter than the mapping it stands for; an override reaches into the mapping."""
