"""Optimizers by name (`train.optimizer`). `learner.py` steps one; `preflight.py` asks whether it can be had.

Which takes how much memory: AdamW holds two means of each trained number in float32, of 8 bits in "adamw_8bit"
(bitsandbytes, Dettmers et al., arXiv 2110.02861); "adamw_paged" lets CUDA move them between card and host, page by page
(bitsandbytes, Dettmers et al., arXiv 2305.14314); Adafactor (Shazeer & Stern, arXiv 1804.04235) holds one for each row
and column.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from kto_ray.config import Train
from kto_ray.errors import UserError

OF_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "adamw_paged": "PagedAdamW32bit"}


def check(config: Train) -> None:
    """Raises UserError: the optimizer cannot be had here."""
    if config.optimizer not in OF_BITSANDBYTES:
        return
    if config.optimizer == "adamw_paged" and config.on_cpu:
        raise UserError(
            "train.optimizer: adamw_paged moves its state between a GPU and the host, and train.resources.num_gpus is "
            f"{config.resources.num_gpus:g} with train.device={config.device}; give it one, or adamw"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"train.optimizer: {config.optimizer} needs bitsandbytes, which is not installed; pip install "
            "'kto-ray[lean]', or take adafactor"
        )


def make_optimizer(config: Train, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The one that `train.optimizer` names, with its learning rate and weight decay."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, **settings)
    if config.optimizer in OF_BITSANDBYTES:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, OF_BITSANDBYTES[config.optimizer])(
            parameters, **settings
        )
        return optimizer
    return torch.optim.AdamW(parameters, **settings)
