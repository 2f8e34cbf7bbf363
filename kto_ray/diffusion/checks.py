"""Whether a model can draw and be trained as the run asks: sizes, scheduler, steps, guidance, adapters, texts.

`preflight.py` asks here. Reads a folder that `source.check` has passed; loads no weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from kto_ray.config import Adapter, Generate, Model, RunConfig
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.family import Family, config_of, index_of
from kto_ray.diffusion.geometry import image_size
from kto_ray.diffusion.schedulers import fitting_schedulers, scheduler_for, takes_timesteps
from kto_ray.diffusion.sizes import layers_of
from kto_ray.errors import UserError


def check(config: RunConfig, folder: Path) -> None:
    """Raises UserError: a size, a scheduler, a number of steps or a guidance with which nothing can be drawn, or
    adapters that the model does not take."""
    model, train = config.model, config.train
    family = family_of(folder, model)
    image_size(config.generate, family.geometry_of(folder))
    family.process.from_folder(folder)
    own = _component(folder, "scheduler", diffusers)
    _check_drawing("generate", config.generate, family, folder, own)
    if config.held_out != config.generate:
        _check_drawing("evaluate.generate", config.held_out, family, folder, own)
    if train.adapter.kind == "lora" and not family.takes_adapters:
        raise UserError(
            f"train.adapter.kind: {family.__name__} takes no adapters in diffusers; give full, which trains every "
            "weight"
        )
    if train.adapter.kind == "lora" and not adapted(folder, model, train.adapter):
        layers = layers_of(folder, family.part)
        named = sorted({name.rpartition(".")[2] for name in layers} - {str(number) for number in range(100)})
        raise UserError(
            f"train.adapter.target_modules: {list(train.adapter.target_modules or ())} names no layer of the "
            f"{family.part}; its layers' names end in, for instance: {', '.join(named[:12])}; null takes the family's"
        )


def adapted(folder: Path, model: Model, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The layers of the denoiser that adapters are put on, and the shapes of their weights."""
    targets = adapter.target_modules or defaults(folder, model)["train.adapter.target_modules"]
    ends = tuple(f".{target}" for target in targets)
    layers = layers_of(folder, family_of(folder, model).part)
    return {name: shape for name, shape in layers.items() if f".{name}".endswith(ends)}


def defaults(folder: Path, model: Model) -> dict[str, Any]:
    """What a field stands for that says nothing, by its dotted name: the pipeline's scheduler, the family's targets."""
    family = family_of(folder, model)
    return {
        "generate.scheduler": index_of(folder)["scheduler"][1],
        "train.adapter.target_modules": family.target_modules(config_of(folder, family.part)),
    }


def _check_drawing(section: str, settings: Generate, family: type[Family], folder: Path, own: Any) -> None:
    """Raises UserError: nothing can be drawn with the settings.

    Args:
        section: of the configuration, that they come from.
        own: the pipeline's scheduler.
    """
    if settings.guidance_scale != 1 and not family.takes_guidance(folder):
        raise UserError(
            f"{section}.guidance_scale: {settings.guidance_scale:g}, but {folder} takes no guidance (it was distilled "
            "to draw without); give 1"
        )
    if settings.timesteps and family.aligned is None:
        raise UserError(
            f"{section}.timesteps: {settings.timesteps} was found for Stable Diffusion 1, 2 and XL, and {folder} is a "
            f"{family.__name__}; give null"
        )
    _check_steps(section, settings, family, own)


def _check_steps(section: str, settings: Generate, family: type[Family], own: Any) -> None:
    """Take a scheduler through all of its steps on one pixel."""
    trained, name = own.config.num_train_timesteps, settings.scheduler or type(own).__name__
    if settings.steps > trained:
        raise UserError(f"{section}.steps: {settings.steps} is more than the {trained} that the model was trained with")
    scheduler = scheduler_for(own, settings.scheduler, settings.scheduler_args, section)
    if settings.timesteps and not takes_timesteps(type(scheduler)):
        taking = sorted(name for name, kind in fitting_schedulers(own).items() if takes_timesteps(kind))
        raise UserError(
            f"{section}.timesteps: {name} cannot be told its timesteps; give a {section}.scheduler that can: "
            f"{', '.join(taking)}"
        )
    spaced: dict[str, Any] = {"num_inference_steps": settings.steps}
    if settings.timesteps:
        spaced = {"timesteps": family.aligned_timesteps()}
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        scheduler.set_timesteps(**spaced, **shift)
        pixel = torch.ones(1, 1, 1, 1) * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda pixel, timestep: pixel)
        with torch.random.fork_rng(devices=[]):
            for timestep in scheduler.timesteps:
                pixel = scheduler.step(0.5 * scaled(pixel, timestep), timestep, pixel).prev_sample
    except Exception as error:  # whatever a scheduler may raise for what it cannot do
        raise UserError(
            f"{section}.steps: {name} cannot draw in {settings.steps} steps ({type(error).__name__}: "
            f"{error}); take another number of steps, another {section}.scheduler or other {section}.scheduler_args"
        ) from error
    if not pixel.isfinite().all():
        raise UserError(
            f"{section}.steps: {name} draws nothing finite in {settings.steps} steps; take another number "
            f"of steps, or another {section}.scheduler"
        )


@dataclass(frozen=True)
class Read:
    """What of a text reaches the model."""

    tokens: tuple[int, ...]
    lost: str = ""
    """What does not, as the tokenizer writes it."""

    @property
    def cut(self) -> bool:
        return bool(self.lost)


def read_by(folder: Path, model: Model, texts: Sequence[str]) -> tuple[list[Read], int]:
    """What the model's tokenizer makes of each text, and the number of tokens after which it cuts."""
    import transformers

    reads: Mapping[str, int | None] = family_of(folder, model).reads
    index = index_of(folder)
    name = next(name for name in reads if index.get(name, [None, None])[1] is not None)
    reader = _component(folder, name, transformers)
    tokenizer = getattr(reader, "tokenizer", reader)  # of a processor, which reads images, too
    limit = int(reads[name] or tokenizer.model_max_length)

    def read(tokens: Sequence[int]) -> Read:
        ends = bool(tokens) and tokens[-1] == tokenizer.eos_token_id
        if len(tokens) <= limit:
            return Read(tuple(tokens))
        kept, lost = (tokens[: limit - 1], tokens[limit - 1 : -1]) if ends else (tokens[:limit], tokens[limit:])
        words = tokenizer.decode(lost).strip() or f"{len(lost)} tokens"
        return Read((*kept, tokens[-1]) if ends else tuple(kept), words)

    return [read(tokens) for tokens in tokenizer(text=list(texts), verbose=False).input_ids], limit


def _component(folder: Path, name: str, library: Any) -> Any:
    """A component without weights, of the class that the folder names."""
    return getattr(library, index_of(folder)[name][1]).from_pretrained(folder, subfolder=name)
