"""What a replica answers with, and what of it is an image. `making.py` and `evaluate/` ask before they count on it.

A replica's numbers may overflow, above all in float16. Such a sample is stored with its `error`: a counted failure that
nobody is shown, no scorer scores and no training sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kto_ray.config import RunConfig
from kto_ray.errors import UserError
from kto_ray.records import Sample, SampleRecord, Verdict
from kto_ray.stopwatch import Seconds

BY_DRAWING = "drawing"
"""Whose verdicts these are, in the record."""


@dataclass(frozen=True)
class Drawn:
    """A replica's answer to some requests."""

    records: list[SampleRecord]
    """Of the images, which are stored, in the order of the requests."""
    pixels: Any
    """A reference to their pixels, see `Samples`; None when there are none."""
    failed: list[Sample]
    """What is no image, whole: these are stored by whoever asked, if they are to be."""
    seconds: float
    """It computed so long."""
    drawing: str
    """`drawing_digest` of this replica."""
    replica: str = ""
    """Which one it is."""
    spent: Seconds = field(default_factory=dict)
    """On what it has spent its seconds so far."""


def failed_verdicts(failed: Sequence[SampleRecord]) -> list[Verdict]:
    """On samples that are no images."""
    return [Verdict(sample.id, "failed", BY_DRAWING, str(sample.error)) for sample in failed]


def require_drawn(config: RunConfig, what: str, failed: int, images: int) -> None:
    """Raises UserError when more of so many images failed to be drawn than `label.max_failed_fraction` allows."""
    if failed <= config.label.max_failed_fraction * images:
        return
    dtype = config.generate.dtype
    remedy = (
        "float16 overflows; draw in generate.dtype=bfloat16 or =float32 (in a new run), or raise the limit"
        if dtype == "float16"
        else f"they were drawn in {dtype}, so the policy itself may be ruined; an earlier one is taken up again by: "
        f"kto-ray rewind {config.runs_folder}/{config.run} --to VERSION"
    )
    raise UserError(
        f"{what}: {failed} of {images} images have latents or pixels that are not finite, more than "
        f"label.max_failed_fraction ({config.label.max_failed_fraction:g}) allows: {remedy}"
    )
