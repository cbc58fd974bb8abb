"""Cut packed rows into segments, along which the states of mixers branch.

A **segment** is a run of tokens, each of which has the next one for its only child. It starts from the final state of
its parent, the segment that it continues. Segments of one level need those of the level above, and run together.

Shapes: B rows, L tokens a row, G segments of a group, S tokens of the longest of them.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexpatch.fold import lookup

# Segments go into one padded group while all of it is at most this many times their tokens. Kernels work by chunks of
# 64 tokens or more: shorter segments always fit together.
WASTE = 1.25
SHORT = 64


class Load(NamedTuple):
    """The load that a row puts on mixers which no mask can cut: how much they may keep for it.

    Attributes:
        separate: Tokens of its separate sequences, for each of its tokens.
        states: States that segments branch from, for each of its tokens.
    """

    separate: float
    states: float


NO_LOAD = Load(1.0, 0.0)


class Index:
    """An index that is copied once to each device that asks for it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return it as a tensor on ``device``."""
        if device not in self._copies:
            self._copies[device] = torch.from_numpy(self.array).to(device)
        return self._copies[device]


class Group:
    """Segments of one level that run in one call: all with children, or all without.

    Attributes:
        lengths: (G,) int64, their tokens.
        parents: (G,) int64, which of the states that the level above keeps each starts from; ``None`` for roots.
        keeps: Whether they have children, which need their final states.
        bounds: (G + 1,) int64, where each begins among the group's tokens.
    """

    def __init__(self, lengths: np.ndarray, parents: np.ndarray | None, keeps: bool) -> None:
        self.lengths = lengths
        self.parents = None if parents is None else Index(parents)
        self.keeps = keeps
        self.bounds = Index(np.r_[0, np.cumsum(lengths)])
        self.shape = len(lengths), int(lengths.max())


class Schedule:
    """Groups in the order in which they run.

    Attributes:
        levels: Groups of each level.
        index: int64, for all their slots behind each other the token of B * L; B * L for padding.
        back: (B * L,) int64, the slot of each token.
        sizes: Slots of each group.
    """

    def __init__(self, levels: list[list[Group]], slots: list[np.ndarray], tokens: int) -> None:
        self.levels = levels
        self.sizes = [slot.size for slot in slots]
        index = np.concatenate([slot.ravel() for slot in slots])
        back = np.empty(tokens + 1, np.int64)
        back[index] = np.arange(index.size)
        self.index, self.back = Index(index), Index(back[:tokens])


class Segments:
    """The segments of packed rows.

    Args:
        ends: (B, L) int64, exclusive subtree ends.
        tokens: Tokens that are no padding. Padding tokens of a row become one segment; ``None`` leaves them single.
    """

    def __init__(self, ends: np.ndarray, tokens: int | None = None) -> None:
        B, L = ends.shape
        ends = np.maximum(ends, np.arange(1, L + 1))
        if tokens is not None:
            ends = merge_padding(ends, tokens)
        flat = (ends + np.arange(B)[:, None] * L).ravel()
        index = np.arange(flat.size)
        self.starts = np.flatnonzero(np.r_[True, (flat[1:] != flat[:-1]) | (flat[:-1] <= index[1:])])
        self.lengths = np.diff(np.r_[self.starts, flat.size])
        self.parents, self.levels = _parents(self.starts.tolist(), flat[self.starts].tolist())
        # Of each token, the one before it in its sequences (-1: none), and its place in its segment.
        self.previous = index - 1
        child = self.parents >= 0
        self.previous[self.starts] = np.where(child, self.starts[self.parents] + self.lengths[self.parents] - 1, -1)
        self.offsets = index - np.repeat(self.starts, self.lengths)
        self._windows: dict[int, tuple[Index, Index]] = {}

    @cached_property
    def load(self) -> Load:
        """Return what mixers may keep for the rows."""
        parents = self.parents.tolist()
        leaves = np.ones(len(parents), np.int64)
        leaves[self.parents[self.parents >= 0]] = 0
        for segment in range(len(parents) - 1, -1, -1):  # children stand behind their parents
            if parents[segment] >= 0:
                leaves[parents[segment]] += leaves[segment]
        tokens = self.lengths.sum()
        states = len(np.unique(self.parents[self.parents >= 0]))
        return Load(float((leaves * self.lengths).sum() / tokens), float(states / tokens))

    @cached_property
    def varlen(self) -> Schedule:
        """Return the schedule for kernels that take sequences behind each other: two calls a level at most."""
        return self._schedule(padded=False)

    @cached_property
    def bucketed(self) -> Schedule:
        """Return the schedule for others: padded groups of segments of similar lengths."""
        return self._schedule(padded=True)

    def windows(self, size: int) -> tuple[Index, Index]:
        """Find the tokens for which a convolution over the row is wrong, and what it has to see.

        Args:
            size: Tokens that the convolution sees, the token's own among them.

        Returns:
            (W,) int64 tokens, near the beginnings of segments; (W, size) int64, their own ancestors, oldest first,
            -1 before a sequence's beginning.
        """
        if size not in self._windows:
            tokens = np.flatnonzero(self.offsets < size - 1)
            columns = [tokens]
            for _ in range(size - 1):
                columns.append(np.where(columns[-1] < 0, -1, self.previous[columns[-1]]))
            self._windows[size] = Index(tokens), Index(np.stack(columns[::-1], 1))
        return self._windows[size]

    def initial(self, states: Tensor, group: Group) -> Tensor | None:
        """Return the states that a group's segments start from, with gradients to their parents.

        Args:
            states: Final states that the level above keeps, one a parent.
            group: Segments with parents.

        Returns:
            (G, ...) states; ``None`` for zeros.
        """
        assert group.parents is not None, "roots start from nothing"
        return lookup(states.flatten(1), group.parents.on(states.device)).unflatten(-1, states.shape[1:])

    def _schedule(self, padded: bool) -> Schedule:
        """Put the segments into groups, level by level, those with children first."""
        index = np.arange(len(self.starts))
        lasts = np.ones_like(index, dtype=bool)
        lasts[self.parents[self.parents >= 0]] = False
        order = np.lexsort((-self.lengths if padded else index, lasts, self.levels))
        kept = np.full(len(index), -1)
        levels: list[list[Group]] = [[] for _ in range(int(self.levels.max()) + 1)]
        counts = [0] * len(levels)
        slots = []
        kinds = 2 * self.levels[order] + lasts[order]
        for alike in np.split(order, np.flatnonzero(np.diff(kinds)) + 1):
            for segments in _buckets(alike, self.lengths) if padded else [alike]:
                level, keeps = int(self.levels[segments[0]]), not lasts[segments[0]]
                parents = kept[self.parents[segments]] if level else None
                group = Group(self.lengths[segments], parents, keeps)
                levels[level].append(group)
                if keeps:
                    kept[segments] = counts[level] + np.arange(len(segments))
                    counts[level] += len(segments)
                columns = np.arange(group.shape[1])
                tokens = self.starts[segments][:, None] + columns
                real = columns < group.lengths[:, None]
                slots.append(np.where(real, tokens, self.previous.size) if padded else tokens[real])
        return Schedule(levels, slots, self.previous.size)


def merge_padding(ends: np.ndarray, tokens: int) -> np.ndarray:
    """Make the padding tokens of each row one segment: thousands of single ones would keep a state each.

    Real trees of one token may stand before them. Where there are any, as many tokens of each row stay single.

    Args:
        ends: (B, L) int64, exclusive subtree ends.
        tokens: Tokens of all rows that are no padding.

    Returns:
        (B, L) int64.
    """
    B, L = ends.shape
    index = np.arange(L)
    before = np.c_[np.zeros(B, np.int64), np.maximum.accumulate(ends, 1)[:, :-1]]
    alone = (ends == index + 1) & (before <= index)
    trailing = np.logical_and.accumulate(alone[:, ::-1], 1).sum(1)
    real = int(trailing.sum()) - (ends.size - tokens)
    if real < 0:  # ends of other rows
        return ends
    first = L - trailing + real
    return np.where(index >= first[:, None], L, ends)


def _parents(starts: list[int], stops: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Find the parent of each segment (-1: none) and its level, from starts and subtree ends."""
    parents, levels = np.full(len(starts), -1), np.zeros(len(starts), np.int64)
    above: list[int] = []
    for segment, start in enumerate(starts):
        while above and stops[above[-1]] <= start:
            above.pop()
        if above:
            parents[segment], levels[segment] = above[-1], len(above)
        above.append(segment)
    return parents, levels


def _buckets(segments: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Cut segments, the longest first, into groups of similar lengths."""
    while segments.size:
        own = lengths[segments]
        fits = own[0] * np.arange(1, own.size + 1) <= WASTE * np.cumsum(own)
        size = own.size if own[0] <= SHORT or fits.all() else int(fits.argmin())
        yield segments[:size]
        segments = segments[size:]
