"""What prompts are to a denoiser: families make it (`family.py`), the learner picks rows of it.

Families differ in what they condition on (one text embedding, two, a pooled vector, masks), and nobody else looks
inside.

Shape suffixes: P prompts, or samples of a batch with a prompt each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


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

    @property
    def nbytes(self) -> int:
        """That all tensors take."""
        return sum(tensor_P.nbytes for tensor_P in self.tensors.values())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Conditioning":
        """On a device.

        Args:
            dtype: of what is not counted or masked; None: as it is.
        """
        return Conditioning(
            {
                name: tensor_P.to(device, dtype if tensor_P.is_floating_point() else None)
                for name, tensor_P in self.tensors.items()
            }
        )

    def split(self, size: int) -> "list[Conditioning]":
        """In parts of `size` prompts; the last may have fewer."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    @classmethod
    def cat(cls, parts: "Sequence[Conditioning]") -> "Conditioning":
        """Rows of one after those of another; all have the same names. Texts of fewer tokens than the longest are
        filled up with zeros, as are their masks."""
        return cls({name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; as long as the longest along the second."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, longest - tensor.shape[1])) for tensor in tensors])
