"""What prompts are to a denoiser: rows of a named group of tensors."""

import torch

from kto_ray.diffusion.conditioning import Conditioning

TEXT_PTD, POOLED_PD = torch.arange(24.0).reshape(4, 3, 2), torch.arange(8.0).reshape(4, 2)
FOUR = Conditioning({"text": TEXT_PTD, "pooled": POOLED_PD})


def test_rows_are_taken_of_all_tensors_alike() -> None:
    picked = FOUR[torch.tensor([3, 0, 0])]
    assert len(picked) == 3
    assert torch.equal(picked.tensors["text"], TEXT_PTD[[3, 0, 0]])
    assert torch.equal(picked.tensors["pooled"], POOLED_PD[[3, 0, 0]])
    assert torch.equal(FOUR[1:3].tensors["pooled"], POOLED_PD[1:3])


def test_parts_put_together_are_the_whole() -> None:
    parts = FOUR.split(3)
    assert [len(part) for part in parts] == [3, 1]
    whole = Conditioning.cat(parts)
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in FOUR.tensors.items())
