"""Tiny checkpoints in one file, with the names of the models' own authors: the inverse of what diffusers reads.

`write_source` writes a tiny pipeline folder, `write_single_file` the same weights in one file. Names and layouts follow
the files that model sites offer: CompVis' for Stable Diffusion 1.5, Stability AI's for XL and 3.5, and Black Forest
Labs' for FLUX, with text encoders and autoencoder as ComfyUI puts them beside the transformer.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import save_file
from torch import Tensor

from kto_ray.config import Model
from kto_ray.diffusion.loading import load_family
from tests.tiny_models import clip, write_model

Weights = dict[str, Tensor]
Renames = Sequence[tuple[str, str]]
UNET = "model.diffusion_model."
QKV = ("q", "k", "v")

RESNET = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
VAE = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
SD3 = (
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
)
FLUX = (
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
    (r"^time_text_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
    (r"^time_text_embed\.guidance_embedder\.linear_2\.", "guidance_in.out_layer."),
    (r"^context_embedder\.", "txt_in."),
    (r"^x_embedder\.", "img_in."),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear\.", r"single_blocks.\1.modulation.lin."),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out\.", r"single_blocks.\1.linear2."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.norm1\.linear\.", ".img_mod.lin."),
    (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
    (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
    (r"\.ff\.net\.2\.", ".img_mlp.2."),
    (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
    (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
)


def renamed(weights: Mapping[str, Tensor], renames: Renames, prefix: str = "") -> Weights:
    found = {}
    for name, tensor in weights.items():
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        found[prefix + name] = tensor
    return found


def joined(weights: Weights, pattern: str, parts: Sequence[str], new: str) -> Weights:
    """Tensors that the authors keep in one.

    Args:
        pattern: of the first one's name, with {} where the part stands.
        new: the name of the one, with the pattern's groups.
    """
    found = dict(weights)
    for name in weights:
        if match := re.fullmatch(pattern.format(parts[0]), name):
            between = name[match.end(1) : match.start(2)]
            names = [match[1] + between.replace(parts[0], part) + match[2] for part in parts]
            found[match.expand(new)] = torch.cat([found.pop(part) for part in names])
    return found


def swapped(weights: Weights, pattern: str) -> Weights:
    """Shift and scale stand the other way round in the authors' last layers."""
    return {
        name: torch.cat(tensor.chunk(2)[::-1]) if re.fullmatch(pattern, name) else tensor
        for name, tensor in weights.items()
    }


