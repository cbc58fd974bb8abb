"""Lay the sequences of packed rows out for modules that take separate sequences.

A row holds each token once; its root-to-leaf sequences hold a shared token once each. Sequences of similar lengths form
a padded batch, so that little is computed for padding.

Shapes: B rows, L tokens a row, N sequences of a batch, S columns.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flexpatch.fold import lookup
from flexpatch.masks import version
from flexpatch.registry import Visible
from flexpatch.rows import Rows
from flexpatch.segments import Segments

# A batch of sequences is at most this many times their tokens.
WASTE = 1.15


class Plan:
    """The separate sequences of packed rows.

    Engines rebuild arguments that are containers, and move those with a method ``to``: this class is neither. It
    stands where a row's mask would stand for layers that take none.

    Args:
        ends: (B, L) integers, exclusive subtree ends.
        tokens: Tokens of the rows that are no padding, if known.
        waste: Sequences go into one batch while all of it is at most so many times their tokens.
    """

    def __init__(self, ends: Tensor, tokens: int | None = None, waste: float = WASTE) -> None:
        self.waste = waste
        self.shape = ends.shape
        self.tokens = tokens
        self.device = ends.device
        self._ends = ends.numpy(force=True).astype(np.int64)

    @cached_property
    def in_one_batch(self) -> "Plan":
        """Return the plan that has all sequences in one batch, for mixers that ranks must call equally often."""
        return Plan(torch.from_numpy(self._ends).to(self.device), self.tokens, np.inf)

    @cached_property
    def batches(self) -> list[Tensor]:
        """Return batches of sequences: (N, S) int64 each, indices of tokens in B * L, on the rows' device.

        Right padding repeats a sequence's last token.
        """
        return [torch.from_numpy(index).to(self.device) for index in self._batches]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Return (N, S) bool for each batch, True for tokens; ``None`` for all if the rows hold no other.

        Padding in front of a sequence, which folding computes where a trainer reads its output, is none: nobody sees
        it, itself included. Mixers of unpatched models set its hidden state to zero.
        """
        if self.seen is None:
            return [None] * len(self._batches)
        return [self.seen.flatten()[index] for index in self.batches]

    @cached_property
    def seen(self) -> Tensor | None:
        """Return (B, L) bool, False for padding in front of sequences; ``None`` if the rows hold none."""
        seen = self._ends > np.arange(self.shape[1])
        return None if seen.all() else torch.from_numpy(seen).to(self.device)

    @cached_property
    def owners(self) -> Tensor:
        """Return (B, L) int64: for each token, where it stands first among all batches' tokens behind each other."""
        flat = np.concatenate([index.ravel() for index in self._batches])
        owners = np.empty(self._ends.size, np.int64)
        owners[flat[::-1]] = np.arange(flat.size)[::-1]
        return torch.from_numpy(owners.reshape(self.shape)).to(self.device)

    @cached_property
    def segments(self) -> Segments:
        """Return the segments along which states branch."""
        return Segments(self._ends, self.tokens)

    @cached_property
    def _batches(self) -> list[np.ndarray]:
        return in_batches(sequences_of(self._ends), self.waste)


def sequences_of(ends: np.ndarray) -> list[np.ndarray]:
    """List the root-to-leaf sequences of rows.

    Args:
        ends: (B, L) int64, exclusive subtree ends.

    Returns:
        For each sequence, the indices of its tokens in B * L.
    """
    B, L = ends.shape
    flat = np.maximum(ends, np.arange(1, L + 1)) + np.arange(B)[:, None] * L
    flat = flat.ravel()
    index = np.arange(flat.size)
    # A segment is a run of tokens, each of which has the next one for its only child.
    begins = np.flatnonzero(np.r_[True, (flat[1:] != flat[:-1]) | (flat[:-1] <= index[1:])])
    stops = np.r_[begins[1:], flat.size]
    alone = (stops - begins == 1) & (flat[begins] == stops)  # most are padding: tokens without children
    found: list[np.ndarray] = []
    above: list[np.ndarray] = []  # segments from the root to this one
    limits: list[int] = []
    for begin, stop, leaf in zip(begins.tolist(), stops.tolist(), alone.tolist(), strict=True):
        while limits and limits[-1] <= begin:
            above.pop(), limits.pop()
        tokens = index[begin:stop]
        if flat[begin] == stop:  # nothing continues it
            found.append(tokens if leaf and not above else np.concatenate([*above, tokens]))
        else:
            above.append(tokens)
            limits.append(int(flat[begin]))
    return found


def in_batches(sequences: Sequence[np.ndarray], waste: float = WASTE) -> list[np.ndarray]:
    """Pad sequences of similar lengths into few batches, the longest first.

    Args:
        sequences: Indices of tokens.
        waste: As of :class:`Plan`.

    Returns:
        (N, S) int64 each.
    """
    order = sorted(sequences, key=len, reverse=True)
    batches, first, tokens = [], 0, 0
    for i, sequence in enumerate(order):
        tokens += len(sequence)
        if (i + 1 - first) * len(order[first]) > waste * tokens:
            batches.append(order[first:i])
            first, tokens = i, len(sequence)
    batches.append(order[first:])
    padded = []
    for batch in batches:
        lengths = np.array([len(sequence) for sequence in batch])
        starts = np.r_[0, np.cumsum(lengths)[:-1]]
        columns = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        padded.append(np.concatenate(batch)[starts[:, None] + columns])
    return padded


def plan_of(rows: Rows) -> Plan:
    """Return the plan of ``rows``, made at its first use and then shared.

    Args:
        rows: Packed rows.

    Returns:
        Its plan, on the rows' device.
    """
    if _key(rows) not in rows.masks:
        set_plan(rows, Plan(rows.ends, rows.tokens))
    return rows.masks[_key(rows)]


def set_plan(rows: Rows, plan: Plan) -> Rows:
    """Let ``rows`` run by a plan.

    Args:
        rows: Packed rows.
        plan: Of these rows.

    Returns:
        ``rows``.
    """
    rows.masks[_key(rows)] = plan
    return rows


def _key(rows: Rows) -> tuple[str, int]:
    return "plan", version(rows.ends)


def visible_mask(visible: Visible, length: int, device: torch.device) -> Tensor:
    """Make the mask of a sequence.

    Args:
        visible: What its queries see.
        length: S.
        device: Where it is needed.

    Returns:
        (S, S) bool, True where attention is allowed.
    """
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    allowed = distance >= 0
    if visible.window is not None:
        allowed &= distance < visible.window
    if visible.chunk is not None:
        allowed &= position[:, None] // visible.chunk == position // visible.chunk
    return allowed


def look_up(tokens: Tensor, index: Tensor) -> Tensor:
    """Look tokens up, any of them several times; gradients are summed in a fixed order.

    Args:
        tokens: (T, ...), of any dtype.
        index: int64, of any shape.

    Returns:
        ``index.shape`` + (...).
    """
    if not tokens.is_floating_point():
        return tokens[index]
    return lookup(tokens.flatten(1), index).unflatten(-1, tokens.shape[1:]) if tokens.ndim > 1 else tokens[index]
