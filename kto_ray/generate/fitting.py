"""How many images a replica's card has room for: `replica.py` asks before its first request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kto_ray.errors import UserError

FULL = 0.9
"""Share of a card: with more of it reserved, other prompts and other policies could be too much."""


def largest_batch(draw: Callable[[int], float], most: int) -> int:
    """The largest power of two that fits, at most `most`.

    Args:
        draw: draws so many images, and gives the share of the card that this has reserved.

    Raises:
        UserError: not even one image fits.
    """
    fitting = 0
    for size in (2**doubled for doubled in range(most.bit_length())):
        try:
            reserved = draw(size)
        except torch.OutOfMemoryError:
            break
        if reserved > FULL:
            fitting = fitting or size  # one image was drawn, after all
            break
        fitting = size
    if not fitting:
        raise UserError(
            "generate.batch_size: a replica's card has no room to draw a single image; give generate.offload=model or "
            "=group, generate.dtype=bfloat16, smaller images, or a larger card"
        )
    return fitting


def share_reserved(device: torch.device, num_gpus: float) -> float:
    """Of the part of a card that a replica has, the most that this process has reserved since `emptied`."""
    card = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_reserved(device) / (card * min(1, num_gpus or 1))


@contextmanager
def emptied(device: torch.device) -> Iterator[None]:
    """What earlier drawings left reserved is given back before, and what this one leaves is after it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        torch.cuda.empty_cache()
