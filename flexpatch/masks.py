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
    ends: Tensor,
    positions: Tensor,
    window: int | None,
    last: Tensor | None = None,
    blocks: tuple[int, int] = (BLOCK, BLOCK),
    few: bool = False,
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
        blocks: Queries and keys of a block, powers of two up to 128. Small blocks leave more of the hidden pairs out.
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

    of_q, of_kv = blocks
    q_low = torch.arange(0, padded, of_q, device=ends.device)[:, None]
    kv_low = torch.arange(0, padded, of_kv, device=ends.device)
    end_min, end_max = (e[:, None, :] for e in torch.aminmax(ends_BL.view(B, -1, of_kv), dim=-1))
    last_BL, last_min, last_max = None, q_low, q_low + of_q - 1
    if last is not None:
        last_BL = torch.arange(padded, dtype=torch.int32, device=ends.device).repeat(B, 1)
        last_BL[:, :L] = last
        last_min, last_max = (e[:, :, None] for e in torch.aminmax(last_BL.view(B, -1, of_q), dim=-1))
    some = (last_max >= kv_low) & (q_low < end_max)
    full = (last_min >= kv_low + of_kv - 1) & (q_low + of_q - 1 < end_min)
    if window is not None:
        q_near, q_far = torch.aminmax(positions_BL.view(B, -1, of_q), dim=-1)
        kv_near, kv_far = torch.aminmax(positions_BL.view(B, -1, of_kv), dim=-1)
        some &= q_near[:, :, None] - kv_far[:, None, :] < window
        full &= q_far[:, :, None] - kv_near[:, None, :] < window

    # Rows of blocks for queries, columns for keys. All tables at once where they have one shape, since each operation
    # costs a launch.
    partial = some & ~full
    pair = torch.stack((partial, full))
    tables: dict[str, Any] = {}
    by_shape = [torch.cat((pair, pair.mT))] if of_q == of_kv else [pair, pair.mT]
    names = iter(("kv", "full_kv", "q", "full_q"))
    for chosen in (each[:, :, None].to(torch.int8) for each in by_shape):
        counts = chosen.sum(-1, dtype=torch.int32)
        indices = torch.argsort(chosen, dim=-1, descending=True, stable=True).to(torch.int32)
        # Copies: a compiled kernel would be compiled anew for tensors that begin at other than 16 bytes.
        for count, index in zip(counts, indices, strict=True):
            name = next(names)
            tables |= {f"{name}_num_blocks": count.clone(), f"{name}_indices": index.clone()}
    rule = mask_mod(ends_BL, positions_BL, window, last_BL)
    mask = BlockMask(seq_lengths=(padded, padded), **tables, BLOCK_SIZE=blocks, mask_mod=rule)
    mask.ndim = 4  # type: ignore[attr-defined]  # GPT-2 asks its mask for that
    return mask


def blocks_of(mask: BlockMask) -> tuple[int, int]:
    """Return the queries and keys of a mask's blocks, as its tables have them."""
    assert mask.q_num_blocks is not None
    padded = mask.seq_lengths[0]
    return padded // mask.kv_num_blocks.shape[-1], padded // mask.q_num_blocks.shape[-1]


def as_large_blocks(mask: BlockMask) -> BlockMask:
    """Let a mask of small blocks pass for one of 128 x 128, with the tables that it has.

    Torch (2.11 to 2.13) has no backward kernel for blocks that its own tiles do not divide, whichever tiles are asked
    for. It takes the true sizes as options of the kernels: :func:`tiles_of_blocks`.
    """
    names = [f"{which}_{table}" for which in ("kv", "full_kv", "q", "full_q") for table in ("num_blocks", "indices")]
    tables: dict[str, Any] = {name: getattr(mask, name) for name in names}
    return BlockMask(seq_lengths=mask.seq_lengths, **tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask.mask_mod)


def tiles_of_blocks(blocks: tuple[int, int]) -> dict[str, int]:
    """Choose tiles for a mask of blocks smaller than 128 x 128.

    Args:
        blocks: Queries and keys of a block.

    Returns:
        Options with which kernels read such a mask's tables, though it passes for one of large blocks.
    """
    queries, keys = blocks
    tiles = {"SPARSE_Q_BLOCK_SIZE": queries, "SPARSE_KV_BLOCK_SIZE": keys}
    tiles |= {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": min(keys, 64), "fwd_num_warps": queries // 16}
    tiles |= {"bwd_BLOCK_M1": min(queries, 64), "bwd_BLOCK_N1": keys, "bwd_BLOCK_M2": queries}
    return tiles | {"bwd_BLOCK_N2": min(keys, 64), "bwd_num_warps": max(queries, keys) // 16, "bwd_num_stages": 2}


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