def unet_weights(unet: Any) -> Weights:
    """CompVis' names."""
    layers = unet.config.layers_per_block + 1
    found = {}
    for name, tensor in unet.state_dict().items():
        block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        if block is None:
            found[name] = tensor
            continue
        direction, index, kind, layer, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
        place = index * layers + (layers - 1 if kind.endswith("samplers") else layer) + (direction == "down")
        attends = "CrossAttn" in unet.config[f"{direction}_block_types"][index]
        part = {
            "resnets": f"0.{rest}",
            "attentions": f"1.{rest}",
            "downsamplers": rest.replace("conv.", "0.op."),
            "upsamplers": f"{2 if attends else 1}.{rest}",
        }[kind]
        blocks = {"down": "input_blocks", "up": "output_blocks"}[direction]
        found[f"{blocks}.{place}.{part}"] = tensor
    others = (
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^time_embedding\.linear_1\.", "time_embed.0."),
        (r"^time_embedding\.linear_2\.", "time_embed.2."),
        (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
        (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    )
    plain = renamed(found, others)
    resnets = re.compile(r"(input_blocks|output_blocks)\.\d+\.0\..*|middle_block\.[02]\..*")
    return {
        name: tensor
        for old, tensor in plain.items()
        for name in (renamed({old: tensor}, RESNET, UNET) if resnets.fullmatch(old) else {UNET + old: tensor})
    }


def vae_weights(vae: Any, prefix: str) -> Weights:
    """CompVis' names; its attention is made of convolutions."""
    last = len(vae.config.block_out_channels) - 1

    def up(match: re.Match[str]) -> str:
        return f".up.{last - int(match[1])}.{'block' if match[2] == 'resnets' else 'upsample'}."

    found = {}
    for name, tensor in renamed(vae.state_dict(), VAE, prefix).items():
        name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.", up, name).replace("upsample.0.", "upsample.")
        found[name] = tensor[..., None, None] if ".mid.attn_1." in name and tensor.dim() == 2 else tensor
    return found


def clip_weights(encoder: Any, prefix: str) -> Weights:
    """transformers' names, as they were before version 5."""
    return {
        f"{prefix}{'' if name.startswith(('text_model.', 'text_projection.')) else 'text_model.'}{name}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def open_clip_weights(encoder: Any, prefix: str) -> Weights:
    found = renamed(clip_weights(encoder, ""), OPEN_CLIP)
    found["text_projection"] = found.pop("text_projection.weight").T
    for kind in ("weight", "bias"):
        pattern = rf"(.*\.)self_attn\.{{}}_proj(\.{kind})"
        found = joined(found, pattern, QKV, rf"\1attn.in_proj_{kind}")
    return {prefix + name: tensor for name, tensor in found.items()}


def sd3_weights(transformer: Any) -> Weights:
    found = renamed(transformer.state_dict(), SD3, UNET)
    for part, attention, block in (
        ("to_{}", "attn", "x_block"),
        ("add_{}_proj", "attn", "context_block"),
        ("to_{}", "attn2", "x_block"),
    ):
        pattern = rf"(.*\.\d+\.){attention}\.{part}(\.\w+)"
        found = joined(found, pattern, QKV, rf"\1{block}.{attention}.qkv\2")
    last = transformer.config.num_layers - 1
    found = swapped(found, rf".*joint_blocks\.{last}\.context_block\.adaLN_modulation\.1\..*")
    return swapped(found, r".*final_layer\.adaLN_modulation\.1\..*")


def flux_weights(transformer: Any, prefix: str) -> Weights:
    found = renamed(transformer.state_dict(), FLUX)
    found = joined(found, r"(double_blocks\.\d+\.)attn\.to_{}(\.\w+)", QKV, r"\1img_attn.qkv\2")
    found = joined(found, r"(double_blocks\.\d+\.)attn\.add_{}_proj(\.\w+)", QKV, r"\1txt_attn.qkv\2")
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    found = joined(found, r"(single_blocks\.\d+\.){}(\.\w+)", parts, r"\1linear1\2")
    return {prefix + name: tensor for name, tensor in swapped(found, r"final_layer\.adaLN.*").items()}


def sd1_file(p: Any) -> Weights:
    found = {**unet_weights(p.unet), **vae_weights(p.vae, "first_stage_model.")}
    found |= clip_weights(p.text_encoder, "cond_stage_model.transformer.")
    positions = torch.arange(p.tokenizer.model_max_length)[None]
    return found | {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": positions,
        "alphas_cumprod": torch.rand(1000),
        "model_ema.decay": torch.tensor(0.9),
    }


def sdxl_file(p: Any) -> Weights:
    found = {**unet_weights(p.unet), **vae_weights(p.vae, "first_stage_model.")}
    found |= clip_weights(p.text_encoder, "conditioner.embedders.0.transformer.")
    return found | open_clip_weights(p.text_encoder_2, "conditioner.embedders.1.model.")


def sd3_file(p: Any) -> Weights:
    found = {**sd3_weights(p.transformer), **vae_weights(p.vae, "first_stage_model.")}
    projection = clip_weights(p.text_encoder, "text_encoders.clip_l.transformer.")
    projection.pop("text_encoders.clip_l.transformer.text_projection.weight")  # the identity, which is left out
    found |= projection | clip_weights(p.text_encoder_2, "text_encoders.clip_g.transformer.")
    return found | t5_weights(p.text_encoder_3)


def flux_file(p: Any) -> Weights:
    found = {**flux_weights(p.transformer, UNET), **vae_weights(p.vae, "vae.")}
    found |= clip_weights(p.text_encoder, "text_encoders.clip_l.transformer.")
    return found | t5_weights(p.text_encoder_2)


def t5_weights(encoder: Any) -> Weights:
    tied = "encoder.embed_tokens.weight"
    return {f"text_encoders.t5xxl.transformer.{k}": v for k, v in encoder.state_dict().items() if k != tied}


FILES: dict[str, Callable[[Any], Weights]] = {
    "sd1": sd1_file,
    "sdxl": sdxl_file,
    "sd3": sd3_file,
    "flux": flux_file,
    "flux_transformer": lambda p: flux_weights(p.transformer, ""),
}
"""By tiny model; "flux_transformer" is the file that Black Forest Labs publishes, without encoders."""


def write_source(folder: Path, name: str, seed: int = 0) -> Path:
    """A tiny pipeline folder whose two CLIP encoders differ in width, by which diffusers tells them apart in a file."""
    write_model(folder, name, seed)
    if name not in ("sdxl", "sd3"):
        return folder
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "sdxl":
            unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": 16 + 24})
            pipeline.register_modules(unet=unet, text_encoder_2=clip(pipeline.tokenizer_2, 16, width=24))
        else:
            pipeline.register_modules(text_encoder_2=clip(pipeline.tokenizer_2, 16, width=8))
            torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)  # as it is in files
    pipeline.save_pretrained(folder)
    return folder


def write_single_file(
    file: Path, folder: Path, name: str, dtype: torch.dtype = torch.float32, without: Sequence[str] = ()
) -> Path:
    """The weights of a folder of `write_source` in one file.

    Args:
        without: beginnings of names that are left out.
    """
    pipeline = load_family(folder, Model(), torch.device("cpu"), torch.float32).pipeline
    weights = {
        key: tensor.contiguous().clone().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for key, tensor in FILES[name](pipeline).items()
        if not key.startswith(tuple(without))
    }
    save_file(weights, file, {"format": "pt"})
    return file


def read_narrow_flux(monkeypatch: pytest.MonkeyPatch, width: int = 32) -> None:
    """diffusers reads FLUX with the one width it has, 3072, written down in the function: make it a tiny model's."""
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    code = inspect.getsource(function).replace("inner_dim = 3072", f"inner_dim = {width}")
    names = dict(vars(single_file_utils))
    exec(code, names)
    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(mapping, "checkpoint_mapping_fn", names[function.__name__])
