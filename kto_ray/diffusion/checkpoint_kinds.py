"""What a single checkpoint is of, found from the names and shapes in its header alone. `single_file.py` asks here.

The names are those of the models' own authors, which trainers and model sites keep to. A new kind is a row of `KINDS`,
if diffusers' `from_single_file` of its pipeline reads it.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kto_ray.diffusion.weights import Header, read_header
from kto_ray.errors import UserError

DTYPES = {
    "F64": "float32",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "bfloat16",
    "F8_E5M2": "bfloat16",
}
"""Of the folder, by those of the file. Weights of 8 bits are widened: they could not be trained."""

QUANTIZED = ("scale_weight", "weight_scale", "scaled_fp8", ".absmax", ".quant_state")
"""How names end of what quantized weights are scaled by."""
PREFIX = "model.diffusion_model."
VAE = {"first_stage_model.": ("decoder.conv_in.weight",), "vae.": ("decoder.conv_in.weight",)}
CLIP = "transformer.text_model.embeddings.position_embedding.weight"

Layout = Mapping[str, tuple[str, ...]]
"""Where a component lies in a checkpoint: what its tensors' names begin with, and of which names after that one must be
there, so that diffusers knows the layout."""


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint that can be read."""

    pipeline: str
    denoiser: str
    """The component's name."""
    prefixes: tuple[str, ...]
    """What may stand before the names of its tensors."""
    known_by: str
    """A tensor that the denoisers of no kind further down have."""
    reads: str
    """The layer that takes the latents."""
    channels: int
    """That it takes; models for editing images take more."""
    parts: Mapping[str, Layout]
    repositories: frozenset[str]
    """What diffusers calls those whose configs are on the hub."""


KINDS = (
    Kind(
        "StableDiffusionXLPipeline",
        denoiser="unet",
        prefixes=(PREFIX,),
        known_by="label_emb.0.0.weight",
        reads="input_blocks.0.0.weight",
        channels=4,
        parts={
            "text_encoder": {"conditioner.embedders.0.": (CLIP,)},
            "text_encoder_2": {"conditioner.embedders.1.": ("model.positional_embedding",)},
            "vae": VAE,
        },
        repositories=frozenset({"xl_base"}),
    ),
    Kind(
        "StableDiffusionPipeline",
        denoiser="unet",
        prefixes=(PREFIX,),
        known_by="input_blocks.0.0.weight",
        reads="input_blocks.0.0.weight",
        channels=4,
        parts={"text_encoder": {"cond_stage_model.": (CLIP, "model.token_embedding.weight")}, "vae": VAE},
        repositories=frozenset({"v1"}),  # a v2 does not say what it predicts
    ),
    Kind(
        "StableDiffusion3Pipeline",
        denoiser="transformer",
        prefixes=(PREFIX, ""),
        known_by="joint_blocks.0.context_block.adaLN_modulation.1.bias",
        reads="x_embedder.proj.weight",
        channels=16,
        parts={
            "text_encoder": {"text_encoders.clip_l.": (CLIP,)},
            "text_encoder_2": {"text_encoders.clip_g.": (CLIP,)},
            "text_encoder_3": {"text_encoders.t5xxl.": ("transformer.shared.weight",)},
            "vae": VAE,
        },
        repositories=frozenset({"sd3", "sd35_medium", "sd35_large"}),
    ),
    Kind(
        "FluxPipeline",
        denoiser="transformer",
        prefixes=(PREFIX, ""),
        known_by="vector_in.in_layer.weight",
        reads="img_in.weight",
        channels=64,
        parts={
            "text_encoder": {"text_encoders.clip_l.": (CLIP,)},
            "text_encoder_2": {"text_encoders.t5xxl.": ("transformer.shared.weight",)},
            "vae": VAE,
        },
        repositories=frozenset({"flux-dev", "flux-schnell"}),
    ),
)
OTHERS = {
    "edm_mean": "a Playground model, whose noise is scheduled otherwise",
    "edm_vpred.sigma_max": "a CosXL model, whose noise is scheduled otherwise",
    "conditioner.embedders.0.model.text_projection": "a refiner of Stable Diffusion XL, which goes on from images",
    "control_model.time_embed.0.weight": "a ControlNet, not a model of its own",
}
"""Of what looks like one of the kinds and is not."""
SCHEDULED: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
"""Tensors by which a file of Stable Diffusion XL says how it was trained, and what a scheduler calls that."""
ADVICE = "give the file of a whole model, or a diffusers folder"


