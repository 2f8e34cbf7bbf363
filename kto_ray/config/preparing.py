"""How labelled images become what is trained on, and how training reads it: `data.prepare` and `data.stream`.

`kto_ray/offline/` goes by the first, `train/streaming.py` by the second.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kto_ray.config.machines import Device, Dtype, Resources
from kto_ray.identity import Fixed, Free, Noted
from kto_ray.section import Count, Section

Shade = Annotated[int, Field(ge=0, le=255)]


class Prepare(Section):
    """Decoding and encoding images. Their size is that of the images that are drawn, `generate.height` and `.width`."""

    folder: Free[str | None] = None
    """Where encoded images are kept, for all runs that use them: a local path or a URI; None: `_prepared` in
    `runs_folder`. An image is encoded once for every autoencoder and size."""
    resize: Fixed[Literal["crop", "buckets"]] = "crop"
    """What happens to images of another aspect: what stands over is cut off; or they go to the nearest of some sizes of
    the same area, and an optimizer step is of one size."""
    background: Fixed[tuple[Shade, Shade, Shade]] = (255, 255, 255)
    """What is seen behind transparent pixels: red, green, blue."""
    posterior: Fixed[Literal["mean", "sample"]] = "mean"
    """Latents are the mean that the autoencoder gives, or drawn from its posterior once, by a seed that follows from
    the image."""
    batch_size: Noted[Count] = 16
    """Images an encoder takes at once."""
    device: Noted[Device] = "auto"
    """On what an encoder computes; auto: its GPU where `resources` give it one, else the CPU."""
    dtype: Fixed[Dtype] = "float32"
    """Precision of the encoder; latents are kept in float32."""
    min_encoders: Free[Count] = 1
    """So many encoders are there from the beginning."""
    max_encoders: Free[Count] = 1
    """Ray Data scales between the two."""
    resources: Resources = Resources()
    """What an encoder asks of the cluster."""

    @model_validator(mode="after")
    def _encoders_are_a_range(self) -> "Prepare":
        if self.max_encoders < self.min_encoders:
            raise ValueError(f"max_encoders ({self.max_encoders}) must be at least min_encoders ({self.min_encoders})")
        return self


class StreamSettings(Section):
    """How a prepared set is read while it is trained on."""

    steps: Fixed[Count] = 100
    """Optimizer steps between two checkpoints; `rounds` counts these intervals, `train.epochs` is not asked."""
    shuffle: Fixed[Count] = 4096
    """About how many images are shuffled among one another. Shards come in an order drawn anew for every pass; images
    of as many shards as hold so many, of one class and size, are mixed."""
