"""ImageReward: a BLIP fine-tuned on people's rankings of images. A `Scorer` for the environment of the same name.

The package `image-reward` has the parts of the model and the preprocessing; here they are put together without the
tokenizer that it asks the hub for, and run on batches.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from kto_ray.errors import UserError
from kto_ray.identity import Noted
from kto_ray.records import Prompt
from kto_ray.score.environments.finding import require
from kto_ray.score.protocol import check_batch
from kto_ray.score.scorers.blank import Unfilled, random_weights
from kto_ray.score.scorers.weights import find_file, load_weights, pick_device, pick_dtype, read_weights

ENVIRONMENT = "image_reward"
REPOSITORY = "THUDM/ImageReward"
TOKENIZER = "bert-base-uncased"
TOKENS = 35  # longer prompts are cut off
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards that the authors normalise by
PIXELS, WIDTH = 224, 768  # what the image tower looks at; of BERT's vectors


class ImageReward:
    """How well people would like an image for its prompt: about -2 to 2, normalised by the authors to mean 0 and std 1.

    ImageReward-v1.0 (Xu et al. 2023, arXiv 2304.05977). 0 is a natural threshold: better than the average of the
    authors' images. Licence: Apache-2.0, package (image-reward) and weights. Runs in the environment "image_reward".

    Args:
        checkpoint: file with the names of ImageReward.pt; None: that file of THUDM/ImageReward.
        device: "auto", "cpu", "cuda".
        dtype: "float32", "bfloat16" or "float16", of BLIP; the head runs in float32.
        med_config: file that describes the text tower; None: med_config.json beside a given checkpoint, or else that
            of THUDM/ImageReward.
        tokenizer: folder with vocab.txt or hub name; None: bert-base-uncased.

    Raises:
        UserError: see `require`, `find_file` and `load_weights`; or med_config or tokenizer are missing, or another
            model's.
    """

    name = "image_reward"
    version = "1.0"

    def __init__(
        self,
        checkpoint: str | None = None,
        device: Noted[str] = "auto",
        dtype: str = "float32",
        med_config: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        require("ImageReward", ENVIRONMENT)  # before anything is downloaded
        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        path = find_file(checkpoint, REPOSITORY, "ImageReward.pt")
        beside = path.with_name("med_config.json")
        if med_config is None and checkpoint is not None and beside.is_file():
            med_config = str(beside)
        config_path = find_file(med_config, REPOSITORY, "med_config.json", "med_config")
        self.model, self.preprocess = build_model(config_path)
        self.tokenizer = load_tokenizer(tokenizer or TOKENIZER)
        known = self.model.blip.text_encoder.config.vocab_size
        if len(self.tokenizer) != known:
            raise UserError(
                f"tokenizer {tokenizer or TOKENIZER} has {len(self.tokenizer)} tokens, {config_path} wants {known}: "
                "it is another model's"
            )
        load_weights(self.model, path, {**dict(self.model.named_buffers()), **read_weights(path)})
        self.model.blip.to(self.device, self.dtype)
        self.model.mlp.to(self.device)

    @torch.inference_mode()
    def score(self, images_BHWC: npt.NDArray[np.uint8], prompts: Sequence[Prompt]) -> list[float]:
        """See `Scorer`. Raises ValueError for what is no batch of images."""
        check_batch(images_BHWC, prompts)
        if not prompts:
            return []
        pixels_BCHW = torch.stack([self.preprocess(Image.fromarray(image_HWC)) for image_HWC in images_BHWC])
        image_BPD = self.model.blip.visual_encoder(pixels_BCHW.to(self.device, self.dtype))
        # The authors fill up to 35 tokens; what fills is masked, so that the longest prompt is enough.
        tokens_BT = self.tokenizer(
            [prompt.text for prompt in prompts], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        hidden_BTD = self.model.blip.text_encoder(
            tokens_BT.input_ids,
            attention_mask=tokens_BT.attention_mask,
            encoder_hidden_states=image_BPD,
            return_dict=True,
        ).last_hidden_state
        rewards: list[float] = ((self.model.mlp(hidden_BTD[:, 0].float()).squeeze(-1) - MEAN) / STD).tolist()
        return rewards


def build_model(med_config: Path) -> tuple[Any, Any]:
    """The parts that score, under the names of the checkpoint and without weights, and the preprocessing."""
    package = require("ImageReward.ImageReward", ENVIRONMENT)
    blip, med = (require(f"ImageReward.models.BLIP.{part}", ENVIRONMENT) for part in ("blip", "med"))
    try:
        config = med.BertConfig.from_json_file(med_config)
    except (ValueError, TypeError) as error:
        raise UserError(f"med_config {med_config} does not describe a text tower: {error}") from error
    model: Any = nn.Module()
    with Unfilled():
        model.blip, model.mlp = nn.Module(), package.MLP(WIDTH)
        model.blip.visual_encoder, config.encoder_width = blip.create_vit("large", PIXELS)
        model.blip.text_encoder = med.BertModel(config=config, add_pooling_layer=False)
    return model.eval(), package._transform(PIXELS)


def load_tokenizer(source: str) -> Any:
    """BERT's, with the two tokens that BLIP adds."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"tokenizer {source} is no folder with vocab.txt, nor to be had from the hub: {error}"
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def random_checkpoint(folder: Path, full: bool = False) -> dict[str, Any]:
    """Write a checkpoint, med_config.json and a tokenizer with random content; gives a scorer's arguments.

    The package knows the image tower in one size only; the text tower has two layers, or with `full` the true twelve.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary += [f"[unused{i}]" for i in range(30522 - len(vocabulary))] if full else []
    tokenizer, config = folder / TOKENIZER, folder / "med_config.json"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(vocabulary))
    layers = {"num_hidden_layers": 12 if full else 2, "vocab_size": len(vocabulary) + 2, "add_cross_attention": True}
    config.write_text(json.dumps({"model_type": "bert", "hidden_size": WIDTH, "num_attention_heads": 12, **layers}))
    checkpoint = folder / "ImageReward.pt"
    torch.save(random_weights(build_model(config)[0]), checkpoint)
    return {"checkpoint": str(checkpoint), "med_config": str(config), "tokenizer": str(tokenizer)}
