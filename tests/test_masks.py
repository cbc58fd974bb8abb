"""Masks against their definition: a token sees its ancestors and itself, on windowed layers the nearest ones alone."""

import math
from dataclasses import replace

import numpy as np
import torch
from helpers.forests import random_tree
from helpers.mask_tables import blocks_of, blocks_with, by_definition, partial_and_full, rule_of, what_kernels_see
from parameterized import parameterized
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexpatch import Rows, Tree, build_rows
from flexpatch.masks import BLOCK, block_mask, bucket, dense_mask, mask_of

WINDOWS = (None, 1, 2, 5, 40)


def random_rows(seed: int, longest_run: int = 3) -> Rows:
    """A few packed rows of different lengths, hence with padding."""
    rng = np.random.default_rng(seed)
    return build_rows(
        [
            [random_tree(rng, levels=3, longest_run=longest_run) for _ in range(rng.integers(1, 6))]
            for _ in range(rng.integers(1, 4))
        ]
    )


def long_rows() -> list[Rows]:
    """Rows of several blocks each: packed forests with padding, one long sequence, a long prompt; and two tokens."""
    forests = [random_rows(seed, longest_run) for seed, longest_run in enumerate([20, 60, 90, 150, 40, 150])]
    tokens = list(range(1500))
    sequence = build_rows([[Tree(tokens[:1281], answer=True)]])
    prompt = build_rows([[Tree.of(tokens[:700], tokens[:300], tokens[1:200])], [Tree.of([1], [2])]])
    # Subtrees that end a token before, at and after the end of a block.
    edges = [build_rows([[Tree(tokens[:length], answer=True), Tree([1, 2])]]) for length in (383, 384, 385)]
    return [*forests, *edges, sequence, prompt, build_rows([[Tree([1, 2], answer=True)]])]


def test_dense_mask_is_the_definition() -> None:
    for seed in range(150):
        rows = random_rows(seed)
        for window in WINDOWS:
            assert torch.equal(dense_mask(rows.ends, rows.position_ids, window), by_definition(rows, window))


def test_windows_count_positions_and_siblings_are_hidden() -> None:
    """What the comparison above would miss if it could not fail."""
    rows = build_rows([[Tree.of([1, 2, 3], [4, 5, 6], [7, 8, 9])]])
    by_row_index = torch.arange(rows.input_ids.shape[1])[None]
    assert not torch.equal(dense_mask(rows.ends, by_row_index, 4), by_definition(rows, 4))
    causal = torch.full_like(rows.ends, rows.input_ids.shape[1])
    assert not torch.equal(dense_mask(causal, rows.position_ids, None), by_definition(rows, None))
    assert not torch.equal(dense_mask(rows.ends + 1, rows.position_ids, None), by_definition(rows, None))


def test_block_mask_is_the_one_torch_would_make() -> None:
    for rows in long_rows():
        ours = block_mask(rows.ends, rows.position_ids, None)
        B, _, P, _ = ours.shape
        torchs = create_block_mask(ours.mask_mod, B, 1, P, P, device="cpu", BLOCK_SIZE=BLOCK)
        assert torch.equal(ours.to_dense(), torchs.to_dense())
        partial, full = partial_and_full(ours)
        assert torch.equal(torch.stack([partial, full]), torch.stack(partial_and_full(torchs)))
        # ... which is to say:
        allowed = rule_of(ours)
        assert torch.equal(full, blocks_with(torch.all, allowed))
        assert torch.equal(partial, blocks_with(torch.any, allowed) & ~full)


