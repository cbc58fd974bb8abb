"""Random trees of given lengths, and attention by its formula in float64."""

import torch
from torch import Tensor

from flexpatch import Tree


def trees(*lengths: tuple[int, ...]) -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    return [Tree.of(*(torch.randint(3, 151, (n,), generator=generator).tolist() for n in tree)) for tree in lengths]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)
