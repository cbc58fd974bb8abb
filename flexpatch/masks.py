"""Attention masks of packed rows: one rule, as a block mask in O(L) or as a dense mask.

    q may see kv  <=>  kv <= last[q]  and  q < end[kv]   and, on windowed layers,   position[q] - position[kv] < window

``last[q]`` is the last token of q's two-way block, such as an image of Gemma 3, and q itself wherever there is none.
Windows count positions, not row indices: in a row a rejected answer lies behind its chosen sibling, so the index
distance to the prompt is too large (errors of 0.6 to 17 nats on windowed models).

Shapes: B rows, L tokens a row, N = bucket(L) / 128 blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexpatch.rows import Rows

# Names the attribute of a mask whose rows run on FlashAttention-4's kernels wherever a layer can.
DEEP = "flexpatch_deep"
BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bucket(length: int, few: bool = False) -> int:
    """Choose the padded length of attention calls: a multiple of 128, because kernels are compiled for each length.

    Args:
        length: Tokens of a row.
        few: Whether attention alone is padded: a padding token costs it next to nothing. Then there are two sizes an
            octave (one up to 4,096 tokens), at most twice the length. Otherwise there are four, at most a quarter
            longer: 36 for rows up to 131,072 tokens.

    Returns:
        The padded length.
    """
    octave = 1 << max(length - 1, 1).bit_length()
    share = (1 if octave <= 4096 else 4) if few else 8
    step = max(BLOCK, octave // share)
    return -(-length // step) * step


def mask_mod(ends: Tensor, positions: Tensor, window: int | None, last: Tensor | None = None) -> MaskMod:
    """Write the rule as a FlexAttention ``mask_mod``.

    All closures come from here and capture tensors alone: a captured int would recompile the kernel for each value.
    All windows share one compiled graph, unlimited attention has its own, without the loads of ``positions``.

    Args:
        ends: (B, L) int32.
        positions: (B, L) int32.
        window: In tokens, or ``None`` for unlimited.
        last: (B, L) int32; ``None`` without two-way blocks, which are a graph of their own.

    Returns:
        A function of batch, head, query and key indices: whether the query sees the key.
    """
    length = ends.shape[1]
    ends, positions = ends.flatten(), positions.flatten()  # 1-D loads: cheaper in every backend

    if last is None:

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= q) & (q < ends[b * length + kv])

    else:
        lasts = last.flatten()

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv <= lasts[b * length + q]) & (q < ends[b * length + kv])

    if window is None:
        return visible
    limit = torch.tensor(window, dtype=torch.int32, device=ends.device)

    def visible_in_window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        near = positions[b * length + q] - positions[b * length + kv] < limit
        return visible(b, h, q, kv) & near

    return visible_in_window


def block_mask(
    ends: Tensor, positions: Tensor, window: int | None, last: Tensor | None = None, few: bool = False
) -> BlockMask:
    """The block-sparse mask of packed rows, from per-block minima and maxima: O(L + N^2) work, no L x L tensor.

    A block is **full** when every pair in it is visible and is **skipped** when none is. Without a window and two-way
    blocks both are exact; with one, "none" is decided from extremes, so a block that turns out empty may be kept (its
    ``mask_mod`` then hides every pair).

    Args:
        ends: (B, L) integers, exclusive subtree ends.
        positions: (B, L) integers, rope positions.
        window: In tokens, or ``None``.
        last: (B, L) integers; ``None`` without two-way blocks.
        few: Whether its length is one of few (:func:`bucket`).

    Returns:
        A mask for length ``bucket(L)``; the attention function pads to it. Tokens past L see only themselves.
    """
    B, L = ends.shape
    padded = bucket(L, few)
    ends_BL = torch.arange(1, padded + 1, dtype=torch.int32, device=ends.device).repeat(B, 1)
    ends_BL[:, :L] = ends
    positions_BL = ends_BL.new_zeros(B, padded)
    positions_BL[:, :L] = positions

    blocks = padded // BLOCK
    low = torch.arange(blocks, device=ends.device) * BLOCK
    q_low, kv_low = low[:, None], low[None, :]
    end_min, end_max = (e[:, None, :] for e in torch.aminmax(ends_BL.view(B, blocks, BLOCK), dim=-1))
    last_BL, last_min, last_max = None, q_low, q_low
    if last is not None:
        last_BL = torch.arange(padded, dtype=torch.int32, device=ends.device).repeat(B, 1)
        last_BL[:, :L] = last
        last_min, last_max = (e[:, :, None] for e in torch.aminmax(last_BL.view(B, blocks, BLOCK), dim=-1))
    some = (last_max >= kv_low) & (q_low < end_max)
    full = (last_min >= kv_low + BLOCK - 1) & (q_low + BLOCK - 1 < end_min)
    if window is not None:
        near, far = torch.aminmax(positions_BL.view(B, blocks, BLOCK), dim=-1)
        some &= near[:, :, None] - far[:, None, :] < window
        full &= far[:, :, None] - near[:, None, :] < window

    # Rows of blocks for queries, columns for keys; all four tables at once, since each operation costs a launch, and
    # kernels take them for contiguous, which those of a transposed view alone are not.
    partial = some & ~full
    chosen = torch.stack((partial, full, partial.mT, full.mT))[:, :, None].to(torch.int8)
    counts = chosen.sum(-1, dtype=torch.int32)
    indices = torch.argsort(chosen, dim=-1, descending=True, stable=True).to(torch.int32)
    # Copies: a compiled kernel would be compiled anew for tensors that begin at other than 16 bytes.
    tables: dict[str, Any] = {}
    for name, count, index in zip(("kv", "full_kv", "q", "full_q"), counts, indices, strict=True):
        tables |= {f"{name}_num_blocks": count.clone(), f"{name}_indices": index.clone()}
    rule = mask_mod(ends_BL, positions_BL, window, last_BL)
    mask = BlockMask(seq_lengths=(padded, padded), **tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)
    mask.ndim = 4  # type: ignore[attr-defined]  # GPT-2 asks its mask for that
    return mask


def dense_mask(ends: Tensor, positions: Tensor, window: int | None, last: Tensor | None = None) -> Tensor:
    """Write the rule as a tensor, for the dense backend.

    Args:
        ends: (B, L) integers, exclusive subtree ends.
        positions: (B, L) integers, rope positions.
        window: In tokens, or ``None``.
        last: (B, L) integers; ``None`` without two-way blocks.

    Returns:
        (B, 1, L, L) bool, True where attention is allowed.
    """
    B, L = ends.shape
    index = torch.arange(L, device=ends.device)
    batch = torch.arange(B, device=ends.device)
    last = None if last is None else last.to(torch.int32)
    rule = mask_mod(ends.to(torch.int32), positions.to(torch.int32), window, last)
    return rule(batch[:, None, None, None], batch[:1], index[:, None], index[None, :])


def mask_of(
    rows: Rows,
    window: int | None,
    dtype: torch.dtype | None,
    two_way: bool = False,
    deep: bool = False,
    few: bool = False,
) -> BlockMask | Tensor:
    """Return the mask of ``rows`` for one window, built at its first use and then shared.

    Args:
        rows: Packed rows.
        window: In tokens, or ``None``. One that no sequence reaches is dropped: the plain kernel is faster.
        dtype: ``None`` for a block mask; ``torch.bool`` for a dense mask; a floating dtype for an additive one.
        two_way: Whether tokens of two-way blocks see each other in these layers.
        deep: Whether attention runs on FlashAttention-4's kernels, if it can and the mask has no window.
        few: Whether a block mask's length is one of few (:func:`bucket`).

    Returns:
        The mask, for ``bucket(L)`` tokens as a block mask, and for L as a dense one.
    """
    window = None if window is None or window >= rows.depth else window
    # A tensor that was written to since has another version, and needs another mask.
    last = rows.last if two_way else None
    deep = deep and window is None
    key = (
        window,
        dtype,
        deep,
        few,
        version(rows.ends),
        version(rows.position_ids),
        None if last is None else version(last),
    )
    if key not in rows.masks:
        if dtype is None:
            rows.masks[key] = block_mask(rows.ends, rows.position_ids, window, last, few=few)
            setattr(rows.masks[key], DEEP, deep)
        else:
            allowed = dense_mask(rows.ends, rows.position_ids, window, last)
            if dtype.is_floating_point:
                allowed = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
            rows.masks[key] = allowed
    return rows.masks[key]


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to, which makes its masks stale. Inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version