@parameterized.expand([(window,) for window in (None, 1, 7, 128, 255, 256)])
def test_kernels_see_the_definition(window: int | None) -> None:
    full_blocks = 0
    for rows in long_rows():
        mask = block_mask(rows.ends, rows.position_ids, window)
        L, P = rows.input_ids.shape[1], mask.shape[-1]
        assert mask.shape == (len(rows.input_ids), 1, bucket(L), bucket(L))
        seen = what_kernels_see(mask)
        assert torch.equal(seen[..., :L, :L], by_definition(rows, window))
        assert torch.equal(seen[..., :L, :L], dense_mask(rows.ends, rows.position_ids, window))
        # The padded tail sees itself alone, and nobody sees it.
        assert torch.equal(seen[..., L:, :], torch.eye(P, dtype=torch.bool)[L:].expand(len(seen), 1, -1, -1))
        assert not seen[..., :L, L:].any()
        # No block that is needed is missing; no block is called full that is not.
        partial, full = partial_and_full(mask)
        assert not (partial & full).any()
        some, every = (blocks_with(condition, rule_of(mask)) for condition in (torch.any, torch.all))
        assert not (some & ~(partial | full)).any()
        assert not (full & ~every).any()
        # Without a window none is taken for nothing, or for partial.
        assert window is not None or (torch.equal(partial | full, some) and torch.equal(full, every))
        # Tables by keys, which backward reads, say the same. Kernels take all for contiguous.
        assert torch.equal(blocks_of(mask.q_num_blocks, mask.q_indices).mT, partial)
        assert torch.equal(blocks_of(mask.full_q_num_blocks, mask.full_q_indices).mT, full)
        assert all(table.is_contiguous() for table in tree_leaves(mask.as_tuple()) if isinstance(table, Tensor))
        full_blocks += int(full.sum())
    # All keys of a full block are ancestors of one query, so the first is at least 128 positions away.
    assert (full_blocks > 0) == (window is None or window > 128)


def with_blocks(rows: Rows, seed: int) -> Rows:
    """Two-way blocks in some runs, beside each other too."""
    rng = np.random.default_rng(seed)
    last = torch.arange(rows.input_ids.shape[1], dtype=torch.int32).repeat(len(rows.input_ids), 1)
    for row, ends, positions in zip(last, rows.ends, rows.position_ids, strict=True):
        start = 0
        while start < len(row):
            stop = start + 1
            while stop < len(row) and ends[stop] == ends[start] and positions[stop] == positions[stop - 1] + 1:
                stop += 1
            while start < stop:
                size = int(rng.integers(1, stop - start + 1))
                if rng.random() < 0.5:
                    row[start : start + size] = start + size - 1
                start += size
    return replace(rows, last=last)


def two_way_by_definition(rows: Rows, window: int | None) -> Tensor:
    """What the past shows, and all of a block to each of its tokens; windows hide the past alone."""
    assert rows.last is not None
    same = rows.last[:, None, :, None] == rows.last[:, None, None, :]
    behind = rows.position_ids[:, None, :, None] < rows.position_ids[:, None, None, :]
    return by_definition(rows, window) | (same & behind)


@parameterized.expand([(window,) for window in WINDOWS])
def test_two_way_blocks(window: int | None) -> None:
    for seed in range(60):
        rows = with_blocks(random_rows(seed), seed)
        true = two_way_by_definition(rows, window)
        assert torch.equal(dense_mask(rows.ends, rows.position_ids, window, rows.last), true)
    alone = torch.arange(rows.ends.shape[1]).expand_as(rows.ends)
    true = by_definition(rows, window)
    assert torch.equal(dense_mask(rows.ends, rows.position_ids, window, alone), true)


@parameterized.expand([(window,) for window in (None, 7, 255)])
def test_kernels_see_two_way_blocks(window: int | None) -> None:
    differ = 0
    for seed, plain in enumerate(long_rows()):
        rows = with_blocks(plain, seed)
        mask = block_mask(rows.ends, rows.position_ids, window, rows.last)
        L = rows.input_ids.shape[1]
        seen = what_kernels_see(mask)[..., :L, :L]
        assert torch.equal(seen, two_way_by_definition(rows, window))
        partial, full = partial_and_full(mask)
        assert not (blocks_with(torch.any, rule_of(mask)) & ~(partial | full)).any()
        assert not (full & ~blocks_with(torch.all, rule_of(mask))).any()
        past = what_kernels_see(block_mask(rows.ends, rows.position_ids, window))[..., :L, :L]
        differ += not torch.equal(past, seen)
    assert differ > 5, "blocks change nothing here"


def test_windows_skip_blocks() -> None:
    rows = build_rows([[Tree(list(range(2048)), answer=True)]])
    assert block_mask(rows.ends, rows.position_ids, 256).sparsity() > 70
    assert block_mask(rows.ends, rows.position_ids, None).sparsity() < 50


