"""How the noise levels of an optimizer step are drawn (`train.noise_draw`). `batches.py` draws those of a global batch.

Shape suffix: G the global batch.
"""

import torch
from torch import Tensor


def draw_levels(draw: str, count: int, noise_range: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Noise levels within a range of [0, 1], float32 (G,).

    Args:
        draw: "uniform": each by itself. "stratified": one from each of as many equal parts of the range as there are
            levels, in a random order; every level alone is uniform. "logit_normal": the sigmoid of a standard normal
            variable (Esser et al., arXiv 2403.03206, Section 3.1), stretched to the range.

    Raises:
        ValueError: another `draw`.
    """
    low, high = noise_range
    if draw == "uniform":
        place_G = torch.rand(count, generator=generator)
    elif draw == "stratified":
        part_G = torch.randperm(count, generator=generator)
        # Float32 rounds the last of many parts up to its end.
        place_G = ((part_G + torch.rand(count, generator=generator)) / count).clamp(max=1 - 2**-24)
    elif draw == "logit_normal":
        place_G = torch.randn(count, generator=generator).sigmoid()
    else:
        raise ValueError(f"noise levels cannot be drawn {draw!r}; known: uniform, stratified, logit_normal")
    return low + (high - low) * place_G
