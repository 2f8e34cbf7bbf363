"""The tasks of the bake-off: the embedded world, made hard in seven ways.

A task is a recipe: who judges, and by what bar. What a method may not choose is in it: images, rounds, optimizer steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMMON: dict[str, Any] = {
    "run": "bake_off",
    "model": "shapes",
    "rounds": 6,
    "generate": {
        "images_per_round": 432,
        "guidance_scale": 1.1,
        "steps": 8,
        "scheduler": "DDIMScheduler",
        "batch_size": 72,
    },
    "train": {
        "epochs": 5,
        "global_batch": 72,
        "micro_batch": 72,
        "prompt_dropout": 0.1,
        "decay": "cosine",
        "adapter": {"kind": "lora", "rank": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
    },
    "evaluate": {"images_per_prompt": 5},
}
"""Images, optimizer steps (30 a round), adapter and sampler of `shapes_demo`: the same for every method."""


@dataclass(frozen=True)
class Task:
    """What is asked of a method.

    Args:
        tree: laid over `COMMON`.
        flipped: share of the verdicts given the wrong way round.
        watched: the scorer that never votes, of which is reported what was lost.
    """

    name: str
    title: str
    label: Mapping[str, Any]
    flipped: float = 0.0
    watched: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


HELD_OUT = {"held_out": True}
MEDIAN = {"kind": "round_quantile", "quantile": 0.5}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("follow", "Follow the prompt", {"scorers": {"shapes": {}}, "threshold": 0.5}, more={"rounds": 12}),
        Task("rare", "Rare success: 6 % desirable at the start", {"scorers": {"shapes": {}}, "threshold": 0.99}),
        Task(
            *("easy", "Nearly all desirable: 89 % at the start"),
            {"scorers": {"shapes": {"args": {"aspects": ["background"]}}}, "threshold": 0.5},
        ),
        Task("noisy", "A fifth of the verdicts flipped", {"scorers": {"shapes": {}}, "threshold": 0.5}, flipped=0.2),
        Task(
            *("few", "Few labels: 60 images a round", {"scorers": {"shapes": {}}, "threshold": 0.5}),
            more={
                "rounds": 10,
                "generate": {"images_per_round": 60, "batch_size": 60},
                "train": {"global_batch": 30, "micro_batch": 30},
            },
        ),
        Task(
            *("red", "Likes red", {"scorers": {"redness": {}, "shapes": HELD_OUT}, "threshold": MEDIAN}),
            watched="shapes",
        ),
        Task(
            *("small", "Compressible", {"scorers": {"jpeg_size": {}, "shapes": HELD_OUT}, "threshold": MEDIAN}),
            watched="shapes",
        ),
    )
}