def test_broken_block_masks_are_noticed() -> None:
    rows = build_rows([[Tree.of(list(range(200)), list(range(300)), list(range(1, 300)))]])
    truth = by_definition(rows, 260)
    L = rows.input_ids.shape[1]

    def seen(ends: Tensor, positions: Tensor, window: int | None) -> Tensor:
        return what_kernels_see(block_mask(ends, positions, window))[..., :L, :L]

    assert torch.equal(seen(rows.ends, rows.position_ids, 260), truth)
    assert not torch.equal(seen(rows.ends, torch.arange(L)[None], 260), truth)
    assert not torch.equal(seen(torch.full_like(rows.ends, L), rows.position_ids, 260), truth)
    assert not torch.equal(seen(rows.ends, rows.position_ids, 259), truth)
    assert not torch.equal(seen(rows.ends, rows.position_ids, None), truth)


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_block_mask_makes_nothing_quadratic() -> None:
    def largest(make, length: int) -> int:
        pair = Tree.of(list(range(length // 2)), list(range(length // 4)), list(range(1, length // 4 + 1)))
        rows = build_rows([[pair]])
        assert rows.input_ids.shape[1] == length
        with LargestTensor() as mode:
            make(rows)
        return mode.numel

    for window in (None, 4096):
        # L tokens, and (L / 128)^2 pairs of blocks.
        assert largest(lambda rows: mask_of(rows, window, None), 16384) <= 4 * 16384  # noqa: B023
    # The two that are quadratic, at a length this machine can take.
    assert largest(lambda rows: mask_of(rows, None, torch.bool), 2048) >= 2048**2
    assert (
        largest(
            lambda rows: create_block_mask(
                block_mask(rows.ends, rows.position_ids, None).mask_mod, 1, 1, 2048, 2048, device="cpu"
            ),
            2048,
        )
        >= 2048**2
    )


def test_buckets_are_few_and_close() -> None:
    lengths = range(1, 131073)
    buckets = [bucket(length) for length in lengths]
    assert all(size % BLOCK == 0 for size in buckets)
    assert buckets == sorted(buckets)
    assert all(length <= size <= 1.25 * length + BLOCK for length, size in zip(lengths, buckets, strict=True))
    assert len(set(buckets)) == 36
    assert all(bucket(size) == size for size in set(buckets))
    few = [bucket(length, few=True) for length in lengths]
    assert few == sorted(few) and all(size % BLOCK == 0 for size in few)
    # As attention wants it, which takes masks of these lengths for no other rows.
    assert all(length <= size < 2 * length + BLOCK for length, size in zip(lengths, few, strict=True))
    assert len(set(few)) == 6 + 2 * 5 and all(bucket(size, few=True) == size for size in set(few))


def test_masks_are_built_once() -> None:
    rows = build_rows([[Tree.of([1, 2, 3], [4, 5, 6], [7])]])
    assert rows.depth == 6
    for dtype in (None, torch.bool, torch.float32):
        mask = mask_of(rows, None, dtype)
        assert mask_of(rows, None, dtype) is mask
        assert mask_of(rows, 6, dtype) is mask  # no sequence reaches this window
        assert mask_of(rows, 5, dtype) is not mask
        assert mask_of(rows, 5, dtype) is mask_of(rows, 5, dtype)
    assert len(rows.masks) == 6


@parameterized.expand([(torch.float64,), (torch.float32,), (torch.bfloat16,)])
def test_additive_masks(dtype: torch.dtype) -> None:
    rows = random_rows(3)
    for window in (None, 2):
        mask = mask_of(rows, window, dtype)
        allowed = mask_of(rows, window, torch.bool)
        assert isinstance(mask, Tensor) and mask.dtype == dtype
        assert (mask[allowed] == 0).all()
        assert (mask[~allowed] == torch.finfo(dtype).min).all()
        assert math.isfinite(mask.min().item())  # -inf minus -inf would be NaN
        assert not mask.softmax(-1)[~allowed].any()


def test_no_token_is_blind() -> None:
    for seed in range(50):
        rows = random_rows(seed)
        for window in WINDOWS:
            diagonal = dense_mask(rows.ends, rows.position_ids, window).diagonal(dim1=-2, dim2=-1)
            assert diagonal.all()
