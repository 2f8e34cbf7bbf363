"""What the configuration says of sampling: `generate`. `generate/` and `diffusion/sampling.py` go by it."""

from typing import Annotated

from pydantic import Field, model_validator

from kto_ray.config.machines import Device, Dtype, Resources
from kto_ray.identity import ByContent, Fixed, Free, Noted
from kto_ray.section import Count, Section


class Generate(Section):
    """How images are sampled, and by how many Serve replicas."""

    images_per_round: Fixed[Count] = 512
    images_per_prompt: Fixed[Count] = 1
    """Images of one prompt in a round."""
    guidance_scale: Fixed[Annotated[float, Field(ge=1)]] = 7.5
    """Classifier-free guidance; 1 is none."""
    steps: Fixed[Count] = 50
    scheduler: ByContent[str | None] = None
    """A diffusers scheduler that can sample the model, by class name; None: the pipeline's own."""
    batch_size: Noted[Count] = 8
    """Images of one request."""
    height: Fixed[Count | None] = None
    width: Fixed[Count | None] = None
    """Pixels; None: what the model was trained on."""
    device: Noted[Device] = "auto"
    dtype: Fixed[Dtype] = "float32"
    compile: Noted[bool] = False
    """torch.compile the denoiser of every replica."""
    min_replicas: Free[Count] = 1
    max_replicas: Free[Count] = 1
    """Serve autoscales between the two."""
    max_ongoing_requests: Free[Count] = 3
    """Requests a replica holds at a time: one is drawn, others are stored, or wait."""
    max_queued_requests: Free[int] = 64
    """Requests that wait beyond those before the caller is told to back off; -1: no limit."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> "Generate":
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        return self