@dataclass(frozen=True)
class Checkpoint:
    """A file that can be read, by its header."""

    file: Path
    kind: Kind
    dtypes: Mapping[str, str]
    """Of the components that it has."""
    repository: str | None
    """On the hub, with the configs of its kind."""
    scheduled: Mapping[str, Any]
    """What its scheduler's configuration must have."""


def read_checkpoint(file: Path) -> Checkpoint:
    """Raises UserError: it is truncated, or not a whole model of a kind that can be read."""
    header = read_header(file, "model.name", "copy or download it again")
    kind, prefix = _kind_of(file, header)
    layouts = {kind.denoiser: {prefix: (kind.known_by,)}, **kind.parts}
    dtypes = {name: _dtype_of(file, header, name, layout) for name, layout in layouts.items()}
    return Checkpoint(
        file,
        kind,
        {name: dtype for name, dtype in dtypes.items() if dtype is not None},
        _repository(kind, header),
        {field: value for mark, (field, value) in SCHEDULED.items() if mark in header},
    )


def _kind_of(file: Path, header: Mapping[str, Header]) -> tuple[Kind, str]:
    """The kind, and what stands before the names of its denoiser's tensors."""
    if what := next((what for name, what in OTHERS.items() if name in header), None):
        raise UserError(f"model.name: {file} is {what}, which is not supported; {ADVICE}")
    for kind in KINDS:
        for prefix in kind.prefixes:
            if prefix + kind.known_by not in header or prefix + kind.reads not in header:
                continue
            channels = header[prefix + kind.reads].shape[1]
            if channels != kind.channels:
                raise UserError(
                    f"model.name: {file} takes {channels} channels, not the {kind.channels} of a {kind.pipeline}: it "
                    "is a model for inpainting or editing, which is not supported; give one that draws from text"
                )
            return kind, prefix
    raise UserError(f"model.name: {file} is {_in_words(header)}; {ADVICE}")


def _in_words(header: Mapping[str, Header]) -> str:
    if any(mark in name for name in header for mark in ("lora_", ".lora.", "lokr_", "hada_")):
        return (
            "an adapter (LoRA), not a model; for one to start from give the model it is for, and this as model.adapters"
        )
    if all(name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for name in header):
        return "an autoencoder (VAE) alone, not a model"
    return (
        f"not a checkpoint of {', '.join(kind.pipeline.removesuffix('Pipeline') for kind in KINDS)} (it has "
        f"{', '.join(sorted(header)[:3])}, ...), and no other kind is supported as a single file"
    )


def _dtype_of(file: Path, header: Mapping[str, Header], component: str, layout: Layout) -> str | None:
    """In which precision a component is to be kept; None: the file does not have it."""
    for prefix, marks in layout.items():
        tensors = {name: tensor for name, tensor in header.items() if name.startswith(prefix)}
        if not tensors:
            continue
        if not any(prefix + mark in tensors for mark in marks):
            raise UserError(
                f"model.name: {file} has a {component} in a layout that diffusers does not read (no "
                f"{prefix}{marks[0]}); {ADVICE}"
            )
        quantized = [name for name in tensors if name.endswith(QUANTIZED)]
        sizes: Counter[str] = Counter()
        for tensor in tensors.values():
            sizes[tensor.dtype] += math.prod(tensor.shape)
        dtype = sizes.most_common(1)[0][0]
        if quantized or dtype not in DTYPES:
            raise UserError(
                f"model.name: {file} is quantized ({quantized[0] if quantized else dtype} in its {component}), which "
                "cannot be trained; give the file with weights of 16 or 32 bits"
            )
        return DTYPES[dtype]
    return None


def _repository(kind: Kind, header: Mapping[str, Header]) -> str | None:
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    try:
        name = infer_diffusers_model_type(header)
    except (KeyError, NameError):  # of a size that it does not know
        return None
    paths = DIFFUSERS_DEFAULT_PIPELINE_PATHS[name]
    return str(paths["pretrained_model_name_or_path"]) if name in kind.repositories else None
