"""Stable Diffusion in miniature: whole pipeline folders in the true layout, randomly initialised, a few hundred kB.

`write_pipeline` is what unit tests (through the fixtures of `conftest.py`) and integration tests use in place of a
downloaded model. The images of these models are noise; how they are loaded, trained and sampled is the real thing.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "red", "green", "blue", "circle", "square", "on", "black", "white")
TOKENS = 8  # start + six words + end
PIXELS = 16  # the autoencoder has 2 levels: latents are 4 x 8 x 8

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# As in the scheduler_config.json of the real models, including what the scheduler class does not know, and lacking
# `prediction_type` where the model is older than the field.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd1": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SCHEDULE},
    "sd2": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        **SCHEDULE,
        "prediction_type": "v_prediction",
    },
}


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `WORDS` is one token, and anything else falls into letters."""
    vocabulary = {chr(letter): letter - ord("a") for letter in range(ord("a"), ord("z") + 1)}
    vocabulary |= {f"{letter}</w>": 26 + index for letter, index in vocabulary.items()}
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merged = pieces[0] + pieces[1]
            if (pair := (pieces[0], pieces[1])) not in merges:
                merges.append(pair)
            vocabulary.setdefault(merged, len(vocabulary))
            pieces[:2] = [merged]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def write_pipeline(folder: Path, version: Literal["sd1", "sd2"] = "sd1", seed: int = 0) -> Path:
    """Write a pipeline folder; equal arguments give equal bytes, another seed another model.

    Args:
        version: "sd1" is laid out like Stable Diffusion 1.5 (epsilon, PNDM, a safety checker that is named in
            model_index.json), "sd2" like 2.1 (v prediction, DDIM, linear projections, heads a level).
    """
    width = {"sd1": 16, "sd2": 24}[version]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            sample_size=PIXELS,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                hidden_act={"sd1": "quick_gelu", "sd2": "gelu"}[version],
                initializer_factor=20.0,  # untrained embeddings are nearly equal for all texts otherwise
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=PIXELS // 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
            cross_attention_dim=width,
            attention_head_dim={"sd1": 4, "sd2": [2, 4]}[version],
            use_linear_projection=version == "sd2",
            norm_num_groups=4,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler={"sd1": PNDMScheduler, "sd2": DDIMScheduler}[version].from_config(SCHEDULERS[version]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[version], indent=2))
    if version == "sd1":
        index = json.loads((folder / "model_index.json").read_text())
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
