"""Fold padding-free rows: sequences that stand behind each other in one row, told apart by their positions.

transformers takes a token whose position does not follow that of the token before it for the first of a new sequence,
where a call has neither a mask nor a cache. FlashAttention also takes boundaries as ``cu_seq_lens``.

Shapes: B rows, S columns, R sequences.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from flexpatch.counts import Counts
from flexpatch.fold import Folded, fold_batch

# Names of arguments that describe a padding-free row to kernels. A folded row needs none of them.
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def find_starts(positions: np.ndarray) -> np.ndarray:
    """Find the first tokens of the sequences in padding-free rows.

    Args:
        positions: (B, S) int64, as given.

    Returns:
        (B, S) bool.
    """
    starts = np.ones(positions.shape, bool)
    starts[:, 1:] = np.diff(positions, axis=1) != 1
    return starts


def boundaries(starts: np.ndarray) -> np.ndarray:
    """List where sequences begin, and where the last one ends, as ``cu_seq_lens`` does.

    Args:
        starts: (1, S) bool, the first tokens of sequences.

    Returns:
        (R + 1,) int64.
    """
    return np.append(np.flatnonzero(starts), starts.size)


def fold_sequences(ids: np.ndarray, starts: np.ndarray, worth: Callable[[Counts], bool]) -> Folded | None:
    """Merge the sequences of padding-free rows into one row of prefix trees.

    Args:
        ids: (B, S) int64.
        starts: (B, S) bool, the first tokens of sequences. Position ids restart at 0 there.
        worth: Asked with the counts before most of the work is done.

    Returns:
        The row, with an index (B, S) into it and no padding; ``None`` if it is not ``worth`` it.
    """
    first = np.flatnonzero(starts)
    lengths = np.diff(np.append(first, starts.size))
    mask = np.arange(lengths.max()) < lengths[:, None]
    batch = np.zeros(mask.shape, np.int64)
    batch[mask] = ids.ravel()

    def counts(folded: Counts) -> Counts:
        return Counts(ids.size, ids.size, folded.computed)

    folded = fold_batch(batch, mask, lambda folded: worth(counts(folded)))
    if folded is None:
        return None
    index = folded.index[torch.from_numpy(mask)].view(ids.shape)
    return replace(folded, index=index, padding=None, counts=counts(folded.counts))
