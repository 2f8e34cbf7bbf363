"""The one table of model families. `family.py` says what a family is, `loading.py` loads one.

A new one is a file beside this one and a row; or, outside the package, `model.family: my_module:MyFamily`. No family is
imported but the one that is asked for.
"""

from pathlib import Path

from kto_ray.config import Model
from kto_ray.diffusion.family import Family, index_of
from kto_ray.errors import UserError
from kto_ray.plugins import load_plugin

HERE = "kto_ray.diffusion.families"

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": f"{HERE}.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": f"{HERE}.stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": f"{HERE}.stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": f"{HERE}.flux:Flux",
    "Flux2Pipeline": f"{HERE}.flux2:Flux2",
    "Flux2KleinPipeline": f"{HERE}.flux2:Flux2Klein",
    "QwenImagePipeline": f"{HERE}.qwen_image:QwenImage",
    "ZImagePipeline": f"{HERE}.z_image:ZImage",
    "SanaPipeline": f"{HERE}.sana:Sana",
    "Lumina2Pipeline": f"{HERE}.lumina2:Lumina2",
    "AuraFlowPipeline": f"{HERE}.aura_flow:AuraFlow",
    "PixArtSigmaPipeline": f"{HERE}.pixart_sigma:PixArtSigma",
}
"""By the pipeline class that a folder's model_index.json names."""


def family_of(folder: Path, model: Model) -> type[Family]:
    """The family of a folder that has a model_index.json. Raises UserError: there is none for its pipeline class."""
    name = str(index_of(folder).get("_class_name"))
    if model.family is None and name not in FAMILIES:
        raise UserError(
            f"model.name: {folder} holds a {name}, which is not supported; supported: {', '.join(FAMILIES)}. "
            "docs/families.md shows how to add a family, for model.family"
        )
    family: type[Family] = load_plugin("model.family", model.family or FAMILIES[name], {})
    return family
