"""An ordinary padded batch as one row of prefix trees, and its hidden states back as a batch.

Sequences of a batch that begin alike are one tree, whatever made them so: pairs, groups of answers, nested turns,
repeated rows. Padding is left out.

Shapes: N sequences, S columns, L tokens of the row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flexpatch.errors import FlexpatchError
from flexpatch.tree import Layout, Rows, build_rows, merge_prefixes

# A row is worth folding a batch for if it costs at most this share of it.
WORTH = 0.9
# Positions are merged with ids, as the high half of an int64, where a mask has holes.
_ID_BITS = 32
# From so many indices on, the backward of a CUDA embedding is the kernel that sorts.
SORTED = 3073


@dataclass(frozen=True, eq=False)
class Folded:
    """A batch as one row.

    Attributes:
        rows: The row, on the CPU. Nothing in it is scored.
        index: (N, S) int64, the row's token that holds each position's hidden state.
        padding: The token all padding points to: the row's last, a tree of its own. ``None`` without padding.
        counts: What was saved.
    """

    rows: Rows
    index: Tensor
    padding: int | None
    counts: Counts


@dataclass(frozen=True)
class Counts:
    """Tokens of one batch: ``padded`` as given (N * S), ``real`` without padding, ``computed`` by the model."""

    padded: int
    real: int
    computed: int

    def padding(self) -> int:
        """Padding tokens left out, when folded. One of them stays, for all padding to point to."""
        return self.padded - self.real

    def shared(self) -> int:
        """Tokens left out because an equal one stands for them, when folded."""
        return self.real - self.computed


def fold_batch(
    ids: np.ndarray, mask: np.ndarray | None = None, worth: Callable[[Counts], bool] = lambda counts: True
) -> Folded | None:
    """Merge a batch's sequences into one row of prefix trees.

    A token's position is its column less the column of its sequence's first token: what rope and windows see as
    distance in the unpatched model, on whichever side the padding is and across holes in the mask.

    Args:
        ids: (N, S) int64.
        mask: (N, S) bool, True for tokens; ``None``: no padding.
        worth: Asked with the counts before most of the work is done.

    Returns:
        ``None`` if the batch holds no token, or is not ``worth`` it.
    """
    N, S = ids.shape
    ids = ids.astype(np.int64, copy=False)
    mask = np.ones((N, S), bool) if mask is None else mask
    lengths = mask.sum(1)
    real = int(lengths.sum())
    if real == 0:
        return None
    tokens = np.flatnonzero(lengths)
    columns = np.arange(S)
    firsts = mask.argmax(1)
    spans = np.where(mask, columns, -1).max(1) + 1 - firsts
    keys, tight = ids, mask
    holes = bool((spans != lengths)[tokens].any())
    if holes:
        # Sequences that begin alike but for a hole have nothing in common from there on: the column is part of the key.
        keys = (columns - firsts[:, None] << _ID_BITS) + ids
    if holes or firsts.any():
        tight = columns < lengths[:, None]
        moved = np.zeros_like(ids)
        moved[tight] = keys[mask]
        keys = moved
    forest = merge_prefixes(keys[tokens], lengths[tokens], lambda merged: worth(Counts(N * S, real, merged)))
    if forest is None:
        return None
    merged, positions, ends, path = forest
    if holes:
        positions, merged = merged >> _ID_BITS, merged & ((1 << _ID_BITS) - 1)
    padding = None
    L = len(merged)
    if real < N * S:
        padding = L
        merged, positions, ends = np.append(merged, 0), np.append(positions, 0), np.append(ends, L + 1)
    index = np.full((N, S), -1 if padding is None else padding, np.int64)
    index[mask] = path[tight[tokens]]
    nothing = np.empty(0, np.int64)
    layout = Layout(merged, positions, ends, nothing, nothing, [], [], real)
    return Folded(build_rows([[layout]]), torch.from_numpy(index), padding, Counts(N * S, real, L))


def unfold(hidden_1LD: Tensor, index: Tensor, padding: int | None) -> Tensor:
    """Hidden states of the row, as the batch the caller gave.

    Padding gets the hidden state of a token that sees only itself, and passes no gradient on.

    Args:
        hidden_1LD: (1, L, D).
        index: (N, S) int64.
        padding: As in :class:`Folded`.

    Returns:
        (N, S, D).
    """
    assert len(hidden_1LD) == 1, "a folded batch is one row"
    return lookup(hidden_1LD[0], index.to(hidden_1LD.device), padding)


def lookup(hidden_LD: Tensor, index: Tensor, padding: int | None = None) -> Tensor:
    """Hidden states of tokens, any of them several times.

    An embedding lookup: on CUDA its backward sorts the index and sums the gradients of a token in float32, for which
    indexing would use atomics; and in a fixed order, always under deterministic algorithms, without them unless few
    tokens are looked up very often (from torch 2.11 on). Below ``SORTED`` indices torch takes another kernel, which is
    reported to have a race from 1,025 indices on (pytorch PR 187687) and rounds sums to the dtype of the gradients at
    every 32nd: a short index is filled up.

    Args:
        hidden_LD: (L, D).
        index: int64, of any shape.
        padding: The token whose gradient is dropped.

    Returns:
        ``index.shape`` + (D,).
    """
    if hidden_LD.device.type == "cuda" and hidden_LD.requires_grad and index.numel() < SORTED:
        return _filled_lookup(hidden_LD, index, padding)
    return F.embedding(index, hidden_LD, padding_idx=padding)


def _filled_lookup(hidden_LD: Tensor, index: Tensor, padding: int | None) -> Tensor:
    """:func:`lookup` with ``SORTED`` indices. What is looked up for nothing passes on a gradient of zero."""
    filled = F.pad(index.flatten(), (0, SORTED - index.numel()))
    return F.embedding(filled, hidden_LD, padding_idx=padding)[: index.numel()].unflatten(0, index.shape)


@dataclass(frozen=True)
class Savings:
    """What folding saved over some batches.

    Attributes:
        batches: Batches that could have been folded.
        folded: Those that were; the others had too little to gain and ran as they were given.
        padded: Tokens the unpatched model computes: rows times columns.
        computed: Tokens that were computed.
        padding: Tokens saved as padding.
        shared: Tokens saved because sequences share them.
    """

    batches: int
    folded: int
    padded: int
    computed: int
    padding: int
    shared: int

    @classmethod
    def of(cls, counts: Iterable[Counts]) -> Savings:
        """Sum over batches."""
        every = list(counts)
        folded = [c for c in every if c.computed < c.padded]
        padding, shared = (sum(getattr(c, kind)() for c in folded) for kind in ("padding", "shared"))
        return cls(
            len(every), len(folded), sum(c.padded for c in every), sum(c.computed for c in every), padding, shared
        )

    @property
    def factor(self) -> float:
        """How many times fewer tokens were computed."""
        return self.padded / self.computed if self.computed else 1.0

    def __str__(self) -> str:
        whole = max(self.padded, 1)
        return (
            f"{self.folded} of {self.batches} batches folded: {self.computed:,} tokens computed instead of "
            f"{self.padded:,}, {self.factor:.2f} times fewer; {self.padding / whole:.0%} were padding, "
            f"{self.shared / whole:.0%} shared prefixes"
        )


def follow_columns(positions: np.ndarray, mask: np.ndarray | None) -> bool:
    """Whether given (N, S) position ids count columns, from wherever in each sequence: then folding keeps distances."""
    shift = positions - np.arange(positions.shape[1])
    if not shift.size:
        return True
    if mask is not None:
        first = np.take_along_axis(shift, mask.argmax(1)[:, None], 1)
        shift = np.where(mask, shift, first)
    return bool((shift == shift[:, :1]).all())


def moved(positions: np.ndarray | None, mask: np.ndarray | None) -> bool:
    """Whether folding gives any token of a batch another position, the same for all tokens of its sequence.

    Args:
        positions: (N, S), as given; ``None``: columns.
        mask: (N, S) bool; ``None``: no padding.
    """
    if mask is None:
        return positions is not None and bool(positions[:, 0].any())
    firsts = mask.argmax(1)
    starts = firsts if positions is None else np.take_along_axis(positions, firsts[:, None], 1)[:, 0]
    return bool(starts[mask.any(1)].any())


def check_ids(ids: np.ndarray, mask: np.ndarray | None, vocabulary: int) -> None:
    """Refuse ids outside the vocabulary, which a GPU reports as a failed assertion somewhere later.

    Raises:
        FlexpatchError: Naming the row and column.
    """
    wrong = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        wrong &= mask
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise FlexpatchError(
            f"row {row}, column {column} of the batch holds id {ids[row, column]}, outside the vocabulary of "
            f"{vocabulary} tokens"
        )
