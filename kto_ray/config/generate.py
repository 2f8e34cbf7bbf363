"""What the configuration says of sampling: `generate`, and `evaluate.generate`, which is laid over it for held-out
images. `generate/` and `diffusion/sampling.py` go by it; docs/generation.md says what to choose.
"""
# ruff: noqa: RUF012  pydantic copies mutable defaults

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kto_ray.config.machines import Device, Dtype, Resources
from kto_ray.identity import ByContent, Fixed, Free, Noted
from kto_ray.section import Count, Section

Guidance = Annotated[float, Field(ge=1)]
ALIGNED_STEPS = 10
"""Of the schedules that diffusers has of "Align Your Steps"."""
MOST_AT_ONCE = 64
"""Images of a request whose size is to be found."""


DRAWING = ("scheduler", "steps", "guidance_scale", "height", "width", "dtype")
"""Fields of `generate` that shape an image; the others say how many are drawn, and on what."""
LATER = ("scheduler_args", "timesteps")
"""Such fields, too, that a digest covers only where they say something: those of older runs stay what they were."""


class Generate(Section):
    """How images are sampled, and by how many Serve replicas."""

    images_per_round: Fixed[Count] = 512
    """Over all prompts; a multiple of `images_per_prompt`."""
    images_per_prompt: Fixed[Count] = 1
    """Images of one prompt in a round."""
    guidance_scale: Fixed[Guidance] = 7.5
    """Classifier-free guidance; 1 is none."""
    steps: Fixed[Count] = 50
    """Of the scheduler: calls of the denoiser an image, as a rule."""
    scheduler: ByContent[str | None] = None
    """A diffusers scheduler that can sample the model, by class name; None: the pipeline's own."""
    scheduler_args: Fixed[dict[str, Any]] = {}
    """Of the scheduler's own configuration, laid over the folder's: {timestep_spacing: trailing} is what models that
    were distilled to a few steps want."""
    timesteps: Fixed[Literal["align_your_steps"] | None] = None
    """The 10 steps that "Align Your Steps" (arXiv 2404.14507) found best for Stable Diffusion 1 and 2, and for XL;
    None: as the scheduler spaces them."""
    batch_size: Noted[Count] = 8
    """Images of one request. "auto" is short for 64 with `find_batch_size`."""
    find_batch_size: Noted[bool] = False
    """Draw, before the first round, as many images at once as a replica's card has room for: the largest power of two
    that is at most `batch_size` and `images_per_round`."""
    height: Fixed[Count | None] = None
    """Pixels; None: what the model was trained on."""
    width: Fixed[Count | None] = None
    """Pixels; None: what the model was trained on."""
    device: Noted[Device] = "auto"
    """Of replicas; "auto": a GPU where `resources` asks for one."""
    dtype: Fixed[Dtype] = "float32"
    """Precision in which images are drawn."""
    compile: Noted[bool] = False
    """torch.compile the denoiser of every replica, by the blocks that it repeats where it says which, before the first
    request. Wants a C++ compiler on every node."""
    offload: Noted[Literal["none", "model", "group"]] = "none"
    """What of the model waits in main memory until it is needed. model: all but the component that computes; group: of
    that, too, all but the layer that does, and the next (the autoencoder stays). Slower, for cards that have no room;
    was not tried on one yet."""
    min_replicas: Free[Annotated[int, Field(ge=0)]] = 1
    """So many Serve replicas are always there. 0: of a run whose `cluster.placement` is elastic."""
    max_replicas: Free[Count] = 1
    """Serve autoscales between the two; the loop does where `cluster.placement` is elastic."""
    max_ongoing_requests: Free[Count] = 3
    """Requests a replica holds at a time: one is drawn, others are stored, or wait."""
    max_queued_requests: Free[int] = 64
    """Requests that wait beyond those before the caller is told to back off; -1: no limit."""
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _auto_is_short(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("batch_size") == "auto":
            return {**given, "batch_size": MOST_AT_ONCE, "find_batch_size": True}
        return given

    @property
    def on_cpu(self) -> bool:
        """Whether replicas have no card."""
        return self.device == "cpu" or (self.device == "auto" and not self.resources.num_gpus)

    @model_validator(mode="after")
    def _what_needs_a_card_has_one(self) -> "Generate":
        none = f"replicas have none (device: {self.device}, resources.num_gpus: {self.resources.num_gpus:g})"
        if self.on_cpu and self.find_batch_size:
            raise ValueError(
                f"batch_size: auto (find_batch_size: true) is found by filling a card, and {none}; give a number"
            )
        if self.on_cpu and self.offload != "none":
            raise ValueError(f"offload: {self.offload} makes room on a card, and {none}; give none")
        return self

    @model_validator(mode="after")
    def _layers_stay_where_they_are_compiled(self) -> "Generate":
        if self.compile and self.offload == "group":
            raise ValueError(
                "compile: true, but with offload: group every layer moves between its calls, and again where a policy "
                "is loaded, and would be compiled anew; give one of them, or offload: model"
            )
        return self

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> "Generate":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return self


class Otherwise(Section):
    """How held-out images are sampled where it is not as in `generate`, which is what None stands for."""

    guidance_scale: Fixed[Guidance | None] = None
    """Classifier-free guidance; 1 is none."""
    steps: Fixed[Count | None] = None
    """Of the scheduler."""
    scheduler: ByContent[str | None] = None
    """By class name, the pipeline's own, too."""
    scheduler_args: Fixed[dict[str, Any] | None] = None
    """In the place of those of `generate`; {} is none of them."""
    timesteps: Fixed[Literal["align_your_steps", "own"] | None] = None
    """"own": as the scheduler spaces them."""

    def over(self, generate: Generate) -> Generate:
        """`generate`, with this laid over it."""
        said = {name: value for name, value in self if value is not None}
        if self.timesteps == "own":
            said["timesteps"] = None
        return generate.model_copy(update=said)


def shaping(settings: Generate) -> dict[str, Any]:
    """What of the settings shapes an image."""
    shapes = settings.model_dump(mode="json", include={*DRAWING, *LATER})
    return {name: value for name, value in shapes.items() if value or name in DRAWING}
