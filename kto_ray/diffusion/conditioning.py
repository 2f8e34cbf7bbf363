"""What prompts are to a denoiser: families make it (`families.py`), the learner picks rows of it.

Families differ in what they condition on (one text embedding, two, a pooled vector, masks), and nobody else looks
inside.

Shape suffixes: P prompts, or samples of a batch with a prompt each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """A named group of tensors, each with one row a prompt: (P, ...)."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> "Conditioning":
        """The conditioning of these prompts: int64 indices on any device, or a slice."""
        return Conditioning(
            {
                name: tensor_P[rows.to(tensor_P.device) if isinstance(rows, Tensor) else rows]
                for name, tensor_P in self.tensors.items()
            }
        )

    def split(self, size: int) -> "list[Conditioning]":
        """In parts of `size` prompts; the last may have fewer."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    @classmethod
    def cat(cls, parts: "Sequence[Conditioning]") -> "Conditioning":
        """Rows of one after those of another; all have the same names."""
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})
