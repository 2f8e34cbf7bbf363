"""Optimizers by name (`train.optimizer`). `learner.py` steps one; `preflight.py` asks whether it can be had.

Which takes how much memory: AdamW holds two means of each trained number in float32, of 8 bits in "adamw_8bit"
(bitsandbytes, Dettmers et al., arXiv 2110.02861); Adafactor (Shazeer & Stern, arXiv 1804.04235) holds one for each row
and column.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from kto_ray.config import Train
from kto_ray.errors import UserError


def check(config: Train) -> None:
    """Raises UserError: the optimizer cannot be had here."""
    if config.optimizer != "adamw_8bit":
        return
    if not config.resources.num_gpus and config.device in ("auto", "cpu"):
        raise UserError(
            "train.optimizer: adamw_8bit runs on a GPU, and train.resources.num_gpus is 0; give it one, or adamw"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; pip install 'kto-ray[lean]', or "
            "take adafactor"
        )


def make_optimizer(config: Train, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The one that `train.optimizer` names, with its learning rate and weight decay."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, **settings)
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **settings)
        return optimizer
    return torch.optim.AdamW(parameters, **settings)
