"""Latents as rows of tokens, for the denoisers that want them so: each token is a patch of 2 x 2.

Shape suffixes: B samples; C, H, W latent channels, height, width; T tokens, H / 2 x W / 2; D = 4 C.
"""

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def pack(latents_BCHW: Tensor) -> Tensor:
    """(B, T, D): tokens row by row; in a token channel by channel, each row by row."""
    return pixel_unshuffle(latents_BCHW, 2).flatten(2).mT


def unpack(tokens_BTD: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, C, H, W).

    Args:
        height, width: of the latent.
    """
    batch, _, depth = tokens_BTD.shape
    return pixel_shuffle(tokens_BTD.mT.reshape(batch, depth, height // 2, width // 2), 2)
