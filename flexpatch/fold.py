"""An ordinary padded batch as one row of prefix trees, and its hidden states back as a batch.

Sequences of a batch that begin alike are one tree, whatever made them so: pairs, groups of answers, nested turns,
repeated rows. Padding is left out.

Shapes: N sequences, S columns, L tokens of the row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flexpatch.counts import Counts
from flexpatch.errors import FlexpatchError
from flexpatch.rows import Rows, build_rows
from flexpatch.tree import Layout, merge_prefixes

# Positions are merged with ids, as the high half of an int64, where a mask has holes.
_ID_BITS = 32
# Marks the key of padding that predicts a token. Positions stay below it.
_PADDING = 1 << 62
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


def predicting_padding(mask: np.ndarray) -> np.ndarray:
    """Padding whose next column holds a token: its hidden state is where that token's log-prob is read.

    Args:
        mask: (N, S) bool, True for tokens.

    Returns:
        (N, S) bool.
    """
    found = np.zeros_like(mask)
    found[:, :-1] = ~mask[:, :-1] & mask[:, 1:]
    return found


def fold_batch(
    ids: np.ndarray,
    mask: np.ndarray | None = None,
    worth: Callable[[Counts], bool] = lambda counts: True,
    blind: bool = False,
) -> Folded | None:
    """Merge a batch's sequences into one row of prefix trees.

    A token's position is its column less the column of its sequence's first token: what rope and windows see as
    distance in the unpatched model, on whichever side the padding is and across holes in the mask.

    Padding that a token follows is computed too, for trainers read that token's log-prob there: after a prompt that is
    padded on the right, or in front of a sequence. As in the unpatched model it sees the tokens before it, and no
    token sees it, itself included.

    Args:
        ids: (N, S) int64.
        mask: (N, S) bool, True for tokens; ``None``: no padding.
        worth: Asked with the counts before most of the work is done.
        blind: Whether padding sees no token at all, as under FlashAttention, which leaves padding out.

    Returns:
        ``None`` if the batch holds no token, or is not ``worth`` it.
    """
    N, S = ids.shape
    ids = ids.astype(np.int64, copy=False)
    mask = np.ones((N, S), bool) if mask is None else mask
    lengths = mask.sum(1)
    if not lengths.any():
        return None
    tokens = np.flatnonzero(lengths)
    columns = np.arange(S)
    firsts = mask.argmax(1)
    spans = np.where(mask, columns, -1).max(1) + 1 - firsts
    keys, tight = ids, mask
    holes = bool((spans != lengths)[tokens].any())
    if holes:
        # Two sequences stop sharing where their holes differ, so the column is part of the key.
        keys = (columns - firsts[:, None] << _ID_BITS) + ids
    if holes or firsts.any():
        tight = columns < lengths[:, None]
        moved = np.zeros_like(ids)
        moved[tight] = keys[mask]
        keys = moved
    predicting = predicting_padding(mask)
    real = int(lengths.sum() + predicting.sum())
    ends_in_padding = _sequences_that_end_in_padding(ids, mask, keys, firsts, predicting, blind)
    forest = merge_prefixes(
        np.concatenate([keys[tokens], ends_in_padding.keys]),
        np.concatenate([lengths[tokens], ends_in_padding.lengths]),
        lambda merged: worth(Counts(N * S, real, merged)),
    )
    if forest is None:
        return None
    merged, positions, ends, path = forest
    L = len(merged)
    unseen = merged & _PADDING != 0
    merged = merged & ~_PADDING
    if holes:
        positions, merged = merged >> _ID_BITS, merged & ((1 << _ID_BITS) - 1)
    ends = np.where(unseen, np.arange(L), ends)
    padding = None
    if real < N * S:
        padding = L
        merged, positions, ends = np.append(merged, 0), np.append(positions, 0), np.append(ends, L + 1)
    index = np.full((N, S), -1 if padding is None else padding, np.int64)
    index[mask] = path[: len(tokens)][tight[tokens]]
    last = path[len(tokens) + np.arange(len(ends_in_padding.lengths)), ends_in_padding.lengths - 1]
    index[predicting] = last[ends_in_padding.of_position]
    nothing = np.empty(0, np.int64)
    layout = Layout(merged, positions, ends, nothing, nothing, [], [], real)
    return Folded(build_rows([[layout]]), torch.from_numpy(index), padding, Counts(N * S, real, L))


def see_themselves(folded: Folded) -> None:
    """Let padding in front of a sequence, which has no token to see, see itself.

    sdpa gives a query without keys zeros. The softmax of eager attention gives it the mean of all values, of the whole
    batch row in the unpatched model, which no row of prefix trees can repeat.
    """
    ends = folded.rows.ends
    index = torch.arange(ends.shape[1], dtype=ends.dtype)
    ends[(ends <= index) & (folded.rows.position_ids == 0)] += 1


class _Sequences(NamedTuple):
    """E sequences of keys, and the one of them (P,) that ends in each predicting padding token of a batch."""

    keys: np.ndarray
    lengths: np.ndarray
    of_position: np.ndarray


def _sequences_that_end_in_padding(
    ids: np.ndarray, mask: np.ndarray, keys: np.ndarray, firsts: np.ndarray, predicting: np.ndarray, blind: bool
) -> _Sequences:
    """The tokens before each predicting padding token, and that token: more sequences for :func:`merge_prefixes`."""
    S = ids.shape[1]
    rows, columns = np.nonzero(predicting)
    before = np.zeros(len(rows), np.int64) if blind else np.cumsum(mask, 1)[rows, columns]
    # In front of a sequence nothing is seen, so only the id matters: a batch has few such tokens.
    in_front = before == 0
    distances = np.where(in_front, 0, columns - firsts[rows])
    last = (distances << _ID_BITS) + ids[rows, columns] | _PADDING
    _, first, of_position = np.unique(
        np.stack([np.where(in_front, -1, rows), last]), axis=1, return_index=True, return_inverse=True
    )
    rows, before, last = rows[first], before[first], last[first]
    sequences = np.where(np.arange(S) < before[:, None], keys[rows], 0)
    sequences[np.arange(len(rows)), before] = last
    return _Sequences(sequences, before + 1, of_position.reshape(-1))


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
    """Look up ``SORTED`` indices instead of fewer. The additional ones pass on a gradient of zero."""
    filled = F.pad(index.flatten(), (0, SORTED - index.numel()))
    return F.embedding(filled, hidden_LD, padding_idx=padding)[: index.numel()].unflatten(0, index.shape)


def follow_columns(positions: np.ndarray, mask: np.ndarray | None) -> bool:
    """Tell whether position ids count columns, from any start in each sequence: then folding keeps distances.

    Args:
        positions: (N, S), as given.
        mask: (N, S) bool; ``None``: no padding. Padding counts only where a token of its sequence is on both sides.

    Returns:
        Whether they do.
    """
    shift = positions - np.arange(positions.shape[1])
    if not shift.size:
        return True
    if mask is not None:
        first = np.take_along_axis(shift, mask.argmax(1)[:, None], 1)
        read = mask | (predicting_padding(mask) & (np.cumsum(mask, 1) > 0))
        shift = np.where(read, shift, first)
    return bool((shift == shift[:, :1]).all())


def moved(positions: np.ndarray | None, mask: np.ndarray | None) -> bool:
    """Tell whether folding moves any sequence of a batch to other positions.

    Args:
        positions: (N, S), as given; ``None``: columns.
        mask: (N, S) bool; ``None``: no padding.

    Returns:
        Whether it does.
    """
    if mask is None:
        return positions is not None and bool(positions[:, 0].any())
    firsts = mask.argmax(1)
    starts = firsts if positions is None else np.take_along_axis(positions, firsts[:, None], 1)[:, 0]
    return bool(starts[mask.any(1)].any())


def longest_hole(mask: np.ndarray | None) -> int:
    """Count columns from a token to the farthest padding behind it that predicts its sequence's next token.

    Args:
        mask: (N, S) bool; ``None``: no padding.

    Returns:
        0 without holes.
    """
    if mask is None:
        return 0
    columns = np.arange(mask.shape[1])
    latest = np.maximum.accumulate(np.where(mask, columns, -1), axis=1)
    inside = predicting_padding(mask) & (latest >= 0)
    return int(np.where(inside, columns - latest, 0).max(initial=0))


def check_ids(ids: np.ndarray, mask: np.ndarray | None, vocabulary: int) -> None:
    """Refuse ids outside the vocabulary, which a GPU reports as a failed assertion somewhere later.

    Args:
        ids: (N, S) int64.
        mask: (N, S) bool, True for tokens; ``None``: no padding.
        vocabulary: Its size.

    Raises:
        FlexpatchError: Naming the row and column.
    """
    wrong = (ids < 0) | (ids >= vocabulary)
    if mask is not None:
        wrong &= mask | predicting_padding(mask)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise FlexpatchError(
            f"row {row}, column {column} of the batch holds id {ids[row, column]}, outside the vocabulary of "
            f"{vocabulary} tokens"
        )
