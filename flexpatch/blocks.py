"""Two-way blocks: runs of tokens that see each other, those behind them too.

Shapes: N sequences, S columns.
"""

import numpy as np


def runs(inside: np.ndarray) -> np.ndarray:
    """Number the runs of marked tokens in each sequence.

    Args:
        inside: (N, S) bool.

    Returns:
        (N, S) int64, -1 for other tokens.
    """
    before = np.zeros_like(inside)
    before[:, 1:] = inside[:, :-1]
    return np.where(inside, np.cumsum(inside & ~before, 1) - 1, -1)


def stops_of(blocks: np.ndarray) -> tuple[np.ndarray, bool]:
    """Find where the block of each token ends.

    Args:
        blocks: (N, S) int, the number of each token's block, -1 for none.

    Returns:
        (N, S) int64, the column of the last token of each token's block, -1 outside; and whether other tokens interrupt
        a block.
    """
    S = blocks.shape[1]
    edge = np.full((len(blocks), 1), -1)
    ends = blocks != np.hstack([blocks[:, 1:], edge])
    columns = np.where(ends, np.arange(S), S)
    stops = np.where(blocks < 0, -1, np.minimum.accumulate(columns[:, ::-1], 1)[:, ::-1])
    rows, at = np.nonzero(ends & (blocks >= 0))
    return stops, len({*zip(rows.tolist(), blocks[rows, at].tolist(), strict=True)}) < len(rows)


def firsts_of(stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column of the first token of each block, by the ``stops`` of :func:`stops_of`."""
    before = np.hstack([np.full((len(stops), 1), -1), stops[:, :-1]])
    rows, columns = np.nonzero((stops >= 0) & (stops != before))
    return rows, columns
