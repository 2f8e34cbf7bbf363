"""Scorers' checkpoints in miniature: the true files, randomly initialised, a few hundred kB."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.pipelines import TOKENS, build_tokenizer

CLIP_PIXELS = 16  # what the image tower looks at: 2 x 2 patches
CLIP_MEAN, CLIP_STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)  # not the real ones, which are the defaults of transformers
LOGIT_SCALE = 4.6052  # PickScore's, about; bfloat16 would make it 4.59375

_STEPS: dict[str, Any] = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    # As beside OpenAI's CLIP, older than half of the fields, and as beside PickScore.
    "old": {**_STEPS, "crop_size": CLIP_PIXELS, "size": CLIP_PIXELS, "feature_extractor_type": "CLIPFeatureExtractor"},
    "new": {
        **_STEPS,
        "crop_size": {"height": CLIP_PIXELS, "width": CLIP_PIXELS},
        "size": {"shortest_edge": CLIP_PIXELS},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
    },
}


def write_clip(folder: Path, width: int = 16, preprocessor: str = "new", seed: int = 0) -> Path:
    """A `CLIPModel` folder with tokenizer and preprocessor_config.json, as downloaded from the hub.

    Args:
        width: of the vectors.
        preprocessor: a key of `PREPROCESSORS`.
    """
    tokenizer = build_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": CLIP_PIXELS, "patch_size": CLIP_PIXELS // 2},
        projection_dim=width,
        logit_scale_init_value=LOGIT_SCALE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # as initialised, nearly all images and texts are alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[preprocessor]))
    return folder


def write_aesthetic_head(path: Path, seed: int = 0) -> Path:
    """The head of the aesthetic predictor as a torch pickle, with the true names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {}
    for layer, (outputs, inputs) in sizes.items():
        weights[f"layers.{layer}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weights[f"layers.{layer}.bias"] = torch.randn(outputs, generator=generator)
    torch.save(weights, path)
    return path


def edit_safetensors(path: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a file, or leave out those that are None. "__" in a name stands for a dot."""
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        assert name in tensors
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    """Keep the first half of a file, as after a download that broke off."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
