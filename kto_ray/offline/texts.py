"""The prompts of a prepared set, encoded once into the run's cache of texts, before anything is trained.

Train workers find them there (`diffusion/texts.py`), so that none has to hold text encoders beside what it trains.
"""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.diffusion import source
from kto_ray.diffusion.loading import DTYPES, load_family, pick_device
from kto_ray.diffusion.texts import texts_of
from kto_ray.offline.showing import counting, quietly
from kto_ray.storage import Storage

AT_ONCE = 64
"""Prompts of a task."""


class EncodeTexts:
    """An actor with the text encoders: encodes the prompts of a row, JSON in "prompts"."""

    def __init__(self, config: RunConfig, run: Storage) -> None:
        import torch

        assert config.data is not None
        settings = config.data.prepare
        if settings.resources.threads or not settings.resources.num_gpus:
            torch.set_num_threads(settings.resources.threads or max(1, int(settings.resources.num_cpus)))
        device = pick_device(settings.device, settings.resources.num_gpus)
        folder, dtype = source.resolve(config.model), DTYPES[config.generate.dtype]
        family = load_family(folder, config.model, device, dtype, parts="encoders")
        self.texts = texts_of(config, run, source.component_digests(folder, config.model), lambda: family)
        self.texts.nothing()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompts = json.loads(row["prompts"])
        self.texts.encode(prompts)
        return {"prompts": len(prompts)}


def encode_texts(config: RunConfig, run: Storage, prompts: Sequence[str], console: Console) -> None:
    """Encode what nobody has encoded yet, with the prefixes that the objective puts before prompts."""
    import ray.data
    from ray.data import ActorPoolStrategy

    assert config.data is not None
    settings, prefixes = config.data.prepare, config.train.objective.needs.prefixes or ("",)
    folder = source.resolve(config.model)
    known = texts_of(config, run, source.component_digests(folder, config.model), _nobody)
    missing = known.missing([prefix + prompt for prompt in prompts for prefix in prefixes])
    if not missing:
        return
    items = [{"prompts": json.dumps(missing[start : start + AT_ONCE])} for start in range(0, len(missing), AT_ONCE)]
    dataset = quietly(ray.data.from_items(items)).map(
        EncodeTexts,
        fn_constructor_args=(config, run),
        compute=ActorPoolStrategy(min_size=1, max_size=settings.max_encoders),
        num_cpus=settings.resources.num_cpus,
        num_gpus=settings.resources.num_gpus or None,
    )
    with counting(console, "encode prompts", len(missing), "prompts") as advance:
        for row in dataset.iter_rows():
            advance(row["prompts"])


def _nobody() -> Any:
    raise AssertionError("nothing is encoded here")
