"""Attention masks by their definition, and block masks pair by pair."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexpatch import Rows
from flexpatch.masks import BLOCK
from helpers.forests import row_prefixes, visible


def by_definition(rows: Rows, window: int | None) -> Tensor:
    """(B, 1, L, L) bool."""
    masks = [visible(row_prefixes(*row), window) for row in zip(rows.input_ids, rows.position_ids, strict=True)]
    return torch.from_numpy(np.stack(masks))[:, None]


def blocks_of(counts: Tensor, indices: Tensor) -> Tensor:
    """BlockMask's counts and indices as (B, 1, N, N) bool."""
    chosen = torch.zeros(indices.shape, dtype=torch.bool)
    for place in np.ndindex(*counts.shape):
        chosen[place][indices[place][: counts[place]].long()] = True
    return chosen


def partial_and_full(mask: BlockMask) -> tuple[Tensor, Tensor]:
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    return blocks_of(mask.kv_num_blocks, mask.kv_indices), blocks_of(mask.full_kv_num_blocks, mask.full_kv_indices)


def rule_of(mask: BlockMask) -> Tensor:
    """The mask's ``mask_mod`` at every pair, (B, 1, P, P)."""
    index = torch.arange(mask.seq_lengths[0])
    rows = torch.arange(mask.shape[0])[:, None, None, None]
    return mask.mask_mod(rows, torch.zeros(1, dtype=torch.int64), index[:, None], index[None, :])


def what_kernels_see(mask: BlockMask) -> Tensor:
    """(B, 1, P, P): the rule inside partial blocks, everything inside full ones, nothing elsewhere."""
    partial, full = (
        blocks.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2) for blocks in partial_and_full(mask)
    )
    return partial & rule_of(mask) | full


def blocks_with(condition: Callable[..., Tensor], pairs: Tensor) -> Tensor:
    """(B, 1, N, N): the blocks in which any, or all, pairs (B, 1, P, P) are allowed."""
    blocks = pairs.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # (B, 1, N, 128, N, 128)
    return condition(condition(blocks, -1), -2)
